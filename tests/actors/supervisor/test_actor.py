"""The supervisor with real processes: killed, stopped, orphaned."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from supervised_children import Birth, decode_news, is_running

from octavo.actors.runtime.processes import ChildProcess, ProcessRefusedError, ProcessSpec
from octavo.actors.supervisor.actor import Supervisor
from octavo.actors.supervisor.config import ChildConfig, SupervisorConfig
from octavo.messages.base import Message
from octavo.messages.system import EngineLost, ExecutorLost, StartExecutor, StartProcess, SupervisorGaveUp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DEADLINE_S = 300
CHILDREN = (
    ChildConfig("nursery", "nursery"),
    ChildConfig("engine", "engine"),
    ChildConfig("executor 0", "executor"),
    ChildConfig("executor 1", "executor"),
)


class Stage:
    """A supervisor, its children, and what it says."""

    def __init__(self, path: Path, target: str = "beat_for_ever", **config: object) -> None:
        self.said: list[Message] = []
        self._path = str(path / "news")
        self._target = target
        self._news = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._news.setblocking(False)
        self._news.bind(self._path)
        self._changed = asyncio.Event()
        self.supervisor = Supervisor(
            # A busy machine's children are silent now and then; only who was stopped is to be killed for it.
            SupervisorConfig(**{"children": CHILDREN, "max_silence_ns": 60_000_000_000, **config}),
            make_spec=self._make_spec,
            send=self.said.append,
        )

    async def __aenter__(self) -> Stage:
        asyncio.get_running_loop().add_reader(self._news, self._read)
        await self.supervisor.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.supervisor.stop(grace_s=DEADLINE_S)
        asyncio.get_running_loop().remove_reader(self._news)
        self._news.close()

    def _make_spec(self, start: StartProcess) -> ProcessSpec:
        return ProcessSpec(
            title=start.child,
            target=f"supervised_children:{self._target}",
            arguments=msgspec.msgpack.encode(Birth(self._path, start)),
            incarnation=start.incarnation,
        )

    def _read(self) -> None:
        try:
            while True:
                self.supervisor.handle(decode_news(self._news.recv(1 << 16)))
                self._changed.set()
        except BlockingIOError:
            pass

    async def until(self, is_reached: Callable[[], bool]) -> None:
        """Wait for news until something holds."""
        while not is_reached():
            self._changed.clear()
            await self._changed.wait()

    async def until_ready(self, **incarnations: int) -> None:
        """Wait until requests would be served, by these incarnations at least."""
        await self.until(
            lambda: (
                self.supervisor.core.is_ready
                and all(self.incarnation(name.replace("_", " ")) >= least for name, least in incarnations.items())
            )
        )

    def incarnation(self, child: str) -> int:
        process = self.supervisor.process(child)
        return 0 if process is None else process.incarnation

    def pid(self, child: str) -> int:
        process = self.supervisor.process(child)
        assert process is not None
        return process.pid


def on_stage(path: Path, test: Callable[[Stage], Awaitable[None]], **config: object) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S), Stage(path, **config) as stage:
            await test(stage)

    asyncio.run(run())


def test_a_killed_rank_has_the_whole_group_replaced_and_the_engine_lives_on(tmp_path: Path) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(executor_0=1, executor_1=1)
        os.kill(stage.pid("executor 1"), signal.SIGKILL)
        await stage.until_ready(executor_0=2, executor_1=2)
        assert stage.incarnation("engine") == 1
        assert stage.said == [ExecutorLost(stage.supervisor.core.epoch, "executor 1 was killed by SIGKILL")]

    on_stage(tmp_path, test)


def test_a_killed_engine_is_replaced_and_everybody_hears_of_it(tmp_path: Path) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(engine=1, executor_0=1)
        os.kill(stage.pid("engine"), signal.SIGKILL)
        await stage.until(lambda: any(isinstance(message, EngineLost) for message in stage.said))
        epoch = stage.supervisor.core.epoch
        assert epoch == 1
        assert StartExecutor(epoch, engine=2) in stage.said
        assert EngineLost(epoch, "engine was killed by SIGKILL", 2) in stage.said
        assert stage.incarnation("executor 0") == 1, "it keeps its weights"

    on_stage(tmp_path, test, children=CHILDREN[:-1])


def test_a_killed_engine_takes_a_group_of_several_ranks_along(tmp_path: Path) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(engine=1, executor_0=1, executor_1=1)
        os.kill(stage.pid("engine"), signal.SIGKILL)  # it may have told one of them of a step, and not the other
        await stage.until_ready(engine=2, executor_0=2, executor_1=2)
        assert EngineLost(stage.supervisor.core.epoch, "engine was killed by SIGKILL", 2) in stage.said

    on_stage(tmp_path, test)


@pytest.mark.parametrize("child", ["engine", "executor 0"])
def test_a_stopped_child_is_seen_by_its_state_before_its_beats_are_missed(tmp_path: Path, child: str) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(engine=1, executor_0=1)
        pid = stage.pid(child)
        os.kill(pid, signal.SIGSTOP)
        await stage.until(lambda: stage.incarnation(child) >= 2)
        assert not is_running(pid)

    on_stage(tmp_path, test)  # with a minute for beats


def test_a_stopped_nursery_is_replaced_with_all_its_children(tmp_path: Path) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(engine=1, executor_0=1, executor_1=1)
        nursery = stage.supervisor.nursery.pid
        os.kill(nursery, signal.SIGSTOP)
        await stage.until_ready(engine=2, executor_0=2, executor_1=2)
        assert stage.supervisor.nursery.pid != nursery

    on_stage(tmp_path, test)


@pytest.mark.parametrize("child", ["engine", "executor 0"])
def test_a_stopped_child_is_killed_and_replaced(tmp_path: Path, child: str) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(engine=1, executor_0=1)
        pid = stage.pid(child)
        os.kill(pid, signal.SIGSTOP)
        await stage.until(lambda: stage.incarnation(child) >= 2)
        assert not is_running(pid)

    on_stage(tmp_path, test, max_silence_ns=SupervisorConfig().max_silence_ns)


def test_a_killed_nursery_is_replaced_with_all_its_children(tmp_path: Path) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(engine=1, executor_0=1, executor_1=1)
        nursery, old = stage.supervisor.nursery.pid, [stage.pid(child.name) for child in CHILDREN[1:]]
        os.kill(nursery, signal.SIGKILL)
        # Killed with the nursery or, should the news of a peer's end come first, by the supervisor.
        await stage.until(lambda: all(stage.incarnation(child.name) >= 2 for child in CHILDREN[1:]))
        assert stage.supervisor.nursery.pid not in (0, nursery)
        assert not any(is_running(pid) for pid in old)
        assert stage.supervisor.core.restarts_by_kind["nursery"] == 1
        # One loss or several, depending on who started again before which news came; a request is to blame for none.
        assert all(message.is_innocent for message in stage.said if isinstance(message, ExecutorLost))

    on_stage(tmp_path, test)


def test_f_51_a_child_for_which_the_system_has_no_room_is_started_once_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(stage: Stage) -> None:
        await stage.until_ready(engine=1, executor_0=1)
        spawn = stage.supervisor.nursery.spawn
        num_refused = 0

        async def refuse(spec: ProcessSpec) -> ChildProcess:
            nonlocal num_refused
            if spec.title == "engine" and num_refused < 4:
                num_refused += 1
                raise ProcessRefusedError(f"{spec.title} cannot be started: fork: Resource temporarily unavailable")
            return await spawn(spec)

        monkeypatch.setattr(stage.supervisor.nursery, "spawn", refuse)
        os.kill(stage.pid("engine"), signal.SIGKILL)
        await stage.until_ready(engine=6)
        assert num_refused == 4
        assert not stage.supervisor.core.gave_up_because

    on_stage(
        tmp_path,
        test,
        max_restarts_of_others=1,
        max_restarts=1,
        backoff_ns=(0, 1_000_000),
        proven_ns=3_600_000_000_000,
    )


def test_children_that_cannot_start_are_given_up_with_the_reason(tmp_path: Path) -> None:
    async def test(stage: Stage) -> None:
        while not stage.said or not isinstance(stage.said[-1], SupervisorGaveUp):
            await asyncio.sleep(0.01)
        assert stage.said[-1].why.endswith("exited with code 1")
        assert not stage.supervisor.core.is_ready

    on_stage(
        tmp_path, test, target="fail", backoff_ns=(0, 1_000_000), max_restarts=3, children=(CHILDREN[0], CHILDREN[2])
    )


def test_a_child_that_cannot_be_described_is_given_up_with_the_reason(tmp_path: Path) -> None:
    async def run() -> None:
        def make_spec(_: StartProcess) -> ProcessSpec:
            raise KeyError("no such rank")

        gave_up = asyncio.Event()
        supervisor = Supervisor(
            SupervisorConfig(children=CHILDREN[1:2], max_restarts_of_others=1),
            make_spec=make_spec,
            send=lambda _: gave_up.set(),
        )
        async with asyncio.timeout(DEADLINE_S):
            await supervisor.start()
            await gave_up.wait()
            assert "no such rank" in supervisor.core.gave_up_because
            await supervisor.stop()

    asyncio.run(run())


@pytest.mark.parametrize("what_fails", ["spawn", "wait"])
def test_a_child_whose_exit_nobody_would_see_is_killed_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what_fails: str
) -> None:
    lost: list[int] = []
    told: list[object] = []

    async def fail() -> None:
        raise OSError("out of sight")

    async def run() -> None:
        stage = Stage(tmp_path, children=CHILDREN[:-1])
        spawn = stage.supervisor.nursery.spawn

        async def spawn_unseen(spec: ProcessSpec) -> ChildProcess:
            if spec.title != "executor 0" or spec.incarnation > 1:
                return await spawn(spec)
            if what_fails == "spawn":
                await fail()
            child = await spawn(spec)
            lost.append(child.pid)
            monkeypatch.setattr(child, "wait", fail)
            return child

        monkeypatch.setattr(stage.supervisor.nursery, "spawn", spawn_unseen)
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        async with asyncio.timeout(DEADLINE_S), stage:
            await stage.until_ready(executor_0=2)
            assert stage.incarnation("executor 0") == 2
            loss = next(message for message in stage.said if isinstance(message, ExecutorLost))
            assert "out of sight" in loss.why and loss.is_innocent

    asyncio.run(run())
    assert len(told) == 1, "it is a defect, and said so"
    assert len(lost) == (what_fails == "wait") and not any(map(is_running, lost))


def test_stopping_ends_everybody_and_leaves_no_descriptor(tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            before = len(list(Path("/proc/self/fd").iterdir()))
            stage = Stage(tmp_path)
            async with stage:
                await stage.until_ready(engine=1, executor_0=1, executor_1=1)
                pids = [stage.supervisor.nursery.pid, *(stage.pid(child.name) for child in CHILDREN[1:])]
            assert stage.supervisor.core.is_stopped
            assert not any(is_running(pid) for pid in pids)
            assert len(list(Path("/proc/self/fd").iterdir())) == before
            await stage.supervisor.stop()

    asyncio.run(run())


def test_stopping_while_children_are_being_started_leaves_none(tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            stage = Stage(tmp_path)
            async with stage:
                pid = stage.supervisor.nursery.pid
                assert stage.supervisor.process("engine") is None, "it is asked for, not yet there"
            assert not is_running(pid)
            assert stage.supervisor.core.is_stopped

    asyncio.run(run())
