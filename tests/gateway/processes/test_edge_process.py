"""A further edge that takes edge 0's place, as far as it does so by itself; no other process is there."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import save_byte_tokenizer

from octavo import Engine
from octavo.actors.runtime.addresses import EDGE, endpoint_of
from octavo.actors.runtime.asyncio_port import attach
from octavo.actors.runtime.port import Port
from octavo.actors.runtime.run_dir import RunDir
from octavo.actors.runtime.succession import Succession
from octavo.gateway.api.settings import ServerSettings
from octavo.gateway.config import EngineConfig
from octavo.gateway.engine_setup import load_tokenizer_of
from octavo.gateway.frontend import FrontEnd
from octavo.gateway.graph import ModelFacts
from octavo.gateway.processes import edge_process
from octavo.gateway.processes.edge_process import MAX_RESTARTS, FollowerGraph
from octavo.gateway.processes.other_edges import EdgeProcessSpec
from octavo.gateway.processes.supervision import Footing
from octavo.messages.base import Message
from octavo.messages.errors import OctavoError
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.processes import EdgeShed, EdgeStatus, EngineStuck, EngineUp, PeerStarted
from octavo.messages.request import RequestEnded, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted

PATIENCE_S = 120.0


class FakeSupervision:
    """Remembers how it would present itself."""

    def __init__(self, *_: Any, footing: Footing, **__: Any) -> None:
        self.footing = footing
        self.others = SimpleNamespace(adopt=lambda: None)
        self.replicas: list[Any] = []

    def assume(self, *_: Any) -> None:
        """Nothing will be loaded."""

    async def start(self) -> None:
        """There is nobody."""

    async def close(self) -> None:
        """There was nobody."""


def follower(run_dir: str, folder: Path) -> FollowerGraph:
    config = EngineConfig(model=str(folder))
    facts = ModelFacts(
        name="m",
        folder=str(folder),
        vocab_size=256,
        max_model_len=64,
        num_blocks=32,
        kv_cache_bytes=1,
        dtype="float32",
        load_seconds=0.0,
    )
    spec = EdgeProcessSpec(
        name="edge 2",
        incarnation=1,
        run_dir=run_dir,
        config=config,
        settings=ServerSettings(),
        facts=facts,
        engines=(),
        engine_names=("engine",),
        host="127.0.0.1",
        port=1,
        edge_incarnation=1,
    )
    return FollowerGraph(spec, load_tokenizer_of(config, folder))


def test_an_edge_that_took_over_before_counts_though_it_died_before_anybody_heard_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_byte_tokenizer(tmp_path)
    monkeypatch.setattr(edge_process, "Supervision", FakeSupervision)
    monkeypatch.setattr(FrontEnd, "num_live", 1)  # somebody waits for a stream

    async def run() -> None:
        with RunDir() as run_dir:
            edge_0, edge_1 = Succession(run_dir.path), Succession(run_dir.path)
            edge_0.take()
            graph = follower(str(run_dir.path), tmp_path)
            has_turn = asyncio.Event()
            edge_1.await_turn(asyncio.get_running_loop(), has_turn.set)
            edge_0.release()
            await has_turn.wait()
            orphaned = asyncio.Event()
            graph.await_succession(orphaned.set)
            edge_1.release()
            await orphaned.wait()
            assert graph._taking_over is not None
            await graph._taking_over
            supervision: Any = graph._supervision
            assert supervision.footing == Footing(3, num_before=2 * MAX_RESTARTS), "edge 1 may have used what 2 uses"
            await graph.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


@pytest.mark.parametrize(("num_refused", "number"), [(2, errno.EADDRINUSE), (3, errno.EADDRINUSE), (1, errno.EACCES)])
def test_an_address_of_a_process_that_died_is_tried_a_number_of_times_however_long_the_host_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_refused: int, number: int
) -> None:
    save_byte_tokenizer(tmp_path)
    refusals = [OSError(number, "not yet")] * num_refused

    class Refused(FakeSupervision):
        def __init__(self, *arguments: Any, **fields: Any) -> None:
            if refusals:
                raise refusals.pop()
            super().__init__(*arguments, **fields)

    class JumpingClock:
        now = 0

        def now_ns(self) -> int:
            self.now += 3600 * 10**9
            return self.now

    monkeypatch.setattr(edge_process, "Supervision", Refused)
    monkeypatch.setattr(edge_process, "MonotonicClock", JumpingClock)
    monkeypatch.setattr(edge_process, "MAX_TRIES", 3)

    async def run() -> None:
        with RunDir() as run_dir:
            graph = follower(str(run_dir.path), tmp_path)
            if num_refused == 2:
                assert isinstance(await graph._make_supervision(2), Refused)
            else:
                with pytest.raises(OSError, match="not yet"):
                    await graph._make_supervision(2)
            assert not refusals
            await graph.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


def test_that_an_engine_takes_no_more_is_said_with_every_beat_until_there_is_another(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    said: list[tuple[str, Message]] = []
    takes: list[str] = [EDGE]

    def send(peer: str, message: Message) -> bool:
        said.append((peer, message))
        return peer in takes

    async def run() -> None:
        with RunDir() as run_dir:
            edge_0 = Succession(run_dir.path)
            edge_0.take()
            graph = follower(str(run_dir.path), tmp_path)
            graph._beats.cancel()
            graph._meet(EngineUp("engine", 1, Epoch(0)), is_first=True)
            carrier: Any = graph._carrier
            carrier.send = send
            graph._links["engine"].post(SubmitRequest(RequestId(1), b"\1\0\0\0", SamplingParams(max_tokens=1)))
            for _ in range(2):
                graph._beat()
                graph._beats.cancel()
            stuck = [message for peer, message in said if peer == EDGE and isinstance(message, EngineStuck)]
            assert stuck == [EngineStuck("engine", 1)] * 3
            takes.append("engine")
            graph._take([(EDGE, EngineUp("engine", 2, Epoch(1)))])
            said.clear()
            graph._beat()
            assert [type(message).__name__ for _, message in said] == ["Beat"]
            await graph.close()
            edge_0.release()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


FROM_AN_ENGINE = (
    StepExecuted(Epoch(0), StepId(0), (), ()),
    RequestEnded(RequestId(1), "length", 1),
    EdgeShed(1, 1),
)
FROM_EDGE_0 = (EdgeStatus("busy"), EngineUp("engine", 1, Epoch(0)), PeerStarted("edge 0", 1))


@pytest.mark.parametrize(
    ("sender", "message"),
    [*(("engine", message) for message in FROM_AN_ENGINE), *((EDGE, message) for message in FROM_EDGE_0)],
    ids=lambda value: type(value).__name__,
)
def test_f_13_an_edge_that_cannot_take_a_message_ends_its_streams_with_an_error_and_then_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sender: str, message: Message
) -> None:
    save_byte_tokenizer(tmp_path)
    taken: list[Message] = []

    def cannot_take(_: FollowerGraph, messages: list[tuple[str, Message]]) -> None:
        taken.extend(message for _, message in messages)
        raise RuntimeError("a defect")

    monkeypatch.setattr(FollowerGraph, "_take", cannot_take)

    async def run() -> None:
        with RunDir() as run_dir:
            folder = str(run_dir.path)
            edge_0 = Succession(run_dir.path)
            edge_0.take()
            graph = follower(folder, tmp_path)
            peer = Port(sender, 1)
            peer.connect("edge 2", 1, endpoint_of(folder, "edge 2", 1))
            has_ended = asyncio.Event()
            graph.await_succession(has_ended.set)
            async with Engine.around(EngineConfig(model=str(tmp_path)), graph) as engine:
                stream = asyncio.create_task(engine.generate([1, 2, 3]))
                while not graph.frontend.num_live:
                    await asyncio.sleep(0)
                carrier = attach(asyncio.get_running_loop(), peer, lambda _: None)
                carrier.send("edge 2", message)
                await has_ended.wait()
                with pytest.raises(OctavoError, match="edge 2 failed: RuntimeError"):
                    await stream
                assert graph.why_not_ready == "edge 2 failed: RuntimeError"
                assert taken == [message]
                with pytest.raises(OctavoError):
                    await engine.generate([1, 2, 3])
            carrier.close()
            peer.close()
            edge_0.release()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
