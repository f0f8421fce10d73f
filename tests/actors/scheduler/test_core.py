"""The scheduler's promises, seen through a ring of both cores."""

from __future__ import annotations

from array import array

import pytest
from core_ring import CoreRing, pack, reference_stream, submit

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks
from octavo.messages.request import CancelRequest, RequestEnded
from octavo.messages.step import PlanDue, PlanStep, StepExecuted
from octavo.messages.system import ExecutorLost


def make(**fields) -> CoreRing:
    defaults = {
        "num_blocks": 64,
        "block_size": 4,
        "max_model_len": 200,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
    }
    return CoreRing(SchedulerConfig(**(defaults | fields)), vocab=50)


def rows(plan: PlanStep) -> list[tuple[int, int]]:
    return list(zip(plan.request_ids, plan.num_tokens, strict=True))


def laps_until(ring: CoreRing, done, limit: int = 500) -> int:
    for lap in range(limit):
        if done():
            return lap
        ring.lap()
    raise AssertionError(f"not within {limit} laps: {ring.scheduler.stats()}")


# -- the account ------------------------------------------------------------------------------------------------------


def test_only_what_came_to_its_own_end_counts_as_completed() -> None:
    ring = make()
    ring.submit(submit(1, [5, 6], max_tokens=2))
    ring.submit(submit(2, [5, 7], max_tokens=50))
    ring.submit(submit(3, [5] * 500))
    ring.submit(submit(4, [5, 8], max_tokens=2))
    laps_until(ring, lambda: RequestId(1) in ring.ended and RequestId(4) in ring.ended)
    ring.cancel(2)
    ring.run()
    stats = ring.scheduler.stats()
    assert {int(key): ended.reason for key, ended in ring.ended.items()} == {
        1: "length",
        2: "abort",
        3: "refused",
        4: "length",
    }
    assert (stats.num_completed, stats.num_ended, stats.num_refused) == (2, 3, 1)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "max_model_len", "longest"), [(64, 20, 19), (4, 200, 15)])
def test_a_prompt_that_can_never_fit_is_refused_at_once_with_the_numbers(
    num_blocks: int, max_model_len: int, longest: int
) -> None:
    ring = make(num_blocks=num_blocks, max_model_len=max_model_len)
    ring.submit(submit(1, [5] * (longest + 1)))
    ring.submit(submit(2, [5] * longest))
    ring.deliver("submit")
    ended = ring.ended[RequestId(1)]
    assert (ended.reason, ended.error_code) == ("refused", "context_length_exceeded")
    for number in (longest + 1, longest, max_model_len, num_blocks, num_blocks * 4):
        assert str(number) in ended.error
    ring.run()
    assert ring.ended[RequestId(2)].reason == "length"
    assert ring.ended[RequestId(2)].num_output_tokens == 1


def test_a_full_queue_refuses_and_serves_those_it_took() -> None:
    ring = make(max_num_queued_requests=3, max_num_seqs=2)
    for request_id in range(2):
        ring.submit(submit(request_id, [1, 2, 3], max_tokens=50))
    for _ in range(3):
        ring.lap()
    assert ring.scheduler.stats().num_running == 2
    for request_id in range(2, 7):
        ring.submit(submit(request_id, [1, 2, 3]))
        ring.deliver("submit")
    ring.run()
    assert [ring.ended[RequestId(i)].error_code for i in range(7)] == [""] * 5 + ["queue_full"] * 2


def test_a_burst_into_free_seats_does_not_count_as_a_queue() -> None:
    ring = make(max_num_queued_requests=1, max_num_seqs=4)
    for request_id in range(7):
        ring.submit(submit(request_id, [1, 2, 3]))
        ring.deliver("submit")
    ring.run()
    assert [ring.ended[RequestId(i)].error_code for i in range(7)] == [""] * 5 + ["queue_full"] * 2


def test_a_queue_full_of_tokens_refuses_but_an_empty_one_never_does() -> None:
    ring = make(max_num_queued_tokens=10)
    for request_id in range(2):
        ring.submit(submit(request_id, [1] * 12))
        ring.deliver("submit")
    ring.run()
    assert [ring.ended[RequestId(i)].error_code for i in range(2)] == ["", "queue_full"]


