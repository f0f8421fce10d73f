"""Further edges as whoever supervises them sees them, also after edge 0; no process is started."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_carrier import FakeCarrier

from octavo.actors.runtime.addresses import mark_of
from octavo.actors.runtime.process_mark import write_mark
from octavo.actors.runtime.process_state import started_at
from octavo.actors.supervisor.config import SupervisorConfig
from octavo.actors.supervisor.core import SupervisorCore
from octavo.gateway.api.settings import ServerSettings
from octavo.gateway.config import EngineConfig
from octavo.gateway.graph import ModelFacts
from octavo.gateway.processes import other_edges
from octavo.gateway.processes.other_edges import OtherEdges
from octavo.messages.base import Message
from octavo.messages.ids import Epoch
from octavo.messages.processes import EdgeStatus, EngineUp, PeerLeft, PeerStarted
from octavo.messages.system import Beat, KillProcess, StartProcess, Tick

MS = 1_000_000
PATIENCE_S = 180.0
needs_pidfd = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "pidfd_open"), reason="only silence tells elsewhere"
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


class FakeClock:
    def __init__(self) -> None:
        self.ns = 10_000 * MS

    def now_ns(self) -> int:
        return self.ns


class Stage:
    """Edges 1 and 2, which an edge 0 had started that is dead; edge 1 supervises them now."""

    def __init__(self, clock: FakeClock, run_dir: Path) -> None:
        self.clock = clock
        self.run_dir = run_dir
        for socket in ("edge-0.1", "edge-1.1", "edge-2.3", "edge-2.4", "engine.1", "edge-2", "edge-x.1", "lock"):
            (run_dir / socket).touch()
        self.carrier = FakeCarrier()
        self.said_to_engines: list[Message] = []
        carrier: Any = self.carrier  # has what is used of it
        self.others = OtherEdges(
            2,
            carrier,
            str(run_dir),
            engine_names=("engine",),
            post_to_engines=self.said_to_engines.append,
            log_format="plain",
            edge_incarnation=2,
        )
        self.others.adopt()

    def beat(self, *edges: tuple[str, int]) -> None:
        for name, incarnation in edges:
            self.others.take(name, Beat(name, incarnation))

    def pass_time(self, milliseconds: int) -> None:
        self.clock.ns += milliseconds * MS
        assert self.others._looks is not None
        self.others._looks.cancel()
        self.others._look()


def on_stage(monkeypatch: pytest.MonkeyPatch, test: Callable[[Stage], Awaitable[None]]) -> None:
    clock = FakeClock()
    monkeypatch.setattr(other_edges, "MonotonicClock", lambda: clock)

    async def run() -> None:
        with tempfile.TemporaryDirectory() as run_dir:
            stage = Stage(clock, Path(run_dir))
            await test(stage)
            await stage.others.close(0)

    asyncio.run(run())


def test_edges_that_are_adopted_hear_who_supervises_them_and_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(stage: Stage) -> None:
        stage.others.tell(EngineUp("engine", 7, Epoch(5)))
        for name in ("edge 1", "edge 2"):
            assert stage.carrier.take_sent(name) == [
                PeerStarted("edge 0", 2),
                EdgeStatus(""),
                EngineUp("engine", 7, Epoch(5)),
            ]
        assert stage.others.running == [("edge 1", 1), ("edge 2", 4)]

    on_stage(monkeypatch, test)


def test_an_adopted_edge_that_falls_silent_has_left_and_its_requests_are_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(stage: Stage) -> None:
        left = asyncio.create_task(stage.others.wait_for_leave(but="edge 1"))
        stage.said_to_engines.clear()
        for _ in range(99):
            stage.pass_time(100)
            stage.beat(("edge 1", 1), ("edge 2", 3))  # the last is of an incarnation before
        assert stage.said_to_engines == [], "a busy machine's edge may be silent for a while"
        for _ in range(2):
            stage.pass_time(100)
            stage.beat(("edge 1", 1))
        assert stage.said_to_engines == [PeerLeft("edge 2", 4)]
        await left
        assert stage.others.running == [("edge 1", 1)]
        assert not (stage.run_dir / "edge-2.4").exists(), "or it would be adopted again"

    on_stage(monkeypatch, test)


def test_an_adopted_edge_that_has_closed_its_socket_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(stage: Stage) -> None:
        for socket in ("edge-2.3", "edge-2.4"):
            (stage.run_dir / socket).unlink()
        stage.pass_time(100)
        assert stage.said_to_engines[-1] == PeerLeft("edge 2", 4)
        await stage.others.wait_for_leave(but="edge 1")

    on_stage(monkeypatch, test)


@pytest.fixture
def edge_2() -> Iterator[subprocess.Popen[bytes]]:
    """Its process."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:  # ourselves
        yield process
        process.kill()


@needs_pidfd
def test_an_adopted_edge_that_is_killed_has_left_at_once(
    monkeypatch: pytest.MonkeyPatch, edge_2: subprocess.Popen[bytes]
) -> None:
    async def test(stage: Stage) -> None:
        write_mark(mark_of(str(stage.run_dir), "edge 2", 4), edge_2.pid)
        (stage.run_dir / "edge-2.3").unlink()
        stage.pass_time(100)
        stage.said_to_engines.clear()
        edge_2.kill()
        async with asyncio.timeout(PATIENCE_S):
            await stage.others.wait_for_leave(but="edge 1")
        assert stage.said_to_engines == [PeerLeft("edge 2", 4)]
        for left in ("edge-2.4", "edge-2.4.pid"):
            assert not (stage.run_dir / left).exists(), "or it would be adopted again"
        stage.pass_time(100)
        assert stage.others.running == [("edge 1", 1)]

    on_stage(monkeypatch, test)


