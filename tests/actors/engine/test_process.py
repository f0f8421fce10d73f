"""The engine's process, on this loop, with real ports for its peers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.actors.engine.peers import first_request_id
from octavo.actors.engine.process import EngineProcess, EngineProcessSpec, EngineSetup
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.runtime.addresses import EDGE, endpoint_of
from octavo.actors.runtime.port import Port
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.quarantine import Quarantine
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.processes import EngineReport, PeerLeft, PeerStarted, RememberQuarantined
from octavo.messages.request import RequestEnded, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StepExecuted
from octavo.messages.system import Beat, EngineReady

PATIENCE_S = 180.0
FROM_ENGINE = (StepExecuted, RequestEnded, EngineReport, EngineReady, Beat)
SETUP = EngineSetup(
    scheduler=SchedulerConfig(num_blocks=2048, block_size=4, max_model_len=8192, max_num_seqs=8, pipeline_depth=1),
    allocator=AllocatorConfig(num_blocks=2048, block_size=4),
    mailbox_capacity=1024,
    octavo="test",
    model="none",
)


def submit(request_id: int, max_tokens: int = 9) -> SubmitRequest:
    return SubmitRequest(RequestId(request_id), b"\1\0\0\0", SamplingParams(max_tokens=max_tokens, seed=1))


class Stage:
    """An engine, edge 0, an executor that the test plays, and further edges as the test starts them."""

    def __init__(self, run_dir: Path) -> None:
        run_dir.chmod(0o700)
        self._run_dir = str(run_dir)
        self.ports: dict[tuple[str, int], Port] = {}
        self.heard: dict[tuple[str, int], list[Message]] = {}
        self.start(EDGE, 1)
        self.start("executor 0", 1, kinds=(ExecuteStep,))
        self.engine = EngineProcess(
            EngineProcessSpec(
                name="engine",
                incarnation=1,
                epoch=Epoch(0),
                run_dir=self._run_dir,
                edges=((EDGE, 1),),
                executors=(("executor 0", 1),),
                setup=SETUP,
            )
        )

    def start(self, name: str, incarnation: int, kinds: tuple[type[Message], ...] = FROM_ENGINE) -> None:
        port = Port(name, incarnation, allowed={"engine": kinds})
        port.bind(endpoint_of(self._run_dir, name, incarnation))
        port.connect("engine", 1, endpoint_of(self._run_dir, "engine", 1))
        self.ports[name, incarnation] = port
        self.heard[name, incarnation] = []

    def say(self, name: str, incarnation: int, *messages: Message) -> None:
        for message in messages:
            assert self.ports[name, incarnation].send("engine", message)

    def hears(self, name: str, incarnation: int, kind: type[Message]) -> list[Any]:
        return [message for message in self.heard[name, incarnation] if isinstance(message, kind)]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for peer, port in self.ports.items():
                self.heard[peer] += [message for _, message in port.receive()]
            self._execute()
            await asyncio.sleep(0.001)

    def _execute(self) -> None:
        """Execute what is there: each row samples token 7."""
        for step in self.hears("executor 0", 1, ExecuteStep):
            answer = StepExecuted(step.epoch, step.step_id, step.request_ids, (7,) * len(step.request_ids))
            self.say("executor 0", 1, answer)
        self.heard["executor 0", 1].clear()

    async def close(self) -> None:
        await self.engine.close()
        for port in self.ports.values():
            port.close()


def on_stage(run_dir: Path, test: Callable[[Stage], Awaitable[None]]) -> None:
    async def run() -> None:
        stage = Stage(run_dir)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await stage.until(lambda: bool(stage.hears(EDGE, 1, EngineReady)))
                await test(stage)
        finally:
            await stage.close()

    asyncio.run(run())


def test_requests_of_an_edge_that_dies_are_cancelled_and_those_of_its_successor_go_on(tmp_path: Path) -> None:
    first, second = first_request_id("edge 1", 1), first_request_id("edge 1", 2)

    async def test(stage: Stage) -> None:
        stage.start("edge 1", 1)
        stage.say(EDGE, 1, PeerStarted("edge 1", 1))
        stage.say("edge 1", 1, submit(first, max_tokens=4000))
        await stage.until(lambda: bool(stage.hears("edge 1", 1, StepExecuted)))
        # The successor is quicker than the news of its predecessor's end.
        stage.start("edge 1", 2)
        stage.say("edge 1", 2, submit(second))
        await stage.until(lambda: bool(stage.hears("edge 1", 2, StepExecuted)))
        stage.say(EDGE, 1, PeerLeft("edge 1", 1), PeerStarted("edge 1", 2))
        stage.say("edge 1", 1, submit(first + 1))  # its last words

        def ends() -> list[RequestEnded]:
            return [ended for ended in stage.hears("edge 1", 2, RequestEnded) if ended.request_id == second]

        await stage.until(lambda: bool(ends()))
        (ended,) = ends()
        assert (ended.request_id, ended.reason, ended.num_output_tokens) == (second, "length", 9)
        steps = [step for step in stage.hears("edge 1", 2, StepExecuted) if second in step.request_ids]
        assert len(steps) == 9, "not one is missing"
        await stage.until(lambda: stage.hears(EDGE, 1, EngineReport)[-1].num_running == 0)
        cancelled = [step for step in stage.hears(EDGE, 1, StepExecuted) if first in step.request_ids]
        assert len(cancelled) < 4000, "nobody waits for it"

    on_stage(tmp_path, test)


def test_a_poison_request_that_an_earlier_engine_found_is_refused(tmp_path: Path) -> None:
    quarantine = Quarantine()
    quarantine.add(submit(1), now_ns=2**62)
    (entry,) = quarantine.entries()

    async def test(stage: Stage) -> None:
        assert isinstance(entry, RememberQuarantined)
        stage.say(EDGE, 1, entry, submit(2))
        await stage.until(lambda: bool(stage.hears(EDGE, 1, RequestEnded)))
        (ended,) = stage.hears(EDGE, 1, RequestEnded)
        assert (ended.reason, ended.error_code) == ("refused", "request_quarantined")

    on_stage(tmp_path, test)


def test_an_engine_that_cannot_tell_an_edge_of_a_step_tells_it_of_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(stage: Stage) -> None:
        send = Port.send

        def send_but_one(port: Port, peer: str, message: Message) -> bool:
            if peer == EDGE and isinstance(message, StepExecuted) and not lost:
                lost.append(message)
                return False
            return send(port, peer, message)

        lost: list[StepExecuted] = []
        monkeypatch.setattr(Port, "send", send_but_one)
        stage.say(EDGE, 1, submit(1))
        await stage.until(stage.engine.ended.done)
        assert stage.engine.ended.result() == 1
        stage.engine.send(EDGE, lost[0])
        stage.engine.send(EDGE, EngineReady(99))
        monkeypatch.undo()
        for _ in range(100):
            await stage.until(lambda: True)
            await asyncio.sleep(0)
        assert stage.hears(EDGE, 1, StepExecuted) == []
        assert EngineReady(99) not in stage.heard[EDGE, 1]

    on_stage(tmp_path, test)
