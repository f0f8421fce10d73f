"""Results that cannot be: HI-118, F-16."""

from __future__ import annotations

import pytest
from core_ring import submit
from msgspec.structs import replace

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.kv import PrefixMatched
from octavo.messages.request import CancelRequest, RequestEnded
from octavo.messages.step import PlanDue, PlanStep, StepExecuted
from octavo.messages.system import ExecutorFailed, ExecutorLost
from octavo.sim.faults.garble import NUM_WAYS, garble

VOCAB = 50


def make(
    vocab_size: int = VOCAB, num_requests: int = 3, pipeline_depth: int = 2
) -> tuple[SchedulerCore, list[PlanStep]]:
    config = SchedulerConfig(
        num_blocks=64, block_size=4, max_model_len=40, vocab_size=vocab_size, pipeline_depth=pipeline_depth
    )
    scheduler = SchedulerCore(config)
    for request_id in range(num_requests):
        scheduler.handle(submit(request_id, [1, 2, 3], eos=True), 1)
    return scheduler, start(scheduler, Epoch(0), num_requests)


def start(scheduler: SchedulerCore, epoch: Epoch, num_requests: int) -> list[PlanStep]:
    scheduler.handle(PlanDue(), 1)
    for request_id in range(num_requests):
        scheduler.handle(PrefixMatched(epoch, RequestId(request_id), 0, 0), 1)
    return [message for message in scheduler.handle(PlanDue(), 1) if isinstance(message, PlanStep)]


def right(plan: PlanStep) -> StepExecuted:
    return StepExecuted(plan.epoch, plan.step_id, plan.request_ids, (7,) * len(plan.request_ids))


def whys(answers: list[Message]) -> list[str]:
    assert all(isinstance(answer, ExecutorFailed) for answer in answers), answers
    return [answer.why for answer in answers if isinstance(answer, ExecutorFailed)]


def test_accepted_results_are_the_first_answer_the_very_same_object_then_what_follows() -> None:
    scheduler, (plan, *_) = make()
    executed = replace(right(plan), stopped=(RequestId(1),))
    first, *others = scheduler.handle(executed, 1)
    assert first is executed
    (ended,) = others
    assert isinstance(ended, RequestEnded)
    assert ended.stop_token_id == 7


def test_a_token_that_comes_with_its_deadline_still_counts() -> None:
    config = SchedulerConfig(num_blocks=64, block_size=4, max_model_len=40)
    scheduler = SchedulerCore(config)
    scheduler.handle(submit(0, [1, 2, 3], deadline_ns=5), 1)
    (plan, *_) = start(scheduler, Epoch(0), 1)
    executed, ended = scheduler.handle(right(plan), 5)
    assert isinstance(executed, StepExecuted)
    assert isinstance(ended, RequestEnded)
    assert (ended.reason, ended.num_output_tokens) == ("abort", 1)


@pytest.mark.parametrize("way", range(NUM_WAYS))
def test_hi_118_f_16_results_that_cannot_be_are_dropped_and_the_executor_is_told_of_as_failed(way: int) -> None:
    scheduler, (plan, *_) = make()
    (why,) = whys(scheduler.handle(garble(right(plan), way, VOCAB), 1))
    assert "make no sense" in why
    stats = scheduler.stats()
    assert (stats.num_faulty_results, stats.num_dropped_messages, stats.generation_tokens) == (1, 1, 0)
    # It is not listened to any more, not even if it is right; one report is enough.
    assert scheduler.handle(right(plan), 1) == []
    assert scheduler.stats().generation_tokens == 0
    scheduler.handle(ExecutorLost(Epoch(1)), 1)
    (again, *_) = start(scheduler, Epoch(1), 3)
    assert again.start[0].token_ids == submit(0, [1, 2, 3]).prompt_token_ids, "the step is done again"
    (accepted,) = scheduler.handle(right(again), 1)
    assert isinstance(accepted, StepExecuted)
    scheduler.check()


def test_f_26_results_that_never_came_are_noticed_at_the_next_ones() -> None:
    scheduler, plans = make(pipeline_depth=2)
    (why,) = whys(scheduler.handle(right(plans[1]), 1))
    assert "step 1" in why
    assert "step 0 comes first" in why


def test_f_27_repeated_results_change_nothing() -> None:
    scheduler, plans = make()
    executed = right(plans[0])
    assert scheduler.handle(executed, 1) == [executed]
    assert scheduler.handle(executed, 1) == []
    stats = scheduler.stats()
    assert (stats.num_dropped_messages, stats.num_faulty_results, stats.generation_tokens) == (1, 0, 3)


def test_results_of_a_step_that_nobody_planned_are_a_fault() -> None:
    scheduler = SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=16))
    (why,) = whys(scheduler.handle(StepExecuted(Epoch(0), StepId(3), (), ()), 1))
    assert "not asked for" in why


def test_a_row_may_be_missing_if_it_failed_or_its_request_has_ended() -> None:
    scheduler, (plan, *_) = make()
    scheduler.handle(CancelRequest(RequestId(0)), 1)
    executed = StepExecuted(plan.epoch, plan.step_id, (RequestId(2),), (7,), failed=((RequestId(1), "not a number"),))
    accepted, ended = scheduler.handle(executed, 1)
    assert accepted is executed
    assert isinstance(ended, RequestEnded)
    assert ended.error_code == "request_failed"


def test_an_unknown_vocabulary_leaves_the_bounds_of_int32() -> None:
    scheduler, (plan, *_) = make(vocab_size=0)
    assert whys(scheduler.handle(replace(right(plan), token_ids=(1, 2, 1 << 31)), 1))
    scheduler, (plan, *_) = make(vocab_size=0)
    (accepted,) = scheduler.handle(replace(right(plan), token_ids=(1, 2, (1 << 31) - 1)), 1)
    assert isinstance(accepted, StepExecuted)
