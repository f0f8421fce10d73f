"""Nodes as edge 0 sees them when they fall silent; no host, and no time, but the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_carrier import FakeCarrier

from octavo.actors.runtime.processes import ProcessSpec
from octavo.gateway.config import NodesConfig
from octavo.gateway.processes.nodes import FORGET_TICKS, MAX_SILENT_TICKS, QUIET_TICKS, Nodes, RemoteProcess
from octavo.messages.nodes import ExitedOnNode, JoinAgain, NodeJoined, NodeLeft, NodePrepared, PrepareNode
from octavo.messages.system import Beat

NODE = "node a"


class Stage:
    """A node that has joined, and an executor on it."""

    def __init__(self) -> None:
        self.carrier = FakeCarrier()
        carrier: Any = self.carrier  # has what is used of it
        self.nodes = Nodes(
            NodesConfig(listen="tcp://127.0.0.1:7000"),
            carrier,
            incarnation=1,
            children=("executor 0",),
            prepare=PrepareNode(None, None, ""),
        )
        self.nodes.take(NODE, NodeJoined("a", 1, "tcp://127.0.0.1:7001", "", 0))
        self.nodes.take(NODE, NodePrepared(1))

    async def spawn(self) -> RemoteProcess:
        return await self.nodes.spawn(ProcessSpec(title="executor 0", target="m:f", incarnation=1))

    def pass_ticks(self, number: int) -> None:
        for _ in range(number):
            self.nodes._ticker.cancel()
            self.nodes._tick()


def on_stage(test: Callable[[Stage], Awaitable[None]]) -> None:
    async def run() -> None:
        stage = Stage()
        await test(stage)
        stage.nodes.end()

    asyncio.run(run())


@pytest.mark.parametrize("farewell", [True, False])
def test_an_executor_that_is_lost_with_its_node_was_killed_by_no_request(farewell: bool) -> None:
    async def test(stage: Stage) -> None:
        process = await stage.spawn()
        if farewell:
            stage.nodes.take(NODE, NodeLeft(1))
        else:
            stage.pass_ticks(MAX_SILENT_TICKS + 1)
        ended = await process.wait()
        assert ended.why.startswith("is lost with its node: a ")
        assert ended.is_innocent

    on_stage(test)


@pytest.mark.parametrize("is_innocent", [True, False])
def test_why_an_executor_died_on_its_node_is_for_the_node_to_say(is_innocent: bool) -> None:
    async def test(stage: Stage) -> None:
        process = await stage.spawn()
        stage.nodes.take(NODE, ExitedOnNode("executor 0", 1, "was killed by SIGKILL", is_innocent))
        ended = await process.wait()
        assert (ended.why, ended.is_innocent) == ("was killed by SIGKILL on node a", is_innocent)

    on_stage(test)


def test_an_executor_is_out_of_reach_while_its_node_misses_beats() -> None:
    async def test(stage: Stage) -> None:
        assert not stage.nodes.is_out_of_reach("executor 0")
        await stage.spawn()
        stage.pass_ticks(QUIET_TICKS)
        assert not stage.nodes.is_out_of_reach("executor 0"), "a beat may be late"
        stage.pass_ticks(1)
        assert stage.nodes.is_out_of_reach("executor 0")
        stage.nodes.take(NODE, Beat(NODE, 1))
        assert not stage.nodes.is_out_of_reach("executor 0")

    on_stage(test)


def test_a_node_that_is_lost_is_told_to_join_again_for_some_minutes_and_then_leaves_nothing() -> None:
    async def test(stage: Stage) -> None:
        stage.pass_ticks(MAX_SILENT_TICKS + 1)
        stage.carrier.take_sent(NODE)
        stage.nodes.take(NODE, Beat(NODE, 1))
        assert stage.carrier.take_sent(NODE) == [JoinAgain(1)]
        stage.pass_ticks(FORGET_TICKS - 1)
        assert stage.carrier.forgotten == []
        stage.pass_ticks(2)
        assert stage.carrier.forgotten == [NODE]
        assert not stage.nodes._dead and not stage.nodes._lost_at
        stage.pass_ticks(FORGET_TICKS)
        assert stage.carrier.forgotten == [NODE], "once"

    on_stage(test)


def test_a_node_that_joined_again_is_not_forgotten() -> None:
    async def test(stage: Stage) -> None:
        stage.pass_ticks(MAX_SILENT_TICKS + 1)
        stage.nodes.take(NODE, NodeJoined("a", 2, "tcp://127.0.0.1:7001", "", 0))
        for _ in range(FORGET_TICKS // MAX_SILENT_TICKS + 2):
            stage.pass_ticks(MAX_SILENT_TICKS)
            stage.nodes.take(NODE, Beat(NODE, 2))
        assert stage.carrier.forgotten == []

    on_stage(test)


def test_nobody_but_the_executor_that_was_placed_last_speaks_in_its_name_or_in_that_of_its_beats() -> None:
    async def test(stage: Stage) -> None:
        await stage.nodes.spawn(ProcessSpec(title="executor 0", target="m:f", incarnation=3))
        assert stage.carrier.expected["executor 0"] == stage.carrier.expected["beat 0"] == 3
        assert stage.carrier.vouched["executor 0"] == stage.carrier.vouched["beat 0"] == ("", 3)

    on_stage(test)