def test_a_draining_scheduler_finishes_what_it_accepted_and_refuses_the_rest() -> None:
    ring = make()
    ring.submit(submit(1, [1, 2, 3]))
    ring.drain()
    ring.submit(submit(2, [1, 2, 3]))
    ring.run()
    assert ring.ended[RequestId(1)].reason == "length"
    assert ring.ended[RequestId(2)].error_code == "engine_closed"
    assert ring.scheduler.num_requests == 0


def test_an_empty_prompt_is_refused() -> None:
    ring = make()
    ring.submit(submit(1, []))
    ring.run()
    assert ring.ended[RequestId(1)].error_code == "invalid_request"


@pytest.mark.parametrize(
    "fields", [{"num_blocks": 0}, {"max_model_len": 1}, {"pipeline_depth": 0}, {"priority_aging_ns": -1}]
)
def test_a_config_out_of_range_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SchedulerConfig(**({"num_blocks": 4, "block_size": 4, "max_model_len": 8} | fields))


# -- admission --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_prompt_blocks", "is_admitted"), [(2, True), (3, False)])
def test_blocks_are_kept_back_for_those_who_grow(num_prompt_blocks: int, is_admitted: bool) -> None:
    ring = make(num_blocks=16, max_num_batched_tokens=64)
    for request_id in range(4):
        ring.submit(submit(request_id, [request_id] * 8, max_tokens=12))
    laps_until(ring, lambda: len(ring.plans) == 2)
    assert ring.scheduler.stats().credit == 4, "each of the four has two blocks of prompt and one of outputs"
    ring.submit(submit(9, [9] * 4 * num_prompt_blocks, max_tokens=1))
    ring.deliver("submit")
    ring.plan()
    assert (ring.scheduler.stats().num_waiting == 0) == is_admitted, "two blocks stay for four who grow"
    ring.run()


def test_nothing_is_kept_back_when_nobody_grows() -> None:
    ring = make(num_blocks=200, max_model_len=800, max_num_batched_tokens=800)
    ring.submit(submit(1, [1] * 799))
    ring.run()
    assert ring.ended[RequestId(1)].reason == "length"


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_beside_decodes_which_go_first() -> None:
    ring = make(pipeline_depth=1)
    ring.submit(submit(1, [1, 2, 3], max_tokens=30))
    laps_until(ring, lambda: len(ring.plans) >= 2)
    ring.submit(submit(2, [9] * 40, max_tokens=3))
    laps_until(ring, lambda: len(ring.plans) >= 7)
    mixed = [rows(plan) for plan in ring.plans if 2 in plan.request_ids]
    assert mixed[:4] == [[(1, 1), (2, 15)], [(1, 1), (2, 15)], [(1, 1), (2, 10)], [(1, 1), (2, 1)]]
    assert ring.plans[3].computed_prompt_tokens in {((2, 15),), ((2, 30),)}
    ring.run()


def test_a_long_prompt_leaves_room_for_short_ones_under_a_threshold() -> None:
    ring = make(long_prefill_threshold=6)
    ring.submit(submit(1, [9] * 60, max_tokens=1))
    ring.submit(submit(2, [8] * 5, max_tokens=1))
    laps_until(ring, lambda: bool(ring.plans))
    assert rows(ring.plans[0]) == [(1, 6), (2, 5)]
    ring.run()


def test_two_steps_are_in_flight_and_none_computes_past_the_end() -> None:
    ring = make(num_blocks=64)
    ring.submit(submit(1, [1, 2, 3], max_tokens=6))
    ring.deliver("submit")
    ring.plan()
    ring.deliver("to_allocator")
    ring.deliver("from_allocator")
    ring.plan()
    assert ring.scheduler.stats().num_steps_in_flight == 2
    ring.run()
    # Prompt, then five decodes: the sixth token needs no row of its own.
    assert sum(len(plan.request_ids) for plan in ring.plans) == 6
    assert ring.ended[RequestId(1)].num_output_tokens == 6


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stop_token_costs_at_most_one_wasted_row_per_further_step_in_flight(depth: int) -> None:
    ring = make(pipeline_depth=depth)
    ring.vocab = ring.executor.vocab = 4
    request = submit(1, [1, 2, 3], max_tokens=100, eos=True)
    expected, reason = reference_stream(request, 200, 4)
    assert reason == "stop"
    ring.submit(request)
    ring.run()
    num_rows = sum(len(plan.request_ids) for plan in ring.plans)
    assert len(expected) <= num_rows <= len(expected) + depth - 1
    ended = ring.ended[RequestId(1)]
    assert (ended.reason, ended.stop_token_id, ended.num_output_tokens) == ("stop", 0, len(expected))


