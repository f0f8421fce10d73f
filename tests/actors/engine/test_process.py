"""The engine's process, on this loop, with real ports for its peers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from octavo.actors.engine import process
from octavo.actors.engine.peers import first_request_id
from octavo.actors.engine.process import EngineProcess, EngineProcessSpec, EngineSetup
from octavo.actors.engine.trial import Trial
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.runtime.addresses import EDGE, endpoint_of
from octavo.actors.runtime.port import Port
from octavo.actors.runtime.port_limits import PortLimits
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.actors.scheduler.quarantine import Quarantine
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.kv import ResetPrefixCache
from octavo.messages.processes import (
    EdgeShed,
    EngineFailed,
    EngineReport,
    PeerLeft,
    PeerStarted,
    RememberQuarantined,
    SetUpEngine,
    ShedHeard,
)
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, PlanDue, PlanStep, StepExecuted
from octavo.messages.system import Beat, Drain, EngineReady, ExecutorLost

PATIENCE_S = 180.0
FROM_ENGINE = (StepExecuted, RequestEnded, EngineReport, EngineReady, EngineFailed, EdgeShed, Beat)
SETUP = EngineSetup(
    scheduler=SchedulerConfig(num_blocks=2048, block_size=4, max_model_len=8192, max_num_seqs=8, pipeline_depth=1),
    allocator=AllocatorConfig(num_blocks=2048, block_size=4),
    mailbox_capacity=1024,
    octavo="test",
    model="none",
)


def submit(request_id: int, max_tokens: int = 9, num_failures: int = 0) -> SubmitRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=1)
    return SubmitRequest(RequestId(request_id), b"\1\0\0\0", params, num_failures=num_failures)


class Stage:
    """An engine, edge 0, an executor that the test plays, and further edges as the test starts them."""

    def __init__(self, run_dir: Path, setup: EngineSetup = SETUP) -> None:
        run_dir.chmod(0o700)
        self._run_dir = str(run_dir)
        self.ports: dict[tuple[str, int], Port] = {}
        self.heard: dict[tuple[str, int], list[Message]] = {}
        self.deaf: list[str] = []  # who does not look at what it was sent
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
                setup=setup,
            )
        )

    def start(self, name: str, incarnation: int, kinds: tuple[type[Message], ...] = FROM_ENGINE) -> None:
        port = Port(name, incarnation, allowed={"engine": kinds})
        port.bind(endpoint_of(self._run_dir, name, incarnation))
        port.connect("engine", 1, endpoint_of(self._run_dir, "engine", 1))
        self.ports[name, incarnation] = port
        self.heard[name, incarnation] = []

    def end(self, name: str, incarnation: int) -> None:
        self.ports.pop((name, incarnation)).close()

    def say(self, name: str, incarnation: int, *messages: Message) -> None:
        for message in messages:
            assert self.ports[name, incarnation].send("engine", message)

    def hears(self, name: str, incarnation: int, kind: type[Message]) -> list[Any]:
        return [message for message in self.heard[name, incarnation] if isinstance(message, kind)]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            for peer, port in self.ports.items():
                if peer[0] not in self.deaf:
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


def on_stage(run_dir: Path, test: Callable[[Stage], Awaitable[None]], setup: EngineSetup = SETUP) -> None:
    async def run() -> None:
        stage = Stage(run_dir, setup)
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
        stage.end("edge 1", 1)
        # The successor is quicker than the news of its predecessor's end.
        stage.start("edge 1", 2)
        stage.say("edge 1", 2, submit(second))
        await stage.until(lambda: bool(stage.hears("edge 1", 2, StepExecuted)))
        stage.say(EDGE, 1, PeerLeft("edge 1", 1), PeerStarted("edge 1", 2))
        stage.say("edge 1", 2, submit(first + 1))  # of one that has left

        def ends() -> list[RequestEnded]:
            return [ended for ended in stage.hears("edge 1", 2, RequestEnded) if ended.request_id == second]

        await stage.until(lambda: bool(ends()))
        (ended,) = ends()
        assert (ended.request_id, ended.reason, ended.num_output_tokens) == (second, "length", 9)
        steps = [step for step in stage.hears("edge 1", 2, StepExecuted) if second in step.request_ids]
        assert len(steps) == 9, "not one is missing"
        reports: Callable[[], list[EngineReport]] = partial(stage.hears, EDGE, 1, EngineReport)
        await stage.until(lambda: reports()[-1].generation_tokens > 9 and reports()[-1].num_running == 0)
        assert reports()[-1].generation_tokens < 4000, "nobody waits for it"
        assert stage.hears(EDGE, 1, StepExecuted) == [], "edge 0 asked for nothing"

    on_stage(tmp_path, test)


def test_of_an_edge_that_leaves_what_waits_in_the_mailbox_is_cancelled_too_however_much_it_is(tmp_path: Path) -> None:
    first = first_request_id("edge 1", 1)

    async def test(stage: Stage) -> None:
        scheduler = stage.engine._scheduler
        assert scheduler is not None
        stage.start("edge 1", 1)
        stage.say(EDGE, 1, PeerStarted("edge 1", 1))
        stage.say("edge 1", 1, submit(first, max_tokens=8000))
        await stage.until(lambda: bool(scheduler.live_request_ids()))
        asked: list[tuple[str, Message]] = [
            ("edge 1", submit(first + number, max_tokens=8000)) for number in range(600)
        ]
        stage.engine._take([*asked, (EDGE, PeerLeft("edge 1", 1))])
        reports: Callable[[], list[EngineReport]] = partial(stage.hears, EDGE, 1, EngineReport)
        await stage.until(lambda: not stage.engine._left)
        assert scheduler.live_request_ids() == []
        num_reports = len(reports())
        await stage.until(lambda: len(reports()) > num_reports + 1)
        assert (reports()[-1].num_running, reports()[-1].num_waiting, reports()[-1].num_completed) == (0, 0, 0)

    on_stage(tmp_path, test)


def test_an_edge_that_leaves_before_there_is_a_scheduler_is_told_nothing_afterwards(tmp_path: Path) -> None:
    async def run() -> None:
        tmp_path.chmod(0o700)
        engine = EngineProcess(
            EngineProcessSpec(
                name="engine",
                incarnation=1,
                epoch=Epoch(0),
                run_dir=str(tmp_path),
                edges=((EDGE, 1), ("edge 1", 1)),
                executors=(),
            )
        )
        engine._take([(EDGE, PeerLeft("edge 1", 1)), (EDGE, SetUpEngine(msgspec.msgpack.encode(SETUP)))])
        assert engine._edges.names == [EDGE]
        engine._cancel_left()
        assert not engine._left
        await engine.close()

    asyncio.run(run())


def test_f_20_an_engine_that_raises_at_a_request_names_it_with_its_last_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = SchedulerCore.handle

    def handle_or_raise(core: SchedulerCore, message: Any, now_ns: int) -> Any:
        if isinstance(message, SubmitRequest) and message.request_id == 3:
            raise RuntimeError("a defect")
        return handle(core, message, now_ns)

    monkeypatch.setattr(SchedulerCore, "handle", handle_or_raise)

    async def test(stage: Stage) -> None:
        stage.say(EDGE, 1, *map(submit, (1, 2, 3, 4)))
        await stage.until(stage.engine.ended.done)
        assert stage.engine.ended.result() == 1
        await stage.until(lambda: bool(stage.hears(EDGE, 1, EngineFailed)))
        assert stage.hears(EDGE, 1, EngineFailed) == [EngineFailed(1, RequestId(3), "RuntimeError: a defect")]

    on_stage(tmp_path, test)


@pytest.mark.parametrize(
    ("core", "kind"), [(SchedulerCore, PlanDue), (SchedulerCore, StepExecuted), (KVAllocatorCore, PlanStep)]
)
def test_f_20_an_engine_that_raises_at_a_message_about_many_tells_each_edge_its_suspects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: Any, kind: type[Message]
) -> None:
    other = first_request_id("edge 1", 1)
    handle = core.handle

    def handle_or_raise(self: Any, message: Any, now_ns: int) -> Any:
        scheduler = stages[0].engine._scheduler if stages else None
        if isinstance(message, kind) and scheduler is not None:
            about = message.request_ids if isinstance(message, PlanStep) else scheduler.request_ids_in_hand()
            if {1, 2, other} <= {*about}:
                raise RuntimeError("a defect")
        return handle(self, message, now_ns)

    stages: list[Stage] = []
    monkeypatch.setattr(core, "handle", handle_or_raise)

    async def test(stage: Stage) -> None:
        stages.append(stage)
        stage.start("edge 1", 1)
        stage.say(EDGE, 1, PeerStarted("edge 1", 1))
        stage.say("edge 1", 1, submit(other, max_tokens=8000))
        stage.say(EDGE, 1, submit(1, max_tokens=8000), submit(2, max_tokens=8000))
        await stage.until(stage.engine.ended.done)
        await stage.until(lambda: bool(stage.hears(EDGE, 1, EngineFailed) and stage.hears("edge 1", 1, EngineFailed)))
        why, nobody = "RuntimeError: a defect", RequestId(-1)
        assert stage.hears("edge 1", 1, EngineFailed) == [EngineFailed(1, nobody, why, (other,))]
        (heard,) = stage.hears(EDGE, 1, EngineFailed)
        assert heard == EngineFailed(1, nobody, why, heard.suspects) and sorted(heard.suspects) == [1, 2]

    on_stage(tmp_path, test)


def test_f_20_an_engine_that_cannot_take_a_request_from_its_port_names_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_take(self: Trial, request: SubmitRequest) -> list[SubmitRequest]:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Trial, "submit", cannot_take)

    async def test(stage: Stage) -> None:
        stage.say(EDGE, 1, submit(5))
        await stage.until(stage.engine.ended.done)
        await stage.until(lambda: bool(stage.hears(EDGE, 1, EngineFailed)))
        assert stage.hears(EDGE, 1, EngineFailed) == [EngineFailed(1, RequestId(5), "RuntimeError: a defect")]

    on_stage(tmp_path, test)


def test_suspects_are_tried_apart_and_whoever_waits_for_them_can_be_cancelled(tmp_path: Path) -> None:
    suspects = [submit(number, max_tokens=8000, num_failures=2) for number in (1, 2, 3, 4)]

    async def test(stage: Stage) -> None:
        stage.deaf.append("executor 0")  # no step is ever done
        stage.say(EDGE, 1, *suspects, submit(5, max_tokens=8000), submit(6, max_tokens=8000))
        scheduler = stage.engine._scheduler
        assert scheduler is not None
        await stage.until(lambda: len(scheduler.live_request_ids()) == 2)
        stage.say(EDGE, 1, CancelRequest(RequestId(4)), CancelRequest(RequestId(6)))
        await stage.until(lambda: len(stage.hears(EDGE, 1, RequestEnded)) == 2)
        assert [ended.request_id for ended in stage.hears(EDGE, 1, RequestEnded)] == [4, 6]
        assert scheduler.live_request_ids() == [1, 2]
        stage.deaf.clear()
        await stage.until(lambda: set(scheduler.live_request_ids()) == {1, 2, 3, 5})
        assert not stage.engine._trial.is_on

    on_stage(tmp_path, test)


def test_what_an_edge_that_leaves_had_asked_for_keeps_no_trial_on(tmp_path: Path) -> None:
    first = first_request_id("edge 1", 1)

    async def test(stage: Stage) -> None:
        stage.deaf.append("executor 0")
        stage.start("edge 1", 1)
        stage.say(EDGE, 1, PeerStarted("edge 1", 1))
        theirs = [submit(first + number, max_tokens=8000, num_failures=2) for number in range(3)]
        stage.say("edge 1", 1, *theirs)
        scheduler = stage.engine._scheduler
        assert scheduler is not None
        await stage.until(lambda: scheduler.live_request_ids() == [first])
        stage.say(EDGE, 1, submit(1), PeerLeft("edge 1", 1))
        await stage.until(lambda: scheduler.live_request_ids() == [1])
        assert not stage.engine._trial.is_on

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


def test_f_45_an_engine_whose_journal_cannot_be_made_any_more_serves_without_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    setup = msgspec.structs.replace(SETUP, journal=str(tmp_path / "file" / "engine.journal"))

    async def test(stage: Stage) -> None:
        stage.say(EDGE, 1, submit(1))
        await stage.until(lambda: bool(stage.hears(EDGE, 1, RequestEnded)))
        assert stage.hears(EDGE, 1, RequestEnded)[0].reason == "length"
        assert stage.engine._journal is None

    on_stage(tmp_path, test, setup)


class Watcher:
    """What an edge makes of what it hears: the tokens of each request, in order, and how it ended."""

    def __init__(self, stage: Stage, name: str) -> None:
        self._heard = stage.heard[name, 1]
        self.say = partial(stage.say, name, 1)

    def tokens(self, request_id: int) -> int:
        return sum(request_id in step.request_ids for step in self._heard if isinstance(step, StepExecuted))

    def ends(self, request_id: int) -> list[tuple[str, int]]:
        ends = [one for one in self._heard if isinstance(one, RequestEnded) and one.request_id == request_id]
        return [(ended.reason, ended.num_output_tokens) for ended in ends]

    @property
    def shed(self) -> list[EdgeShed]:
        return [message for message in self._heard if isinstance(message, EdgeShed)]

    def answer(self, *requests: SubmitRequest) -> None:
        """Say again what it waits for."""
        self.say(ShedHeard(self.shed[-1].number))
        for request in requests:
            output = np.full(self.tokens(request.request_id), 7, np.int32).tobytes()
            self.say(msgspec.structs.replace(request, output_token_ids=output, is_taken_up_again=True))


def test_hi_119_an_edge_that_never_reads_is_shed_takes_up_its_streams_when_it_does_and_others_hear_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue's bound is reached for real."""
    other = first_request_id("edge 1", 1)
    mine, theirs = submit(1, max_tokens=600), submit(other, max_tokens=900)

    async def test(stage: Stage) -> None:
        stage.start("edge 1", 1)
        stage.say(EDGE, 1, PeerStarted("edge 1", 1), mine)
        edge_0, edge_1 = Watcher(stage, EDGE), Watcher(stage, "edge 1")
        await stage.until(lambda: edge_0.tokens(1) > 0)
        stage.deaf.append(EDGE)
        edge_1.say(theirs)
        await stage.until(lambda: edge_1.ends(other) != [])
        assert edge_1.ends(other) == [("length", 900)] and edge_1.tokens(other) == 900
        assert not stage.engine.ended.done()
        report = stage.hears("edge 1", 1, EngineReport)[-1]
        assert report.num_edges_shed == 1 and report.generation_tokens < 1400, "nothing is computed for nobody"
        stage.deaf.clear()
        await stage.until(lambda: edge_0.shed != [])
        assert edge_0.tokens(1) < 600 and edge_0.ends(1) == []
        edge_0.answer(mine)
        await stage.until(lambda: edge_0.ends(1) != [])
        assert edge_0.ends(1) == [("length", 600)] and edge_0.tokens(1) == 600, "none twice, and none is missing"
        num_reports = len(stage.hears(EDGE, 1, EngineReport))
        await stage.until(lambda: len(stage.hears(EDGE, 1, EngineReport)) > num_reports)

    monkeypatch.setattr(process, "Port", partial(Port, limits=PortLimits(window=16, max_queued=128)))
    on_stage(tmp_path, test)


