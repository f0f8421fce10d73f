from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from core_ring import pack, submit
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.engine.suspects import Suspects, find_suspects
from octavo.actors.engine.trial import Trial
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.ledger.core import LedgerCore
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.processes import EngineFailed
from octavo.messages.request import RequestEnded, SubmitRequest
from octavo.messages.step import ExecuteStep, PlanDue, PlanStep, StepExecuted
from octavo.messages.system import EngineLost, ExecutorLost

NUM_TOKENS = 6
CONFIG = SchedulerConfig(num_blocks=512, block_size=4, max_model_len=64, max_num_seqs=64, pipeline_depth=2)


def suspect(request_id: int, num_failures: int = 2) -> SubmitRequest:
    return submit(request_id, [5, 6], num_failures=num_failures)


def ids(submits: list[SubmitRequest]) -> list[int]:
    return [each.request_id for each in submits]


def sampled(*request_ids: int) -> StepExecuted:
    return StepExecuted(Epoch(0), 0, tuple(map(RequestId, request_ids)), (7,) * len(request_ids))


def test_without_suspects_everybody_goes_on_at_once() -> None:
    trial = Trial()
    assert ids(trial.submit(suspect(1, 0))) == [1] and ids(trial.submit(suspect(2, 1))) == [2]
    assert not trial.is_on and trial.release(RequestId(1)) == []


def test_half_of_the_suspects_are_tried_at_a_time_and_all_others_wait_for_them() -> None:
    trial = Trial()
    through = [each for number in range(8) for each in ids(trial.submit(suspect(number)))]
    assert through == [0, 1, 2, 3]
    assert trial.submit(suspect(8, 0)) == []
    assert ids(trial.note([sampled(0, 1)])) == [4] and trial.tried == [2, 3, 4], "half of six are three"
    assert trial.note([sampled(2)]) == []
    assert ids(trial.note([RequestEnded(RequestId(3), "abort"), sampled(4)])) == [5]
    assert ids(trial.note([sampled(5)])) == [6]
    assert ids(trial.note([sampled(6)])) == [7]
    assert trial.is_on
    assert ids(trial.note([sampled(7)])) == [8], "nobody is suspected any more"
    assert not trial.is_on


def test_who_is_cancelled_while_it_waits_is_heard_of_first_and_keeps_nobody_waiting() -> None:
    trial = Trial()
    for number in range(3):
        trial.submit(suspect(number))
    trial.submit(suspect(3, 0))
    assert ids(trial.release(RequestId(3))) == [3]
    assert ids(trial.release(RequestId(2))) == [2]
    assert trial.release(RequestId(0)) == [], "the scheduler has it"
    trial.submit(suspect(4, 0))
    assert trial.drop(lambda request_id: request_id == 1) == []
    assert ids(trial.note([RequestEnded(RequestId(0), "abort")])) == [4]


def test_those_of_whom_it_is_true_for_the_most_failures_are_tried_first() -> None:
    trial = Trial()
    through = [ids(trial.submit(suspect(number, num_failures))) for number, num_failures in ((1, 4), (2, 4), (3, 3))]
    assert through == [[1], [], []]
    assert ids(trial.note([sampled(1)])) == [2], "half of one is one"
    assert ids(trial.note([sampled(2)])) == [3]


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["suspect", "other", "cancel", "leave", "token"]))))
def test_nobody_is_forgotten_or_let_through_twice(script: list[tuple[int, str]]) -> None:
    trial, heard, asked = Trial(), [], []
    gone: dict[int, None] = {}
    for number, what in script:
        if what in ("suspect", "other") and number not in asked:
            asked.append(number)
            heard += ids(trial.submit(suspect(number, 2 if what == "suspect" else 1)))
        elif what == "cancel":
            heard += ids(trial.release(RequestId(number)))
        elif what == "leave":
            if number in asked and number not in heard:
                gone[number] = None
            heard += ids(trial.drop(lambda request_id, left=number: request_id == left))
        elif what == "token" and number in heard:
            heard += ids(trial.note([sampled(number)]))
    while trial.is_on:
        heard += ids(trial.note([sampled(*trial.tried)]))
    assert sorted(heard) == sorted(number for number in asked if number not in gone)
    assert len(heard) == len(set(heard))


# ---- an edge whose engines fail at one request among many ----

Where = Callable[[Message, "Engines"], bool]


