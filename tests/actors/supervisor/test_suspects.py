"""What the supervisor's carrier looks at when a child is silent; no process, no time but the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import pytest

from octavo.actors.runtime.processes import ProcessExit, ProcessSpec
from octavo.actors.runtime.thread_times import ThreadTimes
from octavo.actors.supervisor.actor import Supervisor
from octavo.actors.supervisor.config import ChildConfig, SupervisorConfig
from octavo.messages.base import Message
from octavo.messages.ids import Epoch
from octavo.messages.system import Beat, EngineReady, ExecutorLost, ExecutorReady, StartProcess

MS = 1_000_000
PID = 7
CHILDREN = (ChildConfig("engine", "engine"), ChildConfig("executor 0", "executor"))


class FakeProcess:
    def __init__(self, is_here: bool) -> None:
        self.is_here = is_here
        self.pid = PID
        self.is_killed = False
        self._ended: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()

    def kill(self, signum: int = 9) -> None:
        self.is_killed = True
        if not self._ended.done():
            self._ended.set_result(ProcessExit(-9, "was killed by SIGKILL"))

    async def wait(self) -> ProcessExit:
        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float = 5.0) -> ProcessExit:
        self.kill()
        return await self.wait()


class Stage:
    """An engine and an executor of which nothing is real; everybody starts what the supervisor wants."""

    def __init__(self, is_here: bool) -> None:
        self.ns = 1_000 * MS
        self.is_host_silent = False
        self.threads: Mapping[int, ThreadTimes] = {}
        self.pids_looked_at: list[int] = []
        self.said: list[Message] = []
        self.executors: list[FakeProcess] = []
        self._is_here = is_here
        self.supervisor = Supervisor(
            SupervisorConfig(children=CHILDREN),
            make_spec=self._make_spec,
            send=self.said.append,
            elsewhere=self,
            clock=self,
            read_threads=self._look,
        )

    def now_ns(self) -> int:
        return self.ns

    def hosts(self, child: str) -> bool:
        return True

    def is_out_of_reach(self, child: str) -> bool:
        return self.is_host_silent

    def withdraw(self, child: str) -> None:
        """Everybody has a place at once."""

    async def spawn(self, spec: ProcessSpec) -> FakeProcess:
        process = FakeProcess(self._is_here or spec.title == "engine")
        if spec.title != "engine":
            self.executors.append(process)
        return process

    @staticmethod
    def _make_spec(start: StartProcess) -> ProcessSpec:
        return ProcessSpec(title=start.child, target="m:f", incarnation=start.incarnation)

    def _look(self, pid: int) -> Mapping[int, ThreadTimes]:
        self.pids_looked_at.append(pid)
        return self.threads

    async def begin(self) -> None:
        """Until requests would be served, and the executor has fallen silent."""
        await self.supervisor.start()
        while len(self.executors) < 1 or self.supervisor.process("executor 0") is None:
            await asyncio.sleep(0)
        self.supervisor.handle(EngineReady(1))
        self.supervisor.handle(ExecutorReady(Epoch(0)))
        self.supervisor.handle(Beat("executor 0", 1))

    def tick(self) -> None:
        self.ns += 100 * MS
        self.supervisor.handle(Beat("engine", 1))
        assert self.supervisor._ticker is not None
        self.supervisor._ticker.cancel()
        self.supervisor._tick()

    def killed_after_ms(self, change: Callable[[int], None] = lambda number: None) -> int:
        """Tick until the executor is killed."""
        for number in range(1, 200):
            change(number)
            self.tick()
            if self.executors[0].is_killed:
                return number * 100
        raise AssertionError("it lives on")


def on_stage(test: Callable[[Stage], Awaitable[None]], *, is_here: bool = True) -> None:
    async def run() -> None:
        stage = Stage(is_here)
        await stage.begin()
        await test(stage)
        await stage.supervisor.stop()

    asyncio.run(run())


def lost(stage: Stage) -> ExecutorLost:
    (message,) = (message for message in stage.said if isinstance(message, ExecutorLost))
    return message


def test_nobody_is_looked_at_while_all_beat() -> None:
    async def test(stage: Stage) -> None:
        for _ in range(30):
            stage.supervisor.handle(Beat("executor 0", 1))
            stage.tick()
        assert stage.pids_looked_at == []

    on_stage(test)


@pytest.mark.parametrize("is_known", [True, False], ids=["all its threads sleep", "the system does not say"])
def test_a_child_whose_silence_nothing_explains_is_killed_at_once(is_known: bool) -> None:
    async def test(stage: Stage) -> None:
        stage.threads = {1: ThreadTimes("S", 5, 5)} if is_known else {}
        assert stage.killed_after_ms() == 1600
        assert set(stage.pids_looked_at) == {PID}
        assert not lost(stage).is_innocent

    on_stage(test)


def test_a_child_that_waits_for_a_processor_is_waited_for_and_its_loss_nobodys_fault() -> None:
    async def test(stage: Stage) -> None:
        def starve(number: int) -> None:
            stage.threads = {1: ThreadTimes("S", 0, 0), 2: ThreadTimes("S", 0, number * 90 * MS)}

        assert 8000 < stage.killed_after_ms(starve) <= 10_100
        assert lost(stage).is_innocent

    on_stage(test)


def test_a_child_that_computes_is_given_three_seconds() -> None:
    async def test(stage: Stage) -> None:
        def compute(number: int) -> None:
            stage.threads = {1: ThreadTimes("R", number * 100 * MS, 0)}

        assert stage.killed_after_ms(compute) == 3100
        assert not lost(stage).is_innocent

    on_stage(test)


def test_what_was_seen_of_an_earlier_silence_is_not_compared_with() -> None:
    async def test(stage: Stage) -> None:
        stage.threads = {1: ThreadTimes("S", 0, 0)}
        for _ in range(8):
            stage.tick()
        stage.supervisor.handle(Beat("executor 0", 1))
        stage.threads = {1: ThreadTimes("S", 0, 5000 * MS)}  # while it was heard
        assert stage.killed_after_ms() == 1600

    on_stage(test)


def test_a_child_of_a_host_that_is_silent_as_well_is_left_to_who_watches_the_host() -> None:
    async def test(stage: Stage) -> None:
        stage.is_host_silent = True
        for _ in range(50):
            stage.tick()
        assert not stage.executors[0].is_killed
        assert stage.pids_looked_at == [], "its pid may be somebody else's here"

    on_stage(test, is_here=False)


def test_a_child_of_a_host_that_is_heard_is_killed_for_its_silence() -> None:
    async def test(stage: Stage) -> None:
        assert stage.killed_after_ms() == 1600
        assert not lost(stage).is_innocent

    on_stage(test, is_here=False)