def test_an_edge_that_missed_a_step_hears_of_no_later_one_before_it_has_said_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(stage: Stage) -> None:
        send = Port.send
        lost: list[Message] = []

        def send_but_one(port: Port, peer: str, message: Message) -> bool:
            if peer == EDGE and isinstance(message, StepExecuted) and not lost:
                lost.append(message)
                return False
            return send(port, peer, message)

        monkeypatch.setattr(Port, "send", send_but_one)
        stage.say(EDGE, 1, submit(1, max_tokens=4000), submit(2, max_tokens=4000))
        edge = Watcher(stage, EDGE)
        await stage.until(lambda: edge.shed != [])
        assert edge.shed == [EdgeShed(1, 1)]
        # Said before it knew: nothing of it counts.
        edge.say(submit(3, max_tokens=4000), CancelRequest(RequestId(1)), ShedHeard(99))
        num_beats = len(stage.hears(EDGE, 1, Beat))
        await stage.until(lambda: len(stage.hears(EDGE, 1, Beat)) > num_beats + 2)
        assert stage.hears(EDGE, 1, StepExecuted) == [] and stage.hears(EDGE, 1, RequestEnded) == []
        edge.answer(submit(1), submit(4, max_tokens=5))
        edge.say(CancelRequest(RequestId(4)))
        await stage.until(lambda: edge.ends(1) != [] and edge.ends(4) != [])
        assert edge.ends(1) == [("length", 9)] and edge.tokens(1) == 9
        assert edge.tokens(2) == edge.tokens(3) == 0, "nobody waits for them"
        assert not stage.engine.ended.done()

    on_stage(tmp_path, test)