def test_no_step_is_planned_without_being_asked() -> None:
    scheduler = SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32))
    assert scheduler.handle(submit(1, [1, 2, 3]), 1) == []
    (match,) = scheduler.handle(PlanDue(), 1)
    assert isinstance(match, MatchPrefix)
    assert scheduler.handle(PrefixMatched(Epoch(0), RequestId(1), 0, 0), 1) == []
    plans = scheduler.handle(PlanDue(), 1)
    assert [type(plan) for plan in plans] == [PlanStep, PlanStep]


def test_the_plan_of_a_decode_does_not_grow_with_context() -> None:
    import msgspec

    sizes = []
    for length in (16, 1600):
        ring = make(num_blocks=1000, max_model_len=3000, max_num_batched_tokens=2000)
        ring.submit(submit(1, [7] * length, max_tokens=5))
        laps_until(ring, lambda ring=ring: len(ring.plans) >= 3)
        sizes.append(len(msgspec.msgpack.encode(ring.plans[2])))
    assert sizes[0] == sizes[1]


# -- prefixes and siblings --------------------------------------------------------------------------------------------


def test_a_burst_with_a_common_prefix_computes_it_once_per_step_not_once_per_request() -> None:
    ring = make(num_blocks=400, max_num_batched_tokens=64, max_num_seqs=20)
    prefix = list(range(60))
    for request_id in range(20):
        ring.submit(submit(request_id, [*prefix, request_id], max_tokens=2))
        ring.deliver("submit")
    ring.run()
    assert ring.executor.num_computed_tokens < 20 * 61 // 3
    assert ring.scheduler.stats().prefix_cache_hits >= 15 * 60


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_wait_for_their_leaders_prompt_and_share_its_blocks(caching: bool) -> None:
    ring = make(enable_prefix_caching=caching, max_num_batched_tokens=16)
    prompt = list(range(33))
    for request_id in range(4):
        fork = {"fork_of": RequestId(0)} if request_id else {}
        ring.submit(submit(request_id, prompt, seed=request_id, max_tokens=6, **fork))
    laps_until(ring, lambda: ring.scheduler.stats().num_running == 4)
    laps_until(ring, lambda: len(ring.executor.rows) == 4)
    # 8 full blocks shared, one or two of its own for each.
    assert ring.allocator.stats().num_held <= 8 + 4 * 2
    ring.run()
    assert ring.executor.num_computed_tokens < 33 + 4 * 8


def test_a_sibling_goes_on_without_its_leader() -> None:
    ring = make()
    ring.submit(submit(0, list(range(33))))
    ring.submit(submit(1, list(range(33)), fork_of=RequestId(0)))
    ring.cancel(0)
    ring.run()
    assert ring.ended[RequestId(1)].reason == "length"


def test_prompt_logprobs_skip_the_cache() -> None:
    ring = make()
    ring.submit(submit(0, list(range(13)), max_tokens=1))
    laps_until(ring, lambda: 0 in ring.ended)
    ring.submit(submit(1, list(range(13)), max_tokens=1, prompt_logprobs=0))
    ring.submit(submit(2, list(range(13)), max_tokens=1))
    ring.run()
    assert ring.ended[RequestId(1)].num_cached_tokens == 0
    assert ring.ended[RequestId(2)].num_cached_tokens == 12


# -- ends -------------------------------------------------------------------------------------------------------------


def test_a_cancel_frees_blocks_with_the_next_plan_though_nothing_else_runs() -> None:
    ring = make(pipeline_depth=1)
    ring.submit(submit(1, list(range(9)), max_tokens=100))
    laps_until(ring, lambda: len(ring.plans) == 3)
    ring.cancel(1)
    ring.lap()
    assert ring.ended[RequestId(1)].reason == "abort"
    assert ring.plans[-1].release
    assert ring.plans[-1].request_ids == ()
    assert ring.allocator.stats().num_held == 0
    ring.run()


