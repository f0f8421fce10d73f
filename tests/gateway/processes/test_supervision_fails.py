"""F-13: whatever message edge 0, or a node, cannot take, nobody waits for it in vain, and nobody calls it ready."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engines import engine_on, save_servable

from octavo import SamplingParams
from octavo.actors.runtime.addresses import EDGE, TcpSettings, endpoint_of
from octavo.actors.runtime.asyncio_port import attach
from octavo.actors.runtime.port import Port
from octavo.actors.runtime.run_dir import RunDir
from octavo.gateway.config import EngineConfig
from octavo.gateway.node_membership import Membership
from octavo.gateway.node_settings import NodeSettings
from octavo.gateway.processes.supervision import Footing, Supervision
from octavo.messages.base import Message
from octavo.messages.errors import ExecutorLostError, OctavoError
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.nodes import JoinAgain, KillOnNode, NodeJoined, PrepareNode, StartOnNode
from octavo.messages.processes import EdgeShed, ExecutorLoaded, LoadFailed
from octavo.messages.request import RequestEnded
from octavo.messages.step import StepExecuted
from octavo.messages.system import Beat, EngineReady, ExecutorFailed, ExecutorReady

PATIENCE_S = 180.0

TO_EDGE_0 = [
    ("engine", StepExecuted(Epoch(0), StepId(0), (), ())),
    ("engine", RequestEnded(RequestId(1), "length", 1)),
    ("engine", EngineReady(1)),
    ("engine", EdgeShed(1, 1)),
    ("engine", Beat("engine", 1)),
    ("executor 0", ExecutorLoaded("executor 0", 1, 8, 8, 8, 8, "float32", 1.0)),
    ("executor 0", LoadFailed("executor 0", 1, "", "no file")),
    ("executor 0", ExecutorReady(Epoch(0))),
    ("executor 0", ExecutorFailed(Epoch(0), "it broke")),
]


@pytest.mark.parametrize(("sender", "message"), TO_EDGE_0, ids=lambda value: type(value).__name__)
def test_f_13_a_message_that_edge_0_cannot_take_ends_all_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, sender: str, message: Message
) -> None:
    taken: list[Message] = []

    def cannot_take(_: Supervision, messages: list[tuple[str, Message]]) -> None:
        taken.extend(message for _, message in messages)
        raise RuntimeError("a defect")

    monkeypatch.setattr(Supervision, "_take", cannot_take)

    async def run() -> None:
        given_up: list[tuple[int, str]] = []
        with RunDir() as run_dir:
            folder = str(run_dir.path)
            supervision = Supervision(
                EngineConfig(data_parallel_size=2, in_process=False),
                "",
                1,
                "auto",
                run_dir=folder,
                footing=Footing(1),
                deliver=lambda _: None,
                on_give_up=lambda index, why: given_up.append((index, why)),
            )
            peer = Port(sender, 1)
            peer.connect(EDGE, 1, endpoint_of(folder, EDGE, 1))
            carrier = attach(asyncio.get_running_loop(), peer, lambda _: None)
            carrier.send(EDGE, message)
            why = "the supervision failed: RuntimeError"
            for replica in supervision.replicas:
                with pytest.raises(ExecutorLostError, match=why):
                    await replica.loaded
                await replica.ready.wait()
            assert given_up == [(0, why), (1, why)]
            assert supervision.why_not_ready == why
            carrier.send(EDGE, message)
            for _ in range(100):
                await asyncio.sleep(0)
            assert taken == [message], "nothing is read after that"
            carrier.close()
            peer.close()
            await supervision.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


def test_f_13_streams_end_with_an_error_when_edge_0_cannot_take_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_servable("llama", tmp_path)
    take = Supervision._take
    num_steps = 0

    def take_some(supervision: Supervision, messages: list[tuple[str, Message]]) -> None:
        nonlocal num_steps
        num_steps += sum(isinstance(message, StepExecuted) for _, message in messages)
        if num_steps > 5:
            raise RuntimeError("a defect")
        take(supervision, messages)

    monkeypatch.setattr(Supervision, "_take", take_some)

    async def run() -> None:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        async with engine_on(tmp_path, in_process=False) as engine:
            streams = [asyncio.create_task(engine.generate([5, 6, number], params)) for number in range(4)]
            ends: list[Any] = await asyncio.gather(*streams, return_exceptions=True)
            assert [type(end).__name__ for end in ends] == ["ExecutorLostError"] * 4
            assert engine.why_not_ready == "the supervision failed: RuntimeError"
            with pytest.raises(OctavoError, match="the supervision failed: RuntimeError"):
                await engine.generate([5], params)

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


TO_A_NODE = [
    Beat(EDGE, 1),
    PrepareNode(None, None, ""),
    StartOnNode("executor 0", 1, b""),
    KillOnNode("executor 0", 1, 9),
    JoinAgain(1),
]


@pytest.mark.parametrize("message", TO_A_NODE, ids=lambda message: type(message).__name__)
def test_f_13_a_node_that_cannot_take_a_message_joins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Message
) -> None:
    def cannot_take(*_: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Membership, "_take", cannot_take)

    async def run() -> None:
        engine = Port(EDGE, 1, allowed={"node": [NodeJoined]}, allow_plain_loopback=True)
        joined: asyncio.Future[NodeJoined] = asyncio.get_running_loop().create_future()
        settings = NodeSettings(join=engine.bind("tcp://127.0.0.1:0"), name="a", address="127.0.0.1")
        carrier = attach(asyncio.get_running_loop(), engine, lambda messages: joined.set_result(messages[0][1]))  # type: ignore[arg-type]
        nursery: Any = None  # which nothing gets to
        membership = Membership(
            settings, TcpSettings(host="127.0.0.1"), None, nursery, incarnation=1, run_dir=str(tmp_path)
        )
        node = await joined
        engine.connect("node a", 1, node.endpoint)
        carrier.send("node a", message)
        assert await membership.last(asyncio.Event()) == "again"
        assert membership.why == "a message could not be taken: RuntimeError"
        carrier.close()
        engine.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