def test_an_edge_that_died_while_it_was_shed_has_a_successor_that_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = first_request_id("edge 1", 1), first_request_id("edge 1", 2)

    async def test(stage: Stage) -> None:
        stage.start("edge 1", 1)
        stage.say(EDGE, 1, PeerStarted("edge 1", 1))
        stage.say("edge 1", 1, submit(first, max_tokens=4000))
        await stage.until(lambda: stage.hears("edge 1", 1, StepExecuted) != [])
        stage.deaf.append("edge 1")
        await stage.until(lambda: any(report.num_edges_shed for report in stage.hears(EDGE, 1, EngineReport)))
        stage.end("edge 1", 1)
        stage.start("edge 1", 2)
        stage.say("edge 1", 2, submit(second))
        stage.deaf.clear()
        await stage.until(lambda: stage.hears("edge 1", 2, RequestEnded) != [])
        assert sum(second in step.request_ids for step in stage.hears("edge 1", 2, StepExecuted)) == 9
        stage.say(EDGE, 1, PeerLeft("edge 1", 1))
        num_reports = len(stage.hears(EDGE, 1, EngineReport))
        await stage.until(lambda: len(stage.hears(EDGE, 1, EngineReport)) > num_reports + 1)
        assert stage.hears(EDGE, 1, EngineReport)[-1].num_running == 0

    monkeypatch.setattr(process, "Port", partial(Port, limits=PortLimits(window=16, max_queued=128)))
    on_stage(tmp_path, test)


