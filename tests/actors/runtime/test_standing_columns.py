"""What repeats from step to step is not made again, and nothing else is different."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.actors.runtime.fuzz_wire import mutate
from octavo.actors.runtime.standing_columns import MAX_KEPT_BYTES, STANDING, StepDecoder
from octavo.actors.runtime.value_ranges import compile_check
from octavo.actors.runtime.wire import Decoder, Encoder, MalformedMessageError
from octavo.messages.base import Message
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.request import TokenLogprobs
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest, StepExecuted

KINDS = (ExecuteStep, StepExecuted)
MAX_INT = 2**63 - 1

ids = st.sampled_from([(), (1, 2), (1, 3), (7, 2**32, MAX_INT), tuple(range(40))])


@st.composite
def execute_steps(draw: st.DrawFn) -> ExecuteStep:
    request_ids = tuple(map(RequestId, draw(ids)))
    start = StartRequest(RequestId(9), bytes(8), 2, 0, SamplingParams(seed=-5), (2,))
    num_started = draw(st.integers(0, 1))
    return ExecuteStep(
        Epoch(draw(st.integers(0, 2))),
        StepId(draw(st.integers(0, MAX_INT))),
        request_ids,
        (draw(st.sampled_from([1, 300])),) * len(request_ids),
        start=(start,) * num_started,
        block_tables=((BlockId(3),),) * num_started,
        append_blocks=tuple((request_id, (BlockId(4), BlockId(70_000))) for request_id in request_ids[:2]),
        drop=request_ids[: draw(st.integers(0, 1))],
    )


@st.composite
def answers(draw: st.DrawFn) -> StepExecuted:
    request_ids = tuple(map(RequestId, draw(ids)))
    entry = TokenLogprobs(5, float("-inf"), 1, ((5, -0.5),))
    return StepExecuted(
        Epoch(0),
        StepId(draw(st.integers(0, MAX_INT))),
        request_ids,
        tuple(draw(st.integers(0, 2**40)) for _ in request_ids),
        stopped=request_ids[:1],
        logprobs=tuple((request_id, entry) for request_id in request_ids[:1]),
        prompt_logprobs=tuple((request_id, 3, (entry, entry)) for request_id in request_ids[:1]),
        failed=tuple((request_id, "no") for request_id in request_ids[1:2]),
        execute_ns=draw(st.integers(0, MAX_INT)),
    )


def encode(message: Message) -> bytes:
    return Encoder().encode(message)[0]


def plainly(body: bytes) -> Message:
    """What the bytes mean to a decoder that keeps nothing and checks afterwards."""
    message: Message = msgspec.msgpack.decode(body, type=ExecuteStep | StepExecuted)
    check = compile_check(type(message))
    assert check is not None
    check(message)
    return message


@given(st.lists(st.one_of(execute_steps(), answers()), max_size=12))
def test_a_stream_of_steps_arrives_as_it_was_sent(messages: list[Message]) -> None:
    decoder = Decoder(KINDS)
    for message in messages:
        arrived = decoder.decode(encode(message))
        assert arrived == message
        assert type(arrived) is type(message)


def test_a_column_that_repeats_is_the_value_that_came_before() -> None:
    decoder = Decoder(KINDS)
    first, second, third = (
        decoder.decode(encode(ExecuteStep(Epoch(0), StepId(step), (RequestId(1), RequestId(last)), (1, 1))))
        for step, last in ((1, 700), (2, 700), (3, 701))
    )
    assert second.request_ids is first.request_ids  # type: ignore[attr-defined]
    assert third.request_ids == (1, 701)  # type: ignore[attr-defined]
    assert third.num_tokens is first.num_tokens  # type: ignore[attr-defined]


def test_the_columns_of_two_kinds_are_kept_apart() -> None:
    decoder = Decoder(KINDS)
    decoder.decode(encode(ExecuteStep(Epoch(0), StepId(1), (RequestId(1),), (1,))))
    answer = StepExecuted(Epoch(0), StepId(1), (RequestId(2),), (5,))
    assert decoder.decode(encode(answer)) == answer
    step = ExecuteStep(Epoch(0), StepId(2), (RequestId(1),), (1,))
    assert decoder.decode(encode(step)) == step


def test_a_long_column_is_not_kept() -> None:
    decoder = Decoder(KINDS)
    for length, is_kept in ((MAX_KEPT_BYTES // 9, True), (MAX_KEPT_BYTES // 9 + 1, False)):
        request_ids = tuple(RequestId(2**40 + number) for number in range(length))
        body = encode(StepExecuted(Epoch(0), StepId(1), request_ids, (1,) * length))
        first, second = decoder.decode(body), decoder.decode(body)
        assert first == second
        assert (first.request_ids is second.request_ids) == is_kept  # type: ignore[attr-defined]


BAD_COLUMNS: list[Any] = [
    [1, -1],
    [1, 2**63],
    [1, 2.0],
    [1, "2"],
    [1, None],
    [1, [2]],
    {"1": 2},
    "12",
    b"12",
    7,
    None,
    [1, 2, 3],
]


@pytest.mark.parametrize("column", BAD_COLUMNS, ids=repr)
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in STANDING.items() for name in names])
def test_hi_112_a_bad_column_is_refused_before_and_after_a_good_one(
    kind: type[Message], name: str, column: object
) -> None:
    other = {ExecuteStep: "num_tokens", StepExecuted: "token_ids"}[kind]
    good = {"type": kind.__name__, "epoch": 0, "step_id": 1, "request_ids": [1, 2], other: [1, 2]}
    bad = msgspec.msgpack.encode({**good, name: column})
    decoder = Decoder(KINDS)
    for _ in range(2):
        for _ in range(2):
            with pytest.raises(MalformedMessageError):
                decoder.decode(bad)
        assert decoder.decode(msgspec.msgpack.encode(good)).request_ids == (1, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "changed",
    [
        {"append_blocks": [[1, [-4]]]},
        {"append_blocks": [[-1, [4]]]},
        {"append_blocks": [[1]]},
        {"append_blocks": [[1, [4], 5]]},
        {"block_tables": [[-1]]},
        {"drop": [-1]},
        {"drop": [2**63]},
        {"step_id": -1},
        {"epoch": 2**63},
        {"type": "StepExecuted"},
        {"unknown": 1},
        {"start": [{"type": "StartRequest"}]},
        {"start": [{"type": "StartRequest", "request_id": 1, "token_ids": b"12345", "num_prompt_tokens": 1,
                    "num_computed_tokens": 0, "params": {}}], "block_tables": [[1]]},
    ],
    ids=repr,
)  # fmt: skip
def test_hi_112_the_other_fields_are_checked_as_ever(changed: dict[str, object]) -> None:
    good = {"type": "ExecuteStep", "epoch": 0, "step_id": 1, "request_ids": [1, 2], "num_tokens": [1, 1]}
    decoder = Decoder(KINDS)
    assert decoder.decode(msgspec.msgpack.encode(good))
    with pytest.raises(MalformedMessageError):
        decoder.decode(msgspec.msgpack.encode({**good, **changed}))


def test_hi_111_deep_nesting_and_false_lengths_within_a_column_are_refused() -> None:
    head = msgspec.msgpack.encode({"type": "StepExecuted", "epoch": 0, "step_id": 1, "token_ids": []})
    for column in (b"\x91" * 100_000 + b"\xc0", b"\x81\xa1a" * 100_000 + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xdc\x00"):
        with pytest.raises(MalformedMessageError):
            Decoder(KINDS).decode(bytes([head[0] + 1]) + head[1:] + msgspec.msgpack.encode("request_ids") + column)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_hi_124_damaged_steps_mean_the_same_to_a_decoder_that_remembers(seed: int) -> None:
    chance = random.Random(seed)
    numbers = tuple(map(RequestId, range(100, 132)))
    bodies = [
        encode(ExecuteStep(Epoch(0), StepId(7), numbers, (1,) * 32, drop=(RequestId(99),))),
        encode(ExecuteStep(Epoch(0), StepId(8), numbers, (1,) * 32)),
        encode(StepExecuted(Epoch(0), StepId(7), numbers, tuple(range(32)), (numbers[3],), execute_ns=6_000_000)),
    ]
    decoder = Decoder(KINDS)
    num_accepted = 0
    for _ in range(300):
        body = mutate(chance.choice(bodies), bodies, chance)
        try:
            expected: Message | None = plainly(body)
        except (msgspec.MsgspecError, ValueError, OverflowError):
            expected = None
        try:
            message: Message | None = decoder.decode(body)
        except MalformedMessageError:
            message = None
        assert message == expected
        num_accepted += message is not None
        decoder.decode(chance.choice(bodies))
    assert 0 < num_accepted < 300


def test_a_step_stands_under_its_own_name_on_the_wire() -> None:
    for kind in STANDING:
        assert StepDecoder(kind).wire_type.__struct_config__.tag == kind.__name__
