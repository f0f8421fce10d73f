"""What a replica says to its engine and to other edges as processes come and go; no process is started."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from fake_carrier import FakeCarrier

from octavo.actors.engine.process import EngineProcessSpec
from octavo.actors.executor.config import ExecutorProcessSpec
from octavo.actors.runtime.processes import ProcessSpec
from octavo.actors.supervisor.config import SupervisorConfig
from octavo.actors.supervisor.core import SupervisorCore
from octavo.gateway.api.settings import ServerSettings
from octavo.gateway.config import EngineConfig
from octavo.gateway.graph import ModelFacts
from octavo.gateway.processes import other_edges, replica
from octavo.gateway.processes.other_edges import OtherEdges
from octavo.gateway.processes.replica import Replica
from octavo.messages.base import Message
from octavo.messages.ids import Epoch
from octavo.messages.nodes import Listening, MeetAt
from octavo.messages.processes import (
    EdgeShed,
    EdgeStatus,
    EngineStuck,
    EngineUp,
    ExecutorLoaded,
    LoadFailed,
    PeerLeft,
    PeerStarted,
    ShedHeard,
)
from octavo.messages.system import (
    Beat,
    EngineReady,
    ExecutorLost,
    ExecutorReady,
    KillProcess,
    ProcessExited,
    ProcessStarted,
    StartProcess,
    Tick,
)

FACTS = ModelFacts(
    name="m",
    folder="/m",
    vocab_size=9,
    max_model_len=64,
    num_blocks=32,
    kv_cache_bytes=1,
    dtype="float32",
    load_seconds=0.0,
)
MS = 1_000_000


class FakeSupervisor:
    """A supervisor core whose processes are what a test says, and whose time goes by as the test likes."""

    def __init__(
        self,
        config: SupervisorConfig,
        *,
        make_spec: Callable[[StartProcess], ProcessSpec],
        send: Callable[[Message], None],
        on_change: Callable[[], None] = lambda: None,
        on_exit: Callable[[str, int], None] = lambda child, incarnation: None,
        **_: Any,
    ) -> None:
        self.core = SupervisorCore(config)
        self.specs: dict[tuple[str, int], ProcessSpec] = {}
        self.killed: list[str] = []
        self.now_ns = 0
        self._make_spec, self._send, self._on_change, self._on_exit = make_spec, send, on_change, on_exit

    async def start(self) -> None:
        self.handle(Tick())

    async def stop(self, grace_s: float = 5.0) -> None:
        """There is nothing to stop."""

    def handle(self, message: Message) -> None:
        was_ready = self.core.is_ready
        for answer in self.core.handle(message, self.now_ns):
            if isinstance(answer, StartProcess):
                if answer.child.startswith("nursery"):
                    self.handle(ProcessStarted(answer.child, answer.incarnation, 1))
                else:
                    self.specs[answer.child, answer.incarnation] = self._make_spec(answer)
            elif isinstance(answer, KillProcess):
                self.killed.append(answer.child)
            else:
                self._send(answer)
        if was_ready != self.core.is_ready:
            self._on_change()

    def process(self, child: str) -> Any:
        """A process that can be killed."""

        class Process:
            @staticmethod
            def kill() -> None:
                self.killed.append(child)

        return Process

    def pass_time(self, milliseconds: int) -> None:
        self.now_ns += milliseconds * MS
        self.handle(Tick())

    def die(self, child: str, incarnation: int) -> None:
        self._on_exit(child, incarnation)
        self.handle(ProcessExited(child, incarnation, "died"))


class FakeNodes:
    """Other hosts without keys, which run some executors."""

    why_waiting = ""

    def __init__(self, children: tuple[str, ...]) -> None:
        self._children = children

    def hosts(self, child: str) -> bool:
        return child in self._children

    def key_of(self, child: str) -> str:
        return ""


class Stage:
    """One replica, its processes played by the test, and edges beside the one that it belongs to."""

    def __init__(self, *, elsewhere: tuple[str, ...] = (), **config: Any) -> None:
        self.carrier = FakeCarrier()
        self.given_up: list[str] = []
        self.others = OtherEdges(
            2,
            self.carrier,  # type: ignore[arg-type]  # has what is used of it
            "/nowhere",
            engine_names=("engine",),
            post_to_engines=lambda message: self.replica.link.send(message),
            log_format="plain",
        )
        self.replica = Replica(
            0,
            "engine",
            EngineConfig(**config),
            "/m",
            carrier=self.carrier,  # type: ignore[arg-type]
            run_dir="/nowhere",
            deliver=lambda message: None,
            on_give_up=self.given_up.append,
            others=self.others,
            log_format="plain",
            edge_incarnation=1,
            nodes=FakeNodes(elsewhere) if elsewhere else None,  # type: ignore[arg-type]
        )
        supervisor = self.replica._supervisor
        assert isinstance(supervisor, FakeSupervisor)
        self.supervisor = supervisor

    async def start(self) -> None:
        """Until requests would be served."""
        await self.replica.start()
        self.load(1)
        self.replica.set_up(FACTS, 1024)
        self.replica.take(EngineReady(1))
        self.carrier.sent.clear()

    def load(self, incarnation: int, num_blocks: int = 32) -> None:
        self.replica.take(Beat("executor 0", incarnation))
        self.replica.take(ExecutorLoaded("executor 0", incarnation, 9, 64, num_blocks, 1, "float32", 0.0))
        self.replica.take(ExecutorReady(self.supervisor.core.epoch))

    async def start_other_edge(self) -> FakeSupervisor:
        await self.others.start(EngineConfig(), ServerSettings(), FACTS, "127.0.0.1", 1)
        supervisor = self.others._supervisor
        assert isinstance(supervisor, FakeSupervisor)
        return supervisor

    def spec_of_engine(self, incarnation: int) -> EngineProcessSpec:
        spec = self.supervisor.specs["engine", incarnation]
        return msgspec.msgpack.decode(spec.arguments, type=EngineProcessSpec)

    def spec_of_executor(self, incarnation: int) -> ExecutorProcessSpec:
        spec = self.supervisor.specs["executor 0", incarnation]
        return msgspec.msgpack.decode(spec.arguments, type=ExecutorProcessSpec)


@pytest.fixture
def on_stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Stage], Awaitable[None]]], None]:
    monkeypatch.setattr(replica, "Supervisor", FakeSupervisor)
    monkeypatch.setattr(other_edges, "Supervisor", FakeSupervisor)

    def run(test: Callable[[Stage], Awaitable[None]], **config: Any) -> None:
        async def scenario() -> None:
            await test(Stage(**config))

        asyncio.run(scenario())

    return run


OnStage = Callable[..., None]


def test_an_edge_that_starts_while_the_engine_is_down_is_known_to_the_next_engine(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        stage.supervisor.die("engine", 1)
        assert stage.spec_of_engine(2).edges == (("edge 0", 1),)
        await stage.start_other_edge()  # behind the description of the engine, before it listens
        stage.replica.take(EngineReady(2))
        assert PeerStarted("edge 1", 1) in stage.carrier.take_sent("engine")

    on_stage(test)


def test_an_engine_that_was_given_up_before_it_was_ready_is_announced_to_nobody(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        await stage.start_other_edge()
        stage.supervisor.die("engine", 1)
        stage.replica.take(Beat("engine", 2))
        for _ in range(310):  # it hangs at its start
            stage.replica.take(Beat("executor 0", 1, epoch=stage.supervisor.core.epoch))
            stage.supervisor.pass_time(100)
        assert stage.supervisor.killed == ["engine"]
        stage.carrier.sent.clear()
        stage.replica.take(EngineReady(2))  # its last word
        assert not stage.replica.link.is_up
        assert stage.carrier.take_sent("edge 1") == []
        stage.supervisor.die("engine", 2)
        stage.supervisor.pass_time(1000)
        stage.replica.take(EngineReady(3))
        ups = [message for message in stage.carrier.take_sent("edge 1") if isinstance(message, EngineUp)]
        assert ups == [EngineUp("engine", 3, stage.supervisor.core.epoch)]

    on_stage(test)


def test_what_a_dead_edge_asked_for_is_cancelled_at_once_even_if_it_is_never_replaced(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        edges = await stage.start_other_edge()
        assert stage.others.running == [("edge 1", 1)]
        incarnation = 1
        while stage.others.running:
            stage.carrier.sent.clear()
            edges.die("edge 1", incarnation)
            assert stage.carrier.take_sent("engine")[0] == PeerLeft("edge 1", incarnation)
            edges.pass_time(2000)
            incarnation += 1
        assert incarnation > 3
        assert "edge 1" not in stage.carrier.incarnations
        stage.supervisor.die("engine", 1)
        assert stage.spec_of_engine(2).edges == (("edge 0", 1),)

    on_stage(test)


def test_an_executor_that_comes_after_one_that_had_loaded_takes_as_many_blocks(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.replica.start()
        stage.load(1, num_blocks=32)
        stage.supervisor.die("executor 0", 1)  # before the graph is built: other replicas are loading still
        assert stage.spec_of_executor(2).config.num_blocks == 32
        assert (await stage.replica.loaded).num_blocks == 32

    on_stage(test)


def test_f_10_an_executor_that_cannot_load_any_more_says_why(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        incarnation, starts_ns = 1, []
        while not stage.given_up:
            stage.supervisor.die("executor 0", incarnation)
            while ("executor 0", incarnation + 1) not in stage.supervisor.specs and not stage.given_up:
                stage.supervisor.pass_time(100)
            incarnation += 1
            starts_ns.append(stage.supervisor.now_ns)
            if not stage.given_up:
                stage.replica.take(LoadFailed("executor 0", incarnation, "executor_lost", "out of memory"))
                assert stage.replica.why_not_ready == "the executor could not load: out of memory"
        assert incarnation > 5
        assert starts_ns[-2] - starts_ns[-3] >= 2000 * MS, "later each time"
        assert stage.given_up == ["executor failed too often: out of memory"]
        assert stage.replica.why_not_ready == "processes failed too often: out of memory"
        assert stage.replica.has_given_up
        first, *others = (m for m in stage.carrier.take_sent("engine") if isinstance(m, ExecutorLost))
        assert not first.is_innocent and others
        assert all(lost.is_innocent for lost in others), "requests that wait have not been computed"

    on_stage(test, max_restarts=6)


def test_an_executor_lost_while_the_engine_starts_is_made_known_to_it_before_its_requests(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        stage.supervisor.die("engine", 1)
        stage.supervisor.die("executor 0", 1)
        stage.supervisor.pass_time(200)
        stage.carrier.sent.clear()
        stage.replica.take(EngineReady(2))
        messages = stage.carrier.take_sent("engine")
        assert messages[0] == PeerStarted("executor 0", 2)
        assert isinstance(messages[-1], ExecutorLost)
        assert messages[-1].epoch == stage.supervisor.core.epoch == 2 == stage.spec_of_executor(2).epoch
        assert stage.spec_of_executor(2).engine == 2

    on_stage(test)


def test_an_engine_that_another_edge_cannot_reach_is_replaced_unless_it_has_been(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        stage.replica.take(EngineStuck("engine", 0))
        assert stage.supervisor.killed == []
        stage.replica.take(EngineStuck("engine", 1))
        assert stage.supervisor.killed == ["engine"]

    on_stage(test)


def test_other_edges_hear_of_each_change_once(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start_other_edge()
        stage.carrier.sent.clear()
        status = EdgeStatus("the engine is starting", (("engine", 1),), ("engine",))
        stage.others.tell(status)
        stage.others.tell(status)
        stage.others.tell(EngineUp("engine", 2, Epoch(1)))
        assert stage.carrier.take_sent("edge 1") == [status, EngineUp("engine", 2, Epoch(1))]

    on_stage(test)


def test_a_replica_whose_engine_has_shed_this_edge_is_asked_anew(on_stage: OnStage) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        stage.replica.take(EdgeShed(1, 7))
        assert stage.carrier.take_sent("engine") == [ShedHeard(7)]

    on_stage(test)


def test_an_executor_that_is_started_anew_is_the_only_one_heard_in_its_name_or_in_that_of_its_beats(
    on_stage: OnStage,
) -> None:
    async def test(stage: Stage) -> None:
        await stage.start()
        assert stage.carrier.expected["beat 0"] == 1
        stage.supervisor.die("executor 0", 1)
        assert ("executor 0", 2) in stage.supervisor.specs
        assert stage.carrier.expected["beat 0"] == 2
        assert stage.carrier.vouched["beat 0"] == ("", 2)

    on_stage(test)


def meetings(stage: Stage) -> list[tuple[str, int, str]]:
    """Who was told where to meet, since the last look."""
    told = [
        (peer, incarnation, message.init_method)
        for peer, incarnation, message in stage.carrier.sent
        if isinstance(message, MeetAt)
    ]
    stage.carrier.sent.clear()
    return told


GROUPS: dict[str, dict[str, Any]] = {
    "first elsewhere": {"elsewhere": ("executor 0",), "tensor_parallel_size": 2, "in_process": False},
    "second elsewhere": {"elsewhere": ("executor 1",), "tensor_parallel_size": 2, "in_process": False},
}


def listen(stage: Stage, rank: int, incarnation: int) -> None:
    """A rank says where it is, if it is anything that somebody needs to know."""
    nodes: Any = stage.replica._nodes
    name = f"executor {rank}"
    endpoint = f"tcp://127.0.0.1:{7100 + rank}" if nodes.hosts(name) else ""
    if endpoint or rank == 0:
        meet_at = f"tcp://127.0.0.1:{7200 + incarnation}" if rank == 0 else ""
        stage.replica.take(Listening(name, incarnation, endpoint, meet_at))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("first", [0, 1])
def test_the_ranks_of_a_group_meet_whichever_of_them_starts_first(on_stage: OnStage, group: str, first: int) -> None:
    async def test(stage: Stage) -> None:
        await stage.replica.start()
        for rank in (0, 1):
            listen(stage, rank, 1)
        assert meetings(stage) == [("executor 1", 1, "tcp://127.0.0.1:7201")]
        stage.supervisor.die(f"executor {first}", 1)
        assert meetings(stage) == []
        listen(stage, first, 2)
        assert meetings(stage) == [], "the other one is the old one"
        stage.supervisor.die(f"executor {1 - first}", 1)
        listen(stage, 1 - first, 2)
        assert meetings(stage) == [("executor 1", 2, "tcp://127.0.0.1:7202")]

    on_stage(test, **GROUPS[group])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("twice", [0, 1])
def test_ranks_meet_that_were_not_started_equally_often(on_stage: OnStage, group: str, twice: int) -> None:
    async def test(stage: Stage) -> None:
        await stage.replica.start()
        for rank in (0, 1):
            listen(stage, rank, 1)
        stage.supervisor.die(f"executor {twice}", 1)
        listen(stage, twice, 2)
        stage.supervisor.die(f"executor {twice}", 2)  # before the other one's exit is seen
        meetings(stage)
        stage.supervisor.die(f"executor {1 - twice}", 1)
        stage.supervisor.pass_time(5000)
        present = {rank: 3 if rank == twice else 2 for rank in (0, 1)}
        assert all((f"executor {rank}", number) in stage.supervisor.specs for rank, number in present.items())
        for rank in (1, 0):
            listen(stage, rank, present[rank])
        assert meetings(stage) == [("executor 1", present[1], f"tcp://127.0.0.1:{7200 + present[0]}")]

    on_stage(test, **GROUPS[group])


@pytest.mark.parametrize(("has_gpu", "module"), [(True, replica.EXECUTOR_MODULE), (False, replica.PRELOAD_MODULE)])
def test_c_kernels_are_built_before_executors_are_forked_unless_they_compute_on_a_gpu(
    has_gpu: bool, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.gateway.accelerator.has_gpu", lambda: has_gpu)
    assert replica.preload_module("auto") == module
    assert replica.preload_module("cpu") == replica.PRELOAD_MODULE
    assert replica.preload_module("cuda") == replica.EXECUTOR_MODULE


def test_what_is_imported_for_a_gpu_builds_no_c_kernels() -> None:
    code = (
        "import importlib, sys\n"
        "from octavo.kernels import cpu_build\n"
        "importlib.import_module(sys.argv[1])\n"
        "print(cpu_build._library_once.cache_info().currsize)\n"
    )
    counts = [
        subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=True).stdout
        for module in (replica.EXECUTOR_MODULE, replica.PRELOAD_MODULE)
    ]
    assert counts == ["0\n", "1\n"]