class Engines:
    """An edge with a ledger, and one engine after the other, each of which fails where the test says.

    Every row samples the number of tokens that its request has.
    """

    def __init__(
        self, fails_at: Where, num_requests: int, max_tokens: int = NUM_TOKENS, *, is_half_done: bool = False
    ) -> None:
        self.ledger = LedgerCore()
        self.is_half_done = is_half_done  # it fails once the message has changed what it changes
        self.fails_at = fails_at
        self.num_failures = 0
        self.heard: dict[RequestId, list[int]] = {RequestId(number): [] for number in range(num_requests)}
        self.ends: dict[RequestId, RequestEnded] = {}
        self.named: list[int] = []
        self._begin()
        for number in range(num_requests):
            # Prompts of several lengths: some are computed in pieces, and some requests wait for others.
            self._submit(submit(number, [number + 1] * (1 + number % 9), max_tokens=max_tokens))

    def _begin(self) -> None:
        self.trial = Trial()
        self.scheduler = SchedulerCore(CONFIG, Epoch(self.num_failures))
        self.allocator = KVAllocatorCore(
            AllocatorConfig(num_blocks=CONFIG.num_blocks, block_size=CONFIG.block_size), Epoch(self.num_failures)
        )
        self.inbox: deque[Message] = deque()
        self.steps: deque[ExecuteStep] = deque()
        self.handling: Message | None = None

    def _submit(self, request: SubmitRequest) -> None:
        for message in self.ledger.handle(request, 0):
            assert isinstance(message, SubmitRequest)
            self.inbox += self.trial.submit(message)

    def run(self) -> None:
        while self.ledger.num_live:
            try:
                self._lap()
            except ZeroDivisionError:
                self._fail()

    def _lap(self) -> None:
        while self.inbox:
            self._schedule(self.inbox.popleft())
        self._schedule(PlanDue())
        if not self.inbox and self.steps:
            step = self.steps.popleft()
            rows = [
                request_id
                for request_id in step.request_ids
                if self.scheduler._state.in_flight[0].sampling_ids.count(request_id)
            ]
            tokens = tuple(len(self.scheduler._state.sequences[row].tokens) if row in self.live else 0 for row in rows)
            self.inbox.append(StepExecuted(step.epoch, step.step_id, tuple(rows), tokens))

    @property
    def live(self) -> list[RequestId]:
        return self.scheduler.live_request_ids()

    def _handle(self, core: Any, message: Message) -> list[Any]:
        self.handling = message
        fails = self.fails_at(message, self)
        answers: list[Any] = [] if fails and not self.is_half_done else core.handle(message, 0)
        if fails:
            raise ZeroDivisionError("a defect")
        return answers

    def _schedule(self, message: Message) -> None:
        answers = self._handle(self.scheduler, message)
        self.inbox += self.trial.note(answers)
        for answer in answers:
            if isinstance(answer, StepExecuted | RequestEnded):
                self._hear(answer)
            else:
                self._allocate(answer)

    def _allocate(self, message: Message) -> None:
        for answer in self._handle(self.allocator, message):
            (self.steps if isinstance(answer, ExecuteStep) else self.inbox).append(answer)

    def _hear(self, message: StepExecuted | RequestEnded) -> None:
        for said in self.ledger.handle(message, 0):
            if isinstance(said, StepExecuted):
                for request_id, token_id in zip(said.request_ids, said.token_ids, strict=True):
                    if request_id not in self.ends and request_id in self.heard:
                        self.heard[request_id].append(token_id)
            else:
                assert isinstance(said, RequestEnded)
                self.ends[said.request_id] = said

    def _fail(self) -> None:
        self.num_failures += 1
        assert self.num_failures < 100, "it never ends"
        named, among = find_suspects(self.handling, self.scheduler, self.trial)
        self.named.append(named)
        for ended in self.ledger.handle(EngineFailed(self.num_failures, named, "a defect", among), 0):
            assert isinstance(ended, RequestEnded)
            self._hear(ended)
        self._begin()
        for message in self.ledger.handle(EngineLost(Epoch(self.num_failures)), 0):
            assert isinstance(message, SubmitRequest)
            self.inbox += self.trial.submit(message)


def has(engines: Engines, request_id: int) -> bool:
    return request_id in engines.scheduler.request_ids_in_hand()


def planning(poison: int) -> Where:
    """Whenever steps are planned, while the poison has a seat or would be the next to get one."""
    return lambda message, engines: isinstance(message, PlanDue) and has(engines, poison)


def allocating(poison: int) -> Where:
    return lambda message, _: isinstance(message, PlanStep) and poison in message.request_ids


def taking_results(poison: int) -> Where:
    return lambda message, _: isinstance(message, StepExecuted) and poison in message.request_ids


@pytest.mark.parametrize("is_half_done", [False, True])
@pytest.mark.parametrize("fails_at", [planning, allocating, taking_results])
@pytest.mark.parametrize(("num_requests", "poison"), [(2, 1), (7, 0), (33, 20), (64, 63), (90, 80)])
def test_f_20_one_among_many_at_which_engines_fail_is_found_and_the_others_have_every_token(
    fails_at: Callable[[int], Where], is_half_done: bool, num_requests: int, poison: int
) -> None:
    engines = Engines(fails_at(poison), num_requests, is_half_done=is_half_done)
    engines.run()
    convicted = engines.ends.pop(RequestId(poison))
    assert (convicted.reason, convicted.error_code) == ("error", "request_quarantined")
    assert engines.num_failures <= 2 + math.ceil(math.log2(num_requests)) + 1
    assert {ended.reason for ended in engines.ends.values()} == {"length"}
    assert len(engines.ends) == num_requests - 1
    for request_id, tokens in engines.heard.items():
        num_prompt = 1 + request_id % 9
        expected = list(range(num_prompt, num_prompt + NUM_TOKENS)) if request_id != poison else []
        assert tokens == expected, request_id


