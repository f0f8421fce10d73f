"""A step's message stays within what a link takes, however long the prompts are that join it."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from core_ring import CoreRing, reference_stream, submit

from octavo.actors.runtime.port_limits import PortLimits
from octavo.actors.runtime.wire import Encoder
from octavo.actors.scheduler import step_planning
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.start_size import MAX_START_BYTES, params_bytes
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest

LARGEST = 2**31 - 1

LONG_PARAMS = {
    "none": SamplingParams(),
    "stop": SamplingParams(stop=("\U0001f3b5" * 1024,) * 16),
    "bad_words": SamplingParams(bad_words=("\U0001f3b5" * 1024,) * 128),
    "bad_words_token_ids": SamplingParams(bad_words_token_ids=((LARGEST,) * 500,) * 1024),
    "allowed_token_ids": SamplingParams(allowed_token_ids=(LARGEST,) * 200_000),
    "stop_token_ids": SamplingParams(stop_token_ids=(LARGEST,) * 1024),
    "logit_bias": SamplingParams(logit_bias={LARGEST - number: 0.1 for number in range(1024)}),
}


@pytest.mark.parametrize("params", LONG_PARAMS.values(), ids=LONG_PARAMS)
def test_parameters_are_not_longer_on_a_link_than_they_are_taken_for(params: SamplingParams) -> None:
    assert len(Encoder().encode(StartRequest(RequestId(1), b"", 0, 0, params))[0]) <= params_bytes(params) + 300


def test_starts_of_the_largest_total_fit_a_link_with_their_block_tables_and_a_full_batch() -> None:
    document = array("i", range(1_000_000, 1_043_000)).tobytes()
    num_starts = MAX_START_BYTES // len(document)
    starts = [StartRequest(RequestId(2**60 + one), document, 43_000, 42_992, SamplingParams()) for one in range(1024)]
    table = tuple(BlockId(2**31 - number) for number in range(43_000 // 8))
    ids = tuple(RequestId(2**60 + number) for number in range(1024))
    step = ExecuteStep(
        Epoch(1),
        StepId(2**31),
        ids,
        (8,) * len(ids),
        tuple(starts[:num_starts]),
        (table,) * num_starts,
        tuple((request_id, table[:100]) for request_id in ids),
        ids,
    )
    assert len(Encoder().encode(step)[0]) < PortLimits().max_message_bytes
    everything = msgspec.structs.replace(step, start=tuple(starts[:100]), block_tables=(table,) * 100)
    assert len(Encoder().encode(everything)[0]) > PortLimits().max_message_bytes, "as it would be without the bound"


@pytest.mark.parametrize("is_by_params", [False, True])
def test_requests_whose_prompts_are_cached_join_in_several_steps_if_they_are_long(
    monkeypatch: pytest.MonkeyPatch, is_by_params: bool
) -> None:
    monkeypatch.setattr(step_planning, "MAX_START_BYTES", 2500)
    config = SchedulerConfig(
        num_blocks=4000, block_size=4, max_model_len=300, max_num_seqs=16, max_num_batched_tokens=4096
    )
    ring = CoreRing(config, vocab=50)
    document = [number % 50 for number in range(60 if is_by_params else 200)]
    requests = [submit(number, [*document, number], max_tokens=5) for number in range(13)]
    if is_by_params:
        long = msgspec.structs.replace(requests[0].params, bad_words=("x" * 150,))
        requests = [msgspec.structs.replace(request, params=long) for request in requests]
    ring.submit(requests[0])
    ring.run()  # which leaves the document in the cache
    first = len(ring.plans)
    for request in requests[1:]:
        ring.submit(request)
    ring.run()
    num_started = [len(plan.start) for plan in ring.plans[first:]]
    assert max(num_started) == (2 if is_by_params else 3), "the budget would let eight and more start at once"
    assert sum(num_started) == 12
    for request in requests:
        expected, _ = reference_stream(request, 300, 50)
        assert list(ring.executor.streams[request.request_id].values()) == expected


def test_a_start_that_is_too_long_for_any_company_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_planning, "MAX_START_BYTES", 10)
    config = SchedulerConfig(num_blocks=99, block_size=4, max_model_len=99, max_num_seqs=4, max_num_batched_tokens=64)
    ring = CoreRing(config, vocab=50)
    for number in range(4):
        ring.submit(submit(number, [7] * 9, max_tokens=3))
    ring.run()
    assert [len(plan.start) for plan in ring.plans if plan.start] == [1] * 4
    assert len(ring.ended) == 4