@pytest.mark.parametrize("num_laps", range(6))
def test_a_cancel_ends_a_request_in_any_state(num_laps: int) -> None:
    ring = make()
    ring.submit(submit(1, list(range(9)), max_tokens=50))
    ring.submit(submit(2, list(range(9)), max_tokens=50, fork_of=RequestId(1)))
    for _ in range(num_laps):
        ring.step_randomly()
    ring.cancel(1)
    ring.cancel(2)
    ring.run()
    assert {ended.reason for ended in ring.ended.values()} == {"abort"}


def test_a_cancel_while_matching_settles_the_account_when_the_answer_comes() -> None:
    scheduler = SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32))
    scheduler.handle(submit(1, list(range(10))), 1)
    scheduler.handle(PlanDue(), 1)
    release, ended = scheduler.handle(CancelRequest(RequestId(1)), 1)
    assert isinstance(ended, RequestEnded)
    assert isinstance(release, ReleaseMatch)
    scheduler.handle(PrefixMatched(Epoch(0), RequestId(1), 8, 2), 1)
    assert scheduler.stats().credit == 6
    scheduler.handle(BlocksFreed(Epoch(0), 2, 2, 1), 1)
    assert scheduler.stats().credit == 8


def test_a_passed_deadline_aborts_and_the_next_one_is_announced() -> None:
    ring = make()
    ring.submit(submit(1, [1, 2, 3], max_tokens=150, deadline_ns=1000))
    ring.submit(submit(2, [1, 2, 3], max_tokens=5, deadline_ns=5000))
    for _ in range(4):
        ring.lap()
    assert ring.scheduler.next_deadline_ns == 1000
    ring.now_ns = 1000
    ring.plan()
    assert ring.ended[RequestId(1)].reason == "abort"
    assert 1 <= ring.ended[RequestId(1)].num_output_tokens < 150
    assert ring.scheduler.next_deadline_ns == 5000
    ring.run()


def test_a_failed_row_ends_its_request_alone_and_its_blocks_are_forgotten() -> None:
    ring = make()
    ring.submit(submit(1, list(range(20)), max_tokens=10))
    ring.submit(submit(2, list(range(30, 50)), max_tokens=10))
    ring.fail_row(1)
    ring.run()
    ended = ring.ended[RequestId(1)]
    assert (ended.reason, ended.error_code, ended.error) == ("error", "request_failed", "not a number")
    assert ring.ended[RequestId(2)].reason == "length"
    ring.submit(submit(3, list(range(20)), max_tokens=1))
    ring.run()
    assert ring.ended[RequestId(3)].num_cached_tokens == 0


def test_a_request_taken_up_again_goes_on_where_it_was() -> None:
    request = submit(1, [1, 2, 3], max_tokens=9)
    expected, _ = reference_stream(request, 200, 50)
    ring = make()
    ring.submit(submit(1, [1, 2, 3], max_tokens=9, output=tuple(expected[:4])))
    ring.submit(submit(2, [1, 2, 3], max_tokens=9, output=tuple(expected)))
    ring.run()
    assert ring.ended[RequestId(1)].num_output_tokens == 9
    assert (ring.ended[RequestId(2)].reason, ring.ended[RequestId(2)].num_output_tokens) == ("length", 9)
    assert sum(len(plan.request_ids) for plan in ring.plans) == 5


# -- order and preemption ---------------------------------------------------------------------------------------------


def test_preemption_in_a_tiny_pool_changes_no_token() -> None:
    ring = make(num_blocks=12, max_num_seqs=4, max_num_batched_tokens=64, enable_prefix_caching=False)
    for request_id in range(4):
        ring.submit(submit(request_id, [request_id] * 9, max_tokens=30, arrival_ns=request_id))
    ring.run()
    assert ring.scheduler.stats().num_preemptions > 0
    assert ring.ended[RequestId(0)].num_preemptions == 0, "the first to arrive is never the victim"
    assert max(ended.num_preemptions for ended in ring.ended.values()) > 0


