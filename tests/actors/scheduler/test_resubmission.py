"""A request that is taken up again is the recipe as it was (F-21)."""

from __future__ import annotations

import pytest
from core_ring import STOP_TOKEN, CoreRing, reference_stream, submit
from msgspec.structs import replace

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.ids import Epoch
from octavo.messages.kv import MatchPrefix, PrefixMatched
from octavo.messages.request import RequestEnded, SubmitRequest
from octavo.messages.step import PlanDue
from octavo.messages.system import Drain, ExecutorLost

CONFIG = SchedulerConfig(num_blocks=64, block_size=4, max_model_len=40, max_num_queued_requests=1, max_num_seqs=1)


def again(request: SubmitRequest) -> SubmitRequest:
    return replace(request, is_taken_up_again=True)


def end_of(request: SubmitRequest, config: SchedulerConfig = CONFIG, now_ns: int = 1) -> RequestEnded:
    (ended,) = SchedulerCore(config).handle(request, now_ns)
    assert isinstance(ended, RequestEnded)
    return ended


def test_one_that_has_all_its_tokens_ends_by_length_at_once() -> None:
    ended = end_of(again(submit(1, [1, 2], max_tokens=3, output=(4, 5, 6))))
    assert (ended.reason, ended.num_output_tokens, ended.stop_token_id) == ("length", 3, -1)


@pytest.mark.parametrize(("min_tokens", "reason"), [(0, "stop"), (3, "stop"), (4, "")])
def test_one_whose_last_token_stops_it_ends_at_once(min_tokens: int, reason: str) -> None:
    request = again(submit(1, [1, 2], max_tokens=9, eos=True, output=(4, 5, STOP_TOKEN), min_tokens=min_tokens))
    if not reason:
        assert SchedulerCore(CONFIG).handle(request, 1) == []
        return
    ended = end_of(request)
    assert (ended.reason, ended.num_output_tokens, ended.stop_token_id) == ("stop", 3, STOP_TOKEN)


def test_a_stop_token_as_last_allowed_token_is_a_stop_as_it_would_have_been() -> None:
    assert end_of(again(submit(1, [1, 2], max_tokens=2, eos=True, output=(4, STOP_TOKEN)))).reason == "stop"


def test_a_stop_token_id_of_the_request_counts_too() -> None:
    request = submit(1, [1, 2], max_tokens=9, output=(4, 33))
    request = again(replace(request, params=replace(request.params, stop_token_ids=(33,))))
    assert end_of(request).stop_token_id == 33


def test_a_stop_token_at_the_end_of_a_prompt_stops_nothing() -> None:
    assert SchedulerCore(CONFIG).handle(again(submit(1, [1, STOP_TOKEN], eos=True)), 1) == []


def test_one_whose_deadline_has_passed_is_aborted_with_its_tokens() -> None:
    ended = end_of(again(submit(1, [1, 2], max_tokens=9, output=(4, 5), deadline_ns=10)), now_ns=10)
    assert (ended.reason, ended.num_output_tokens) == ("abort", 2)


def test_what_was_accepted_before_is_not_refused_by_a_full_queue_or_a_drain() -> None:
    scheduler = SchedulerCore(CONFIG)
    scheduler.handle(Drain(), 1)
    for request_id in range(5):
        assert scheduler.handle(again(submit(request_id, [1, 2])), 1) == []
    assert scheduler.live_request_ids() == [0, 1, 2, 3, 4]
    assert scheduler.stats().num_resumed == 5
    (refused,) = scheduler.handle(submit(7, [1, 2]), 1)
    assert isinstance(refused, RequestEnded)
    assert refused.error_code == "engine_closed"


@pytest.mark.parametrize("num_known", [0, 1, 5, 8])
@pytest.mark.parametrize("fork_of", [-1, 0, 77])
def test_it_goes_on_as_if_nothing_had_happened(num_known: int, fork_of: int) -> None:
    config = replace(CONFIG, max_num_seqs=4)
    fields = {"max_tokens": 9, "min_tokens": 4, "eos": True, "seed": 3}
    plain = submit(1, [1, 2, 3], **fields)
    expected, reason = reference_stream(plain, config.max_sequence_len, 50)
    assert len(expected) > num_known or reason == "stop"
    ring = CoreRing(config, vocab=50)
    ring.submit(submit(0, [1, 2, 3], **fields))
    ring.submit(again(submit(1, [1, 2, 3], output=tuple(expected[:num_known]), fork_of=fork_of, **fields)))
    ring.run()
    assert ring.ended[1].reason == reason
    assert ring.ended[1].num_output_tokens == len(expected)


@pytest.mark.parametrize("prompt_logprobs", [None, 2])
def test_its_outputs_are_taken_from_the_cache_and_count_as_none_of_the_prompt(prompt_logprobs: int | None) -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    ring = CoreRing(CONFIG, vocab=50)
    ring.submit(submit(0, prompt, max_tokens=20))
    ring.run()
    known = tuple(ring.executor.streams[0][position] for position in range(18))
    ring.submit(again(submit(1, prompt, max_tokens=20, output=known, prompt_logprobs=prompt_logprobs)))
    ring.run()
    # The prompt's log-probabilities were reported before: 6 + 18 tokens are 6 blocks, the last of which is computed.
    assert ring.scheduler.stats().prefix_cache_hits == 20
    assert ring.ended[1].num_cached_tokens == len(prompt)
    ring.submit(submit(2, prompt, prompt_logprobs=2))
    ring.run()
    assert ring.ended[2].num_cached_tokens == 0, "log-probabilities of a prompt are computed, not found"


@pytest.mark.parametrize("num_losses", [0, 1, 2])
def test_losses_at_the_replica_where_it_was_before_count(num_losses: int) -> None:
    scheduler = SchedulerCore(CONFIG)
    scheduler.handle(replace(again(submit(1, [1, 2], max_tokens=9, output=(4,))), num_losses=num_losses), 1)
    num_deaths = 0
    ended: list[RequestEnded] = []
    while not ended:
        for message in scheduler.handle(PlanDue(), 1):
            if isinstance(message, MatchPrefix):
                scheduler.handle(PrefixMatched(message.epoch, message.request_id, 0, 0), 1)
                scheduler.handle(PlanDue(), 1)  # it is in flight
        num_deaths += 1
        said = scheduler.handle(ExecutorLost(Epoch(num_deaths), "died"), 1)
        ended = [message for message in said if isinstance(message, RequestEnded)]
    assert num_deaths == 3 - num_losses
    assert ended[0].error_code == "request_quarantined"
