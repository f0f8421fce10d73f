"""Requests that kill executors are remembered."""

from __future__ import annotations

import pytest
from core_ring import pack, submit
from msgspec.structs import replace

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.actors.scheduler.quarantine import MAX_REMEMBERED, PERIOD_NS, Quarantine
from octavo.messages.ids import RequestId
from octavo.messages.request import RequestEnded, SubmitRequest

POISON = submit(1, [1, 2, 3], max_tokens=8, seed=5)


def with_params(**fields) -> SubmitRequest:
    return replace(POISON, params=replace(POISON.params, **fields))


@pytest.mark.parametrize(
    "other",
    [
        POISON,
        replace(POISON, request_id=RequestId(9), arrival_ns=77, priority=3, deadline_ns=5),
        with_params(seed=6),
        with_params(max_tokens=1, min_tokens=1, stop=("x",), stop_token_ids=(4,), ignore_eos=True, n=3),
    ],
)
def test_the_same_request_is_known_however_long_it_goes_on_and_whatever_its_seed(other: SubmitRequest) -> None:
    quarantine = Quarantine()
    quarantine.add(POISON, 0)
    assert quarantine.holds(other, 1)


@pytest.mark.parametrize(
    "other",
    [
        replace(POISON, prompt_token_ids=pack([1, 2, 4])),
        replace(POISON, cache_salt="a"),
        with_params(temperature=0.5),
        with_params(logit_bias={3: 1.0}),
        with_params(allowed_token_ids=(1,)),
        with_params(logprobs=2),
        with_params(prompt_logprobs=2),
        with_params(frequency_penalty=0.5),
    ],
)
def test_another_prompt_salt_or_way_of_sampling_is_another_request(other: SubmitRequest) -> None:
    quarantine = Quarantine()
    quarantine.add(POISON, 0)
    assert not quarantine.holds(other, 1)


def test_what_was_found_earlier_and_told_later_is_forgotten_no_later() -> None:
    quarantine = Quarantine()
    quarantine.add(with_params(temperature=0.5), 1000)
    quarantine.remember(Quarantine().add(POISON, 7))
    assert quarantine.holds(POISON, 7 + PERIOD_NS - 1)
    assert not quarantine.holds(POISON, 7 + PERIOD_NS)


def test_it_is_forgotten_after_ten_minutes() -> None:
    quarantine = Quarantine()
    quarantine.add(POISON, 7)
    assert quarantine.holds(POISON, 7 + PERIOD_NS - 1)
    assert not quarantine.holds(POISON, 7 + PERIOD_NS)
    assert PERIOD_NS == 600_000_000_000
    assert len(quarantine) == 0


def test_only_so_many_are_remembered() -> None:
    quarantine = Quarantine()
    requests = [submit(i, [i]) for i in range(MAX_REMEMBERED + 1)]
    for request in requests:
        quarantine.add(request, 0)
    assert len(quarantine) == MAX_REMEMBERED
    assert not quarantine.holds(requests[0], 1)
    assert quarantine.holds(requests[1], 1)


def test_a_known_poison_is_refused_and_others_are_not() -> None:
    quarantine = Quarantine()
    quarantine.add(POISON, 0)
    scheduler = SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=16), quarantine=quarantine)
    (refused,) = scheduler.handle(replace(POISON, request_id=RequestId(2)), 1)
    assert isinstance(refused, RequestEnded)
    assert (refused.reason, refused.error_code) == ("refused", "request_quarantined")
    assert scheduler.handle(submit(3, [4, 5, 6]), 1) == []
    assert scheduler.handle(replace(POISON, request_id=RequestId(4)), PERIOD_NS) == []
    assert scheduler.live_request_ids() == [3, 4]


def test_of_requests_taken_up_again_only_those_that_gained_a_token_pass() -> None:
    quarantine = Quarantine()
    quarantine.add(POISON, 0)
    core = SchedulerCore(SchedulerConfig(num_blocks=64, block_size=4, max_model_len=64), quarantine=quarantine)
    assert core.handle(replace(POISON, output_token_ids=pack([5]), is_taken_up_again=True), 1) == []
    (refused,) = core.handle(replace(POISON, request_id=RequestId(2), is_taken_up_again=True), 1)
    assert isinstance(refused, RequestEnded)
    assert refused.error_code == "request_quarantined"