def test_a_prompt_that_came_last_gives_way_to_a_row_that_grows() -> None:
    ring = make(num_blocks=12, max_num_batched_tokens=4, pipeline_depth=1)
    ring.submit(submit(1, [1, 2, 3], max_tokens=30, arrival_ns=1))
    laps_until(ring, lambda: len(ring.plans) == 3)
    ring.submit(submit(2, list(range(40)), max_tokens=1, arrival_ns=2))
    laps_until(ring, lambda: ring.scheduler.stats().num_preemptions == 1)
    assert ring.scheduler.stats().prompt_tokens < 3 + 40, "its prompt was not computed yet"
    preempted_ns = ring.now_ns
    ring.now_ns += 1000
    ring.run()
    assert ring.ended[RequestId(2)].first_scheduled_ns <= preempted_ns, "it was scheduled first before that"
    assert (ring.ended[RequestId(1)].num_preemptions, ring.ended[RequestId(2)].num_preemptions) == (0, 1)


def test_an_urgent_request_is_admitted_within_one_step_of_a_full_batch() -> None:
    ring = make(max_num_seqs=2, pipeline_depth=2, num_blocks=200)
    for request_id in range(4):
        ring.submit(submit(request_id, [request_id] * 5, max_tokens=100, arrival_ns=request_id))
    for _ in range(5):
        ring.lap()
    assert ring.scheduler.stats().num_running == 2
    num_before = len(ring.plans)
    ring.submit(submit(9, [9] * 5, max_tokens=2, priority=-1, arrival_ns=10))
    ring.lap()
    assert 9 in {start.request_id for plan in ring.plans[num_before:] for start in plan.start}
    ring.run()
    assert ring.ended[RequestId(1)].num_preemptions == 1
    assert ring.ended[RequestId(0)].num_preemptions == 0


def test_an_urgent_prompt_passes_a_long_one_that_is_partly_computed() -> None:
    ring = make(pipeline_depth=1)
    ring.submit(submit(1, list(range(150)), max_tokens=1))
    for _ in range(2):
        ring.lap()
    ring.submit(submit(9, [9] * 5, max_tokens=1, priority=-1, arrival_ns=10))
    ring.lap()  # the device is idle, so the first plan does not wait for the match
    ring.lap()
    assert rows(ring.plans[-1]) == [(9, 5), (1, 11)]
    ring.run()


def test_only_a_worse_priority_is_preempted_not_a_later_arrival() -> None:
    ring = make(max_num_seqs=2, priority_aging_ns=0)
    ring.submit(submit(1, [1] * 5, max_tokens=50, priority=1, arrival_ns=50))
    ring.submit(submit(2, [2] * 5, max_tokens=50, arrival_ns=100))
    for _ in range(4):
        ring.lap()
    ring.submit(submit(3, [3] * 5, max_tokens=50, arrival_ns=10))
    ring.run()
    assert [ring.ended[RequestId(i)].num_preemptions for i in (1, 2, 3)] == [1, 0, 0]


def test_the_worst_request_waits_for_a_block_rather_than_give_up_its_own() -> None:
    ring = make(num_blocks=2, block_size=16)
    ring.submit(submit(1, [1], max_tokens=14, arrival_ns=1))
    ring.submit(submit(2, [2] * 15, max_tokens=10, arrival_ns=2))
    ring.run()
    assert ring.scheduler.stats().num_preemptions == 0
    assert list(ring.ended) == [1, 2]


def test_a_request_of_the_same_priority_preempts_nobody_to_be_admitted() -> None:
    ring = make(max_num_seqs=1)
    ring.submit(submit(1, [1] * 5, max_tokens=50, arrival_ns=100))
    for _ in range(5):
        ring.lap()
    ring.submit(submit(2, [2] * 5, max_tokens=5, arrival_ns=1))
    ring.run()
    assert ring.scheduler.stats().num_preemptions == 0


def test_a_level_of_priority_is_worth_a_fixed_waiting_time() -> None:
    ring = make(max_num_seqs=1, priority_aging_ns=1000)
    ring.submit(submit(0, [1] * 5, max_tokens=20, priority=-5, arrival_ns=1))
    for _ in range(3):
        ring.lap()
    ring.submit(submit(1, [1] * 5, priority=1, arrival_ns=10))
    ring.submit(submit(2, [1] * 5, priority=0, arrival_ns=900))
    ring.submit(submit(3, [1] * 5, priority=0, arrival_ns=1100))
    ring.run()
    assert list(ring.ended) == [0, 2, 1, 3]


