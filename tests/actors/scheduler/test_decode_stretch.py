"""Skipping laps of pure decode gives exactly what stepping through them gives."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from core_ring import submit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.request import CancelRequest, RequestEnded
from octavo.messages.step import DecodeStretch, ExecuteStep, PlanDue, PlanStep, StepExecuted

NUM_TOKENS = 3  # few, so that outputs meet other requests' prompts in the prefix cache


def token_of(request_id: RequestId) -> int:
    return request_id % NUM_TOKENS


@dataclass
class Script:
    """Messages from outside, each with the lap before which it arrives."""

    config: SchedulerConfig
    arrivals: list[tuple[int, object]]


@dataclass
class Laps:
    """Both cores and an executor that samples `token_of`, a lap at a time or many."""

    script: Script
    lap: int = 0
    num_skipped: int = 0
    record: list[object] = field(default_factory=list)  # plans, steps and ends
    states: dict[int, tuple] = field(default_factory=dict)  # at the begin of a lap

    def __post_init__(self) -> None:
        config = self.script.config
        self.scheduler = SchedulerCore(config)
        self.allocator = KVAllocatorCore(
            AllocatorConfig(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        )
        self.arrivals = deque(self.script.arrivals)
        self.to_allocator: deque = deque()
        self.steps: deque[ExecuteStep] = deque()
        self.num_left: dict[RequestId, int] = {}  # tokens that the executor knows and has not computed

    def tell_scheduler(self, message) -> None:
        for answer in self.scheduler.handle(message, self.lap + 1):
            if answer is message:
                continue
            if isinstance(answer, RequestEnded):
                self.record.append((self.scheduler.stats().num_steps, answer))
            else:
                self.to_allocator.append(answer)

    def settle(self) -> None:
        while True:
            self.tell_scheduler(PlanDue())
            if not self.to_allocator:
                return
            while self.to_allocator:
                message = self.to_allocator.popleft()
                if isinstance(message, PlanStep):
                    self.record.append(message)
                for answer in self.allocator.handle(message, self.lap + 1):
                    if isinstance(answer, ExecuteStep):
                        self.steps.append(answer)
                        self.record.append(answer)
                    else:
                        self.tell_scheduler(answer)

    def execute(self) -> None:
        step = self.steps[0]
        sampled = self.compute()
        tokens = tuple(token_of(request_id) for request_id in sampled)
        self.tell_scheduler(StepExecuted(step.epoch, step.step_id, sampled, tokens))

    def compute(self) -> tuple[RequestId, ...]:
        """Do the oldest step; return the rows that sample."""
        step = self.steps.popleft()
        for request_id in step.drop:
            del self.num_left[request_id]
        for start in step.start:
            self.num_left[start.request_id] = len(start.token_ids) // 4 - start.num_computed_tokens
        sampled = []
        for request_id, num_tokens in zip(step.request_ids, step.num_tokens, strict=True):
            self.num_left[request_id] -= num_tokens
            if self.num_left[request_id] == 0:
                self.num_left[request_id] = 1
                sampled.append(request_id)
        return tuple(sampled)

    def run(self, choose: Callable[[int], int] | None, spoil: Callable[[DecodeStretch], DecodeStretch]) -> None:
        """Run to the end.

        Args:
            choose: how many laps to skip of those possible; None: step through all.
            spoil: what to do wrong with a stretch.
        """
        while True:
            self.settle()  # a lap ends with planning: what arrives next finds the pipeline full
            while self.arrivals and self.arrivals[0][0] <= self.lap:
                self.tell_scheduler(self.arrivals.popleft()[1])
            self.settle()
            self.scheduler.check()
            self.allocator.check()
            self.states[self.lap] = (self.scheduler.stats(), self.allocator.stats(), len(self.record))
            if not self.steps:
                if not self.arrivals:
                    assert self.scheduler.num_requests == 0
                    return
                self.lap += 1
                continue
            if choose is not None:
                horizon = self.scheduler.decode_horizon()
                if self.arrivals:
                    horizon = min(horizon, self.arrivals[0][0] - self.lap)
                num_laps = choose(horizon) if horizon > 0 else 0
                if num_laps:
                    self.skip(spoil(self.scheduler.advance_decode(num_laps, token_of)))
                    continue
            self.execute()
            self.lap += 1

    def skip(self, stretch: DecodeStretch) -> None:
        """Record what stepping would have recorded, with the blocks that were really taken."""
        appended = self.allocator.advance_decode(stretch)
        num_rows = len(stretch.request_ids)
        for offset in range(stretch.num_steps):
            step_id = StepId(stretch.first_step_id + offset)
            blocks: dict[RequestId, tuple[BlockId, ...]] = {}
            for at, row, block_id in appended:
                if at == offset:
                    blocks[row] = (*blocks.get(row, ()), block_id)
            grown = tuple(blocks.items())
            head = (stretch.epoch, step_id, stretch.request_ids, (1,) * num_rows)
            self.record.append(PlanStep(*head, grow=tuple((row, len(block_ids)) for row, block_ids in grown)))
            step = ExecuteStep(*head, append_blocks=grown)
            self.record.append(step)
            self.steps.append(step)
        for _ in range(stretch.num_steps):
            assert sorted(self.compute()) == sorted(stretch.request_ids)
        self.lap += stretch.num_steps
        self.num_skipped += stretch.num_steps


def random_script(rng: random.Random) -> Script:
    """A small pool, prompts that share prefixes, priorities, bursts, cancellations, siblings, deadlines far off."""
    config = SchedulerConfig(
        num_blocks=rng.choice([5, 8, 13, 30, 80, 150, 400]),
        block_size=rng.choice([1, 2, 3, 4, 8, 16]),
        max_model_len=rng.choice([20, 60, 200]),
        max_num_seqs=rng.choice([1, 2, 4, 8]),
        max_num_batched_tokens=rng.choice([3, 8, 64]),
        pipeline_depth=rng.randint(1, 3),
        max_num_queued_requests=rng.choice([3, 100]),
        priority_aging_ns=rng.choice([0, 20]),
        enable_prefix_caching=rng.random() < 0.7,
    )
    prefixes = [[rng.randrange(NUM_TOKENS) for _ in range(rng.choice([1, 9, 20]))] for _ in range(3)]
    arrivals: list[tuple[int, object]] = []
    request_id = 0
    lap = 0
    while request_id < 14:
        lap += rng.choice([0, 0, 1, 7, 40])
        prompt = rng.choice(prefixes) + [rng.randrange(NUM_TOKENS) for _ in range(rng.choice([0, 1, 5]))]
        prompt = prompt[: max(1, config.max_sequence_len - 1)]
        first = submit(
            request_id,
            prompt,
            max_tokens=rng.choice([1, 2, 5, 30, 100, None]),
            priority=rng.choice([0, 0, 0, -1, 2]),
            arrival_ns=lap,
        )
        num_siblings = rng.choice([1, 1, 1, 2])
        for sibling in range(num_siblings):
            fields = {"fork_of": RequestId(request_id)} if sibling else {}
            arrivals.append((lap, msgspec.structs.replace(first, request_id=request_id + sibling, **fields)))
        request_id += num_siblings
        if rng.random() < 0.2:
            arrivals.append((lap + rng.choice([1, 10, 30]), CancelRequest(RequestId(rng.randrange(request_id)))))
    return Script(config, sorted(arrivals, key=lambda arrival: arrival[0]))


def compare(seed: int, spoil: Callable[[DecodeStretch], DecodeStretch] = lambda stretch: stretch) -> Laps:
    rng = random.Random(seed)
    script = random_script(rng)
    stepped, skipping = Laps(script), Laps(script)
    stepped.run(None, spoil)
    whole = rng.random() < 0.4
    skipping.run(lambda horizon: horizon if whole else rng.randint(0, horizon), spoil)
    assert skipping.record == stepped.record
    assert skipping.states.items() <= stepped.states.items()
    assert skipping.lap == stepped.lap
    return skipping


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**32))
def test_skipping_laps_gives_every_plan_block_and_end_that_stepping_gives(seed: int) -> None:
    compare(seed)


def test_random_scripts_skip_evict_preempt_and_queue() -> None:
    runs = [compare(seed) for seed in range(60)]
    laps_skipped = sum(run.num_skipped for run in runs)
    assert laps_skipped > sum(run.lap for run in runs) // 4
    assert sum(run.allocator.stats().num_evicted for run in runs) > 100
    assert sum(run.scheduler.stats().num_preemptions for run in runs) > 10
    assert any(scheduler.num_waiting for run in runs for scheduler, _, _ in run.states.values())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda stretch: msgspec.structs.replace(stretch, grow=stretch.grow[::-1]),
        lambda stretch: msgspec.structs.replace(stretch, grow=tuple(sorted(stretch.grow, key=lambda pair: pair[1]))),
        lambda stretch: msgspec.structs.replace(
            stretch, grow=tuple(sorted(stretch.grow, key=lambda pair: (pair[0], -pair[1])))
        ),
    ],
    ids=["backwards", "row by row", "rows backwards in each step"],
)
def test_growth_in_another_order_would_be_noticed(spoil: Callable[[DecodeStretch], DecodeStretch]) -> None:
    num_noticed = 0
    for seed in range(40):
        try:
            compare(seed, spoil)
        except AssertionError:
            num_noticed += 1
    assert num_noticed > 5


# -- how far the horizon reaches --------------------------------------------------------------------------------------


def running(*, num_requests: int = 2, prompt_len: int = 3, max_tokens: int = 50, **fields) -> Laps:
    """Requests that decode, the pipeline full of decode steps."""
    defaults = {"num_blocks": 200, "block_size": 4, "max_model_len": 400, "max_num_seqs": num_requests}
    config = SchedulerConfig(**(defaults | fields))
    laps = Laps(Script(config, []))
    for request_id in range(num_requests):
        laps.tell_scheduler(submit(request_id, [request_id] * prompt_len, max_tokens=max_tokens))
    laps.settle()
    laps.execute()
    laps.settle()
    return laps


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_reaches_to_the_step_that_samples_a_last_token(depth: int) -> None:
    laps = running(pipeline_depth=depth)
    # Planned so far: the prompt's step, which samples the first token, and `depth` decodes; the 50th is left.
    assert laps.scheduler.decode_horizon() == 50 - 1 - depth
    laps.skip(laps.scheduler.advance_decode(laps.scheduler.decode_horizon(), token_of))
    assert laps.scheduler.decode_horizon() == 0
    laps.settle()
    laps.run(None, lambda stretch: stretch)
    ends = [entry[1] for entry in laps.record if isinstance(entry, tuple)]
    assert [(end.reason, end.num_output_tokens) for end in ends] == [("length", 50)] * 2


def test_it_reaches_as_far_as_the_blocks_do() -> None:
    # 7 blocks of 4: two requests of 3 + 2 planned tokens hold 2 each; 3 more are 8 - 5 = 3 free slots, then a round of
    # two blocks for 4 steps each, then one block for two requests that want one each.
    laps = running(num_blocks=7, max_num_batched_tokens=64)
    assert laps.scheduler.stats().credit == 3
    assert laps.scheduler.decode_horizon() == 3 + 4
    stretch = laps.scheduler.advance_decode(7, token_of)
    assert stretch == DecodeStretch(
        Epoch(0), StepId(3), 7, (RequestId(0), RequestId(1)), ((3, RequestId(0)), (3, RequestId(1)))
    )


def test_it_is_nothing_while_somebody_may_be_admitted_or_blocks_are_owed() -> None:
    laps = running(max_num_seqs=3)
    assert laps.scheduler.decode_horizon() > 0
    laps.tell_scheduler(submit(7, [7] * 5))
    assert laps.scheduler.decode_horizon() == 0
    laps.settle()
    assert laps.scheduler.decode_horizon() == 0


def test_those_who_wait_for_a_seat_do_not_hold_it_up_unless_they_may_take_one() -> None:
    laps = running()
    laps.tell_scheduler(submit(7, [7] * 5))
    assert laps.scheduler.decode_horizon() > 0
    laps.tell_scheduler(submit(8, [8] * 5, priority=-1))
    assert laps.scheduler.decode_horizon() == 0


def test_it_is_nothing_when_rows_exceed_the_budget() -> None:
    laps = running(num_requests=3, prompt_len=1, max_num_batched_tokens=3)
    assert len(laps.steps[-1].request_ids) == 3
    assert laps.scheduler.decode_horizon() > 0
    laps = running(num_requests=4, prompt_len=1, max_num_batched_tokens=3, pipeline_depth=1)
    for _ in range(5):
        laps.execute()
        laps.settle()
        assert laps.scheduler.decode_horizon() == 0


def test_it_is_nothing_while_a_cancelled_request_is_on_its_way_out() -> None:
    laps = running()
    laps.tell_scheduler(CancelRequest(RequestId(1)))
    assert laps.scheduler.decode_horizon() == 0
    laps.execute()
    laps.settle()
    assert laps.scheduler.decode_horizon() == 0, "a step in flight still holds its row"
    laps.execute()
    laps.settle()
    assert laps.scheduler.decode_horizon() > 0


def test_a_step_in_flight_may_compute_prompts_if_each_row_samples_in_it() -> None:
    laps = running(max_num_seqs=3)
    laps.tell_scheduler(submit(7, [7] * 5, max_tokens=50))
    laps.settle()
    laps.execute()
    laps.settle()
    assert laps.scheduler.decode_horizon() == 0, "the first step in flight does not know the newcomer"
    laps.execute()
    laps.settle()
    assert laps.steps[0].start
    assert laps.scheduler.decode_horizon() > 0


def test_no_more_laps_are_skipped_than_the_horizon_allows() -> None:
    laps = running()
    with pytest.raises(AssertionError):
        laps.scheduler.advance_decode(laps.scheduler.decode_horizon() + 1, token_of)


def test_a_stretch_gives_each_request_its_tokens() -> None:
    laps = running()
    assert laps.scheduler.decode_horizon() > 10
    laps.skip(laps.scheduler.advance_decode(10, token_of))
    laps.tell_scheduler(CancelRequest(RequestId(1)))
    laps.settle()
    laps.execute()
    laps.settle()
    ((_, token_ids),) = next(plan.release for plan in laps.record if isinstance(plan, PlanStep) and plan.release)
    assert array("i", token_ids).tolist() == [1] * 3 + [token_of(RequestId(1))] * (len(token_ids) // 4 - 3)


# -- blocks ahead -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "expected"), [(200, [1, 4, 2]), (140, [1] * 7)], ids=["plenty", "not so many"])
@pytest.mark.parametrize("skips", [False, True])
def test_rows_take_four_blocks_at_once_where_there_are_plenty_and_no_more_than_they_fill(
    num_blocks: int, expected: list[int], skips: bool
) -> None:
    # 3 + 26 tokens, of which 28 are computed: 7 blocks of 4. Plenty is 50 + 100 + 8 of 200, and more than all of 140.
    laps = running(num_blocks=num_blocks, max_tokens=26)
    laps.run((lambda horizon: horizon) if skips else None, lambda stretch: stretch)
    for request_id in range(2):
        plans = [plan for plan in laps.record if isinstance(plan, PlanStep)]
        assert [count for plan in plans for row, count in plan.grow if row == request_id] == expected
    assert laps.num_skipped > 15 or not skips


def test_the_horizon_ends_while_there_are_plenty_of_blocks_however_many_rows_take_some() -> None:
    laps = running(num_blocks=170, max_tokens=200)
    state = laps.scheduler._state
    # 2 blocks each are taken, or 5 by a row that has grown: 166 to 160 are left, and 42 + 100 + 8 are plenty.
    assert 0 < laps.scheduler.decode_horizon() < 60
    while laps.scheduler.decode_horizon():
        laps.skip(laps.scheduler.advance_decode(laps.scheduler.decode_horizon(), token_of))
        assert state.credit >= state.num_blocks_plenty
        laps.settle()