def test_an_engine_that_cannot_tell_an_executor_of_a_step_gives_up_and_says_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(stage: Stage) -> None:
        send = Port.send

        def send_no_step(port: Port, peer: str, message: Message) -> bool:
            return not isinstance(message, ExecuteStep) and send(port, peer, message)

        monkeypatch.setattr(Port, "send", send_no_step)
        stage.say(EDGE, 1, submit(1))
        await stage.until(stage.engine.ended.done)
        assert stage.engine.ended.result() == 1
        monkeypatch.undo()
        stage.engine.send(EDGE, EngineReady(99))
        for _ in range(100):
            await stage.until(lambda: True)
            await asyncio.sleep(0)
        assert EngineReady(99) not in stage.heard[EDGE, 1]

    on_stage(tmp_path, test)


def test_what_the_engine_s_port_throws_away_is_in_its_report(tmp_path: Path) -> None:
    async def scenario(stage: Stage) -> None:
        stage.say(EDGE, 1, Beat(EDGE, 1))  # which edges do not say to engines
        await stage.until(lambda: any(each.messages_dropped for each in stage.hears(EDGE, 1, EngineReport)))
        assert stage.hears(EDGE, 1, EngineReport)[-1].messages_dropped == (("malformed", 1),)

    on_stage(tmp_path, scenario)