def test_a_stream_of_urgent_requests_does_not_starve_a_patient_one() -> None:
    ring = make(max_num_seqs=1, priority_aging_ns=2000, num_blocks=200)
    ring.submit(submit(0, [1] * 5, priority=1, arrival_ns=1, max_tokens=2))
    for request_id in range(1, 60):
        ring.submit(submit(request_id, [request_id] * 5, priority=0, arrival_ns=request_id * 100, max_tokens=2))
    ring.run()
    assert list(ring.ended).index(RequestId(0)) <= 22


def test_a_large_request_at_the_head_is_not_passed_for_ever_by_small_ones() -> None:
    ring = make(num_blocks=12, enable_prefix_caching=False)
    ring.submit(submit(0, [1] * 20, max_tokens=20, arrival_ns=0))
    for _ in range(3):
        ring.lap()
    ring.submit(submit(1, [2] * 40, max_tokens=2, arrival_ns=1))
    for request_id in range(2, 12):
        ring.submit(submit(request_id, [3] * 3, max_tokens=3, arrival_ns=request_id))
    ring.run()
    assert list(ring.ended)[:2] == [0, 1]


# -- loss of the executor ---------------------------------------------------------------------------------------------


def test_after_a_loss_every_request_goes_on_with_the_tokens_it_would_have_had() -> None:
    ring = make()
    for request_id in range(6):
        ring.submit(submit(request_id, [request_id] * 7, max_tokens=20))
    for _ in range(8):
        ring.lap()
    ring.lose_executor()
    ring.run()
    assert {ended.reason for ended in ring.ended.values()} == {"length"}
    assert ring.scheduler.stats().num_executor_losses == 1


def test_a_loss_resets_blocks_under_the_new_epoch_and_drops_the_old_ones_messages() -> None:
    scheduler = SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32))
    scheduler.handle(submit(1, [1, 2, 3]), 1)
    scheduler.handle(PlanDue(), 1)
    assert scheduler.handle(ExecutorLost(Epoch(1)), 1) == [ResetBlocks(Epoch(1))]
    assert scheduler.handle(PrefixMatched(Epoch(0), RequestId(1), 0, 0), 1) == []
    assert scheduler.handle(StepExecuted(Epoch(0), StepId(0), (), ()), 1) == []
    assert scheduler.handle(BlocksFreed(Epoch(0), 3, 0, 1), 1) == []
    assert scheduler.handle(ExecutorLost(Epoch(1)), 1) == []
    assert scheduler.stats().num_dropped_messages == 4
    assert scheduler.stats().credit == 8
    (match,) = scheduler.handle(PlanDue(), 1)
    assert match.epoch == 1


@pytest.mark.parametrize("poison", [0, 3, 7])
def test_a_request_that_kills_the_executor_is_found_and_the_others_finish(poison: int) -> None:
    ring = make(max_num_batched_tokens=200)
    for request_id in range(8):
        ring.submit(submit(request_id, [request_id] * 7, max_tokens=6, arrival_ns=request_id))
    num_losses = 0
    for _ in range(5000):
        head = ring.edges["to_executor"][0] if ring.edges["to_executor"] else None
        if head is not None and head.epoch == ring.epoch and poison in head.request_ids:
            ring.lose_executor()
            num_losses += 1
        if not ring.step_randomly():
            break
    ring.check_quiet()
    assert ring.ended[RequestId(poison)].error_code == "request_quarantined"
    assert {ended.reason for request_id, ended in ring.ended.items() if request_id != poison} == {"length"}
    assert num_losses <= 8


def test_losses_between_which_a_request_gains_tokens_are_not_held_against_it() -> None:
    ring = make(pipeline_depth=1)
    ring.submit(submit(1, [1, 2, 3], max_tokens=40))
    while 1 not in ring.ended:
        num_known = len(ring.executor.streams[RequestId(1)])
        laps_until(ring, lambda n=num_known: len(ring.executor.streams[RequestId(1)]) > n + 1 or 1 in ring.ended)
        ring.plan()  # so that it is in flight
        ring.lose_executor()
    ring.run()
    assert ring.ended[RequestId(1)].reason == "length"
    assert ring.scheduler.stats().num_executor_losses > 10


