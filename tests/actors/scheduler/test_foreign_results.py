"""HI-118: results of a request that is over, or lives and is not in the step, are as wrong as those of a stranger."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_ring import submit
from msgspec.structs import replace

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.kv import MatchPrefix, PrefixMatched
from octavo.messages.request import TokenLogprobs
from octavo.messages.step import PlanDue, PlanStep, StepExecuted
from octavo.messages.system import ExecutorFailed, ExecutorLost

FINISHED, IN_STEP, WAITING = RequestId(0), RequestId(1), RequestId(2)

WAYS: dict[str, Callable[[StepExecuted, RequestId], StepExecuted]] = {
    "a row more": lambda step, other: replace(
        step, request_ids=(*step.request_ids, other), token_ids=(*step.token_ids, 7)
    ),
    "a row instead": lambda step, other: replace(step, request_ids=(other, *step.request_ids[1:])),
    "stopped": lambda step, other: replace(step, stopped=(other,)),
    "failed": lambda step, other: replace(step, failed=((other, "not a number"),)),
    "logprobs": lambda step, other: replace(step, logprobs=((other, TokenLogprobs(7, -1.0, 1)),)),
    "prompt logprobs": lambda step, other: replace(step, prompt_logprobs=((other, 1, ()),)),
}


def right(plan: PlanStep) -> StepExecuted:
    return StepExecuted(plan.epoch, plan.step_id, plan.request_ids, (7,) * len(plan.request_ids))


def plan_of(scheduler: SchedulerCore, request_id: RequestId) -> PlanStep:
    """Go on until a step holds a request alone."""
    while True:
        for message in scheduler.handle(PlanDue(), 1):
            if isinstance(message, MatchPrefix):
                scheduler.handle(PrefixMatched(Epoch(0), message.request_id, 0, 0), 1)
            elif isinstance(message, PlanStep):
                if message.request_ids == (request_id,):
                    return message
                scheduler.handle(right(message), 1)


def scheduler_in_step() -> tuple[SchedulerCore, PlanStep]:
    """One request has ended, one is in the step that is returned, and one waits for its seat."""
    config = SchedulerConfig(num_blocks=64, block_size=4, max_model_len=40, max_num_seqs=1, pipeline_depth=1)
    scheduler = SchedulerCore(config)
    scheduler.handle(submit(FINISHED, [1, 2, 3], max_tokens=1), 1)
    for request_id in (IN_STEP, WAITING):
        scheduler.handle(submit(request_id, [1, 2, 3]), 1)
    plan = plan_of(scheduler, IN_STEP)
    assert set(scheduler.live_request_ids()) == {IN_STEP, WAITING}
    return scheduler, plan


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", [FINISHED, WAITING], ids=["finished", "live, but not in the step"])
def test_hi_118_results_of_a_request_that_is_not_in_the_step_are_dropped_and_the_executor_is_told_of_as_failed(
    way: str, other: RequestId
) -> None:
    scheduler, plan = scheduler_in_step()
    before = scheduler.stats()
    (failed,) = scheduler.handle(WAYS[way](right(plan), other), 1)
    assert isinstance(failed, ExecutorFailed) and "make no sense" in failed.why
    after = scheduler.stats()
    assert after.num_faulty_results == before.num_faulty_results + 1
    assert after.generation_tokens == before.generation_tokens
    assert set(scheduler.live_request_ids()) == {IN_STEP, WAITING}, "nobody has lost anything by it"
    scheduler.handle(ExecutorLost(Epoch(1)), 1)
    scheduler.check()