MESSAGES_OF_EDGE_0 = (
    submit(2),
    CancelRequest(RequestId(2)),
    StopMatched(RequestId(2)),
    ResetPrefixCache(),
    RememberQuarantined(b"digest", 1),
    ShedHeard(1),
    Drain(),
    ExecutorLost(Epoch(1), "it died"),
    PeerStarted("edge 1", 1),
    PeerLeft("edge 1", 1),
)


def sabotage(monkeypatch: pytest.MonkeyPatch, kind: type[Message]) -> list[Message]:
    """Let the engine's `_take` raise at the first message of a kind; returns what it took after that."""
    taken_after: list[Message] = []
    raised: list[Message] = []
    take = EngineProcess._take

    def take_or_raise(engine: EngineProcess, messages: list[tuple[str, Message]]) -> None:
        for pair in messages:
            if raised:
                taken_after.append(pair[1])
            if isinstance(pair[1], kind) and not raised:
                raised.append(pair[1])
                raise RuntimeError("a defect")
            take(engine, [pair])

    monkeypatch.setattr(EngineProcess, "_take", take_or_raise)
    return taken_after


@pytest.mark.parametrize("message", MESSAGES_OF_EDGE_0, ids=lambda message: type(message).__name__)
def test_f_13_an_engine_that_cannot_take_a_message_ends_so_that_the_next_one_is_given_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: Message
) -> None:
    taken_after = sabotage(monkeypatch, type(message))

    async def scenario(stage: Stage) -> None:
        stage.say(EDGE, 1, message, *(submit(10 + number) for number in range(5)))
        await stage.until(stage.engine.ended.done)
        assert stage.engine.ended.result() == 1
        stage.say(EDGE, 1, submit(20))
        for _ in range(20):
            await stage.until(lambda: True)
            await asyncio.sleep(0)
        assert taken_after == [], "what is read from here on would look as if nothing were missing"

    on_stage(tmp_path, scenario)


def test_f_13_an_engine_that_cannot_take_a_step_s_results_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, StepExecuted)

    async def scenario(stage: Stage) -> None:
        stage.say(EDGE, 1, submit(2))
        await stage.until(stage.engine.ended.done)
        assert stage.engine.ended.result() == 1
        assert stage.hears(EDGE, 1, RequestEnded) == []

    on_stage(tmp_path, scenario)


def test_f_13_an_exception_in_any_callback_of_its_loop_ends_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot_tick(_: EngineProcess) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(EngineProcess, "_tick", cannot_tick)
    tmp_path.chmod(0o700)
    spec = EngineProcessSpec(
        name="engine", incarnation=1, epoch=Epoch(0), run_dir=str(tmp_path), edges=((EDGE, 1),), executors=()
    )

    async def run() -> int:
        return await asyncio.wait_for(process._serve(spec), PATIENCE_S)

    assert asyncio.run(run()) == 1