def test_of_two_poisons_both_are_found() -> None:
    poisons = (5, 40)
    engines = Engines(lambda message, _: any(allocating(poison)(message, _) for poison in poisons), 48)
    engines.run()
    assert [number for number, ended in sorted(engines.ends.items()) if ended.reason == "error"] == [5, 40]
    assert engines.num_failures <= 20


def test_failures_that_no_request_is_the_cause_of_convict_nobody() -> None:
    moments, num_plans = (3, 4, 30, 33, 60, 62), count()

    def now_and_then(message: Message, _: Engines) -> bool:
        return isinstance(message, PlanDue) and next(num_plans) in moments

    engines = Engines(now_and_then, 40, max_tokens=60)
    engines.run()
    assert engines.num_failures == len(moments)
    assert {ended.reason for ended in engines.ends.values()} == {"length"}


def test_whom_a_message_names_is_the_suspect_and_whom_it_is_not_about_is_none() -> None:
    scheduler, trial = SchedulerCore(CONFIG), Trial()
    for number in range(3):
        scheduler.handle(submit(number, [5]), 0)
    assert find_suspects(submit(7, [5]), scheduler, trial) == Suspects(RequestId(7))
    assert find_suspects(None, scheduler, trial) == Suspects()
    assert find_suspects(PlanDue(), scheduler, trial).among == (0,), "the first in the queue: no other is touched"
    scheduler.handle(PlanDue(), 0)
    assert find_suspects(ExecutorLost(Epoch(1), "it died"), scheduler, trial) == Suspects(RequestId(-1), (0, 1, 2))
    plan = PlanStep(Epoch(0), 0, (RequestId(1), RequestId(9)), (1, 1), release=((RequestId(2), b""),))
    assert find_suspects(plan, scheduler, trial).among == (1, 2), "9 has ended"


def test_a_token_that_nobody_has_heard_of_clears_no_suspect() -> None:
    engines = Engines(lambda *_: False, 0)
    engines.ledger.handle(submit(1, [5], max_tokens=20), 0)
    engines._schedule(submit(1, [5], max_tokens=20))
    for _ in range(6):
        engines._lap()
    engines.inbox += engines.trial.submit(suspect(2))
    while not any(2 in step.request_ids for step in engines.steps):
        engines._lap()
    while not any(isinstance(message, StepExecuted) and 2 in message.request_ids for message in engines.inbox):
        engines._lap()
    (executed,) = (message for message in engines.inbox if isinstance(message, StepExecuted))
    engines.scheduler.handle(executed, 0)
    assert engines.trial.tried == [2] and engines.scheduler.num_new_tokens()[RequestId(2)] == 1
    assert find_suspects(executed, engines.scheduler, engines.trial) == Suspects(RequestId(2), (1, 2))
    assert find_suspects(PlanDue(), engines.scheduler, engines.trial).named == -1, "as far as can be told"


def test_a_deadline_that_cannot_be_kept_is_held_against_its_request_and_not_the_one_that_comes_along() -> None:
    scheduler = SchedulerCore(CONFIG)
    scheduler.handle(submit(1, [5], deadline_ns=10), 0)
    scheduler._state.waiting = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        scheduler.handle(submit(2, [5]), 20)
    assert find_suspects(submit(2, [5]), scheduler, Trial()) == Suspects(RequestId(1))


def test_a_recipe_tells_the_next_engine_how_often_it_was_suspected_since_its_latest_token() -> None:
    ledger = LedgerCore()
    for number in (1, 2, 3):
        ledger.handle(submit(number, [5]), 0)
    failed = EngineFailed(1, RequestId(-1), "no", (RequestId(2), RequestId(3), RequestId(9)))
    assert ledger.handle(failed, 0) == [] and ledger.handle(failed, 0) == []
    ledger.handle(StepExecuted(Epoch(0), 0, (RequestId(2),), (7,)), 0)
    assert [(each.request_id, each.num_failures) for each in ledger.recipes()] == [(3, 2), (1, 0), (2, 0)]
    moved = ledger.hand_over()
    other = LedgerCore()
    for message in moved:
        other.handle(message, 0)
    assert [(each.request_id, each.num_failures) for each in other.recipes()] == [(3, 2), (1, 0), (2, 0)]
    assert other.handle(EngineFailed(1, RequestId(-1), "no", (RequestId(3),)), 0) == []
    assert other.recipes()[0].num_failures == 3
    assert pack([7]) == next(each for each in other.recipes() if each.request_id == 2).output_token_ids