@needs_pidfd
def test_an_adopted_edge_that_is_stopped_is_ended_or_it_would_stay_for_good(
    monkeypatch: pytest.MonkeyPatch, edge_2: subprocess.Popen[bytes]
) -> None:
    async def test(stage: Stage) -> None:
        write_mark(mark_of(str(stage.run_dir), "edge 2", 4), edge_2.pid)
        for _ in range(2):  # not long enough, the first time
            edge_2.send_signal(signal.SIGSTOP)
            os.waitpid(edge_2.pid, os.WUNTRACED)
            for _ in range(3):
                stage.pass_time(100)
            edge_2.send_signal(signal.SIGCONT)
            os.waitpid(edge_2.pid, os.WCONTINUED)
            stage.pass_time(100)
            assert edge_2.poll() is None
        edge_2.send_signal(signal.SIGSTOP)
        os.waitpid(edge_2.pid, os.WUNTRACED)
        stage.pass_time(100)
        stage.pass_time(400)  # not seldom enough to have heard nobody, but they may have gone on meanwhile
        stage.pass_time(30_000)  # this process stood still itself, and knows nothing
        for _ in range(3):
            stage.pass_time(100)
        assert edge_2.poll() is None
        stage.pass_time(100)
        assert edge_2.wait(PATIENCE_S) == -signal.SIGKILL
        async with asyncio.timeout(PATIENCE_S):
            await stage.others.wait_for_leave(but="edge 1")
        assert stage.said_to_engines[-1] == PeerLeft("edge 2", 4)

    on_stage(monkeypatch, test)


@needs_pidfd
def test_an_adopted_edge_that_hangs_is_ended_when_it_has_been_silent_for_too_long(
    monkeypatch: pytest.MonkeyPatch, edge_2: subprocess.Popen[bytes]
) -> None:
    async def test(stage: Stage) -> None:
        write_mark(mark_of(str(stage.run_dir), "edge 2", 4), edge_2.pid)
        (stage.run_dir / "edge-2.3").unlink()
        for _ in range(102):
            stage.pass_time(100)
            stage.beat(("edge 1", 1))
        assert edge_2.wait(PATIENCE_S) == -signal.SIGKILL
        assert stage.others.running == [("edge 1", 1)]

    on_stage(monkeypatch, test)


@needs_pidfd
def test_an_edge_that_died_before_it_was_adopted_is_nobody_s_and_who_has_its_pid_now_lives_on(
    monkeypatch: pytest.MonkeyPatch, edge_2: subprocess.Popen[bytes]
) -> None:
    async def test(stage: Stage) -> None:
        started = started_at(edge_2.pid) - 1
        mark_of(str(stage.run_dir), "edge 2", 4).write_text(f"{edge_2.pid} {started}")
        stage.pass_time(100)
        assert stage.said_to_engines[-1] == PeerLeft("edge 2", 4)
        assert edge_2.poll() is None
        stage.pass_time(100)
        assert stage.others.running == [("edge 1", 1), ("edge 2", 3)], "whose socket is still there"

    on_stage(monkeypatch, test)


def test_an_edge_that_comes_to_listen_after_edge_0_died_is_adopted_and_told_of_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(stage: Stage) -> None:
        stage.others.tell(EngineUp("engine", 7, Epoch(5)))
        (stage.run_dir / "edge-3.1").touch()
        stage.pass_time(100)
        stage.pass_time(100)
        assert stage.said_to_engines == [PeerStarted("edge 1", 1), PeerStarted("edge 2", 4), PeerStarted("edge 3", 1)]
        assert stage.carrier.take_sent("edge 3") == [
            PeerStarted("edge 0", 2),
            EdgeStatus(""),
            EngineUp("engine", 7, Epoch(5)),
        ]

    on_stage(monkeypatch, test)


def test_nobody_has_left_because_the_supervisor_itself_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(stage: Stage) -> None:
        stage.pass_time(100)
        stage.pass_time(30_000)
        stage.pass_time(100)
        assert len(stage.others.running) == 2

    on_stage(monkeypatch, test)


def test_an_edge_that_has_been_silent_for_seconds_keeps_its_streams_and_one_that_hangs_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configs: list[SupervisorConfig] = []

    class FakeSupervisor:
        def __init__(self, config: SupervisorConfig, **_: Any) -> None:
            configs.append(config)

        async def start(self) -> None:
            """Nobody."""

        async def stop(self, grace_s: float) -> None:
            """Nobody."""

    async def test(stage: Stage) -> None:
        await stage.others.start(EngineConfig(), ServerSettings(), FACTS, "127.0.0.1", 1)

    monkeypatch.setattr(other_edges, "Supervisor", FakeSupervisor)
    on_stage(monkeypatch, test)
    (config,) = configs
    core = SupervisorCore(config)
    started = [said for said in core.handle(Tick(), 0) if isinstance(said, StartProcess)]
    assert [start.child for start in started] == ["edge 1"]
    core.handle(Beat("edge 1", 1), 0)
    said = [message for tenth in range(1, 98) for message in core.handle(Tick(), tenth * 100 * MS)]
    assert said == []
    said = [message for tenth in range(98, 104) for message in core.handle(Tick(), tenth * 100 * MS)]
    assert [type(message) for message in said] == [KillProcess]