@pytest.mark.parametrize("is_innocent", [True, False])
def test_losses_that_no_request_can_cause_convict_none(is_innocent: bool) -> None:
    scheduler = SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32))
    scheduler.handle(submit(1, [1, 2, 3]), 1)
    said: list[Message] = []
    for number in range(1, 20):
        for message in scheduler.handle(PlanDue(), number):
            if isinstance(message, MatchPrefix):
                scheduler.handle(PrefixMatched(message.epoch, message.request_id, 0, 0), number)
                scheduler.handle(PlanDue(), number)  # it is in flight
        said += scheduler.handle(ExecutorLost(Epoch(number), "stopped", is_innocent), number)
    assert any(isinstance(message, RequestEnded) for message in said) is not is_innocent
    assert scheduler.stats().num_executor_losses == 19


def test_one_that_was_preempted_in_a_step_that_is_lost_waits_for_it_no_more() -> None:
    num_cases = 0
    for num_tokens in range(3, 9):
        ring = make(num_blocks=6, max_num_seqs=2, max_num_batched_tokens=64, enable_prefix_caching=False)
        for request_id in (1, 2):
            ring.submit(submit(request_id, [request_id] * num_tokens, max_tokens=12, arrival_ns=request_id))
        for _ in range(50):
            ring.plan()
            if ring.scheduler.stats().num_preemptions:
                break
            ring.lap()
        state = ring.scheduler._state
        victim = state.sequences[RequestId(2)]
        num_cases += victim.last_step_id > state.last_executed_step_id
        ring.lose_executor()
        ring.cancel(1)  # nobody else's steps follow
        ring.run()
        assert ring.ended[RequestId(2)].reason == "length"
    assert num_cases > 1


def test_nobody_is_woken_for_a_deadline_that_has_passed() -> None:
    ring = make()
    for request_id, deadline_ns in ((1, 50), (2, 20), (3, 0)):
        ring.submit(submit(request_id, [1, 2, 3], max_tokens=100, deadline_ns=deadline_ns))
        ring.deliver("submit")
    found = []
    for now_ns in (10, 20, 30, 50, 60):
        ring.now_ns = now_ns
        ring.plan()
        found.append((len(ring.ended), ring.scheduler.next_deadline_ns))
    assert found == [(0, 20), (1, 50), (1, 50), (2, 0), (2, 0)]
    ring.run()


# -- reading ----------------------------------------------------------------------------------------------------------


def test_reading_stats_changes_nothing() -> None:
    ring = make()
    ring.submit(submit(1, [1, 2, 3]))
    for _ in range(3):
        ring.lap()
    assert ring.scheduler.stats() == ring.scheduler.stats()
    assert ring.allocator.stats() == ring.allocator.stats()


def test_the_same_messages_give_the_same_decisions() -> None:
    def decide() -> list[PlanStep]:
        ring = make(num_blocks=14, max_num_seqs=4)
        for request_id in range(8):
            ring.submit(submit(request_id, [request_id % 3] * 9, max_tokens=20))
        ring.run()
        return ring.plans

    assert decide() == decide()


def test_release_holds_no_token_whose_row_may_still_fail() -> None:
    ring = make(pipeline_depth=2)
    ring.submit(submit(1, [1, 2, 3], max_tokens=50))
    laps_until(ring, lambda: len(ring.executor.streams[RequestId(1)]) == 6)
    ring.plan()
    assert ring.scheduler.stats().num_steps_in_flight == 2, "the first computes the newest token"
    ring.cancel(1)
    ring.deliver("submit")
    ring.plan()
    known = [1, 2, 3, *(ring.executor.streams[RequestId(1)][position] for position in range(6))]
    ring.run()
    ((_, released),) = next(plan.release for plan in ring.plans if plan.release)
    assert released == pack(known[:-1])


def test_release_carries_exactly_the_tokens_whose_kv_is_computed() -> None:
    ring = make(pipeline_depth=1)
    request = submit(1, [1, 2, 3], max_tokens=6)
    ring.submit(request)
    ring.run()
    released = [token_ids for plan in ring.plans for _, token_ids in plan.release]
    expected, _ = reference_stream(request, 200, 50)
    assert released == [pack([1, 2, 3, *expected[:-1]])]
    assert len(array("i", released[0])) == 8
