"""The codec: what is sent arrives, what is not a message is refused, whatever it is."""

from __future__ import annotations

import math
import re
import struct
from array import array
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.actors.runtime import envelope
from octavo.actors.runtime.fuzz_wire import fuzz, fuzz_port, record, record_control
from octavo.actors.runtime.sample_messages import KINDS, sample_messages
from octavo.actors.runtime.schema import all_messages, schema_hash
from octavo.actors.runtime.wire import Decoder, Encoder, MalformedMessageError
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.request import CancelRequest, RequestEnded, SubmitRequest, TextDelta, TokenLogprobs
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StepExecuted
from octavo.messages.tensor import Tensor

DECODER = Decoder(KINDS)
RECORDED = [*record(sample_messages()), *record_control()]
pack = msgspec.msgpack.encode


class Carried(Message, frozen=True):
    name: str
    hidden: Tensor
    mask: Tensor


def decode(value: object) -> Message:
    return DECODER.decode(value if isinstance(value, bytes) else pack(value))


def refused(value: object) -> None:
    with pytest.raises(MalformedMessageError):
        decode(value)


@pytest.mark.parametrize("message", sample_messages(), ids=lambda message: type(message).__name__)
def test_every_sample_arrives_as_it_was_sent(message: Message) -> None:
    body, tensors = Encoder().encode(message)
    assert DECODER.decode(body, tensors) == message


def test_nothing_may_arrive_where_nothing_is_allowed() -> None:
    with pytest.raises(MalformedMessageError):
        Decoder(()).decode(pack({"type": "CancelRequest", "request_id": 1}))


def test_a_known_message_that_is_not_expected_here_is_refused() -> None:
    with pytest.raises(MalformedMessageError):
        Decoder([RequestEnded]).decode(pack({"type": "CancelRequest", "request_id": 1}))


@given(st.binary(max_size=400))
def test_hi_110_random_bytes_are_refused_or_mean_a_message(body: bytes) -> None:
    try:
        message = DECODER.decode(body)
    except MalformedMessageError:
        return
    assert isinstance(message, Message)


FALSE_LENGTHS = [
    bytes([code]) + size for code in (0xDD, 0xDF, 0xDB, 0xC6, 0xC9) for size in (b"\xff" * 4, b"\x7f\xff\xff\xff")
]


@pytest.mark.parametrize("length", FALSE_LENGTHS, ids=lambda length: length.hex())
def test_hi_111_false_lengths_are_refused_without_allocating(length: bytes) -> None:
    refused(length)
    head = pack({"type": "StepExecuted", "epoch": 0, "step_id": 0})
    refused(bytes([0x84]) + head[1:] + pack("request_ids") + length)


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"])
def test_hi_111_deep_nesting_is_refused(opening: bytes) -> None:
    deep = opening * 100_000 + b"\xc0"
    refused(deep)
    refused(b"\x82\xa4type\xadCancelRequest\xaarequest_id" + deep)
    refused(b"\x83\xa4type\xadCancelRequest\xaarequest_id\x01\xa3new" + deep)


@pytest.mark.parametrize(
    "value",
    [
        {"type": "CancelRequest", "request_id": msgspec.msgpack.Ext(1, b"x")},
        msgspec.msgpack.Ext(4, b"pickle"),
        {"type": "CancelReqest", "request_id": 1},
        {"type": 7, "request_id": 1},
        {"request_id": 1},
        {"type": "CancelRequest", "request_id": 1, "admin": True},
        {"type": "CancelRequest"},
        {"type": "CancelRequest", "request_id": "1"},
        {"type": "CancelRequest", "request_id": 1.5},
        {"type": "CancelRequest", "request_id": None},
        ["CancelRequest", 1],
        pack({"type": "CancelRequest", "request_id": 1}) + b"\x00",
        b"",
        b"\xc1",
        {"type": "RequestEnded", "request_id": 1, "reason": "because"},
        pack({"type": "RequestEnded", "request_id": 1, "reason": "stop", "error": "xx"}).replace(b"xx", b"\xff\xfe"),
    ],
    ids=lambda value: re.sub(r" object at 0x[0-9a-f]+", "", repr(value)),
)
def test_hi_111_ext_tags_fields_and_extra_bytes_are_refused(value: object) -> None:
    refused(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_hi_112_floats_that_are_not_finite_are_refused(number: float) -> None:
    request = {"type": "SubmitRequest", "request_id": 1, "prompt_token_ids": b"\0\0\0\0"}
    assert decode({**request, "params": {"temperature": 0.5}})
    refused({**request, "params": {"temperature": number}})
    refused({**request, "params": {"logit_bias": {5: number}}})


def test_hi_112_the_logarithm_of_nothing_is_minus_infinity_and_no_other() -> None:
    delta = TextDelta(RequestId(1), "", (5,), (TokenLogprobs(5, -math.inf, 1, ((5, -math.inf),)),))
    assert decode(Encoder().encode(delta)[0]) == delta
    for number in (math.nan, math.inf):
        worse = msgspec.structs.replace(delta, logprobs=(TokenLogprobs(5, number, 1),))
        refused(Encoder().encode(worse)[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"request_ids": [-1, 2]},
        {"request_ids": [2**64, 2]},
        {"token_ids": [5, -7]},
        {"token_ids": [5]},
        {"epoch": -1},
        {"step_id": 2**63},
        {"execute_ns": -5},
        {"stopped": [-3]},
        {"logprobs": [[-1, {"type": "TokenLogprobs", "token_id": 1, "logprob": -1.0, "rank": 1}]]},
        {"logprobs": [[1, {"type": "TokenLogprobs", "token_id": 1, "logprob": -1.0, "rank": -1}]]},
        {"failed": [[-1, "x"]]},
    ],
    ids=repr,
)
def test_hi_112_negative_ids_and_counts_and_numbers_out_of_64_bits_are_refused(changed: dict[str, object]) -> None:
    fields = {"type": "StepExecuted", "epoch": 0, "step_id": 1, "request_ids": [1, 2], "token_ids": [5, 6]}
    assert decode(fields)
    try:
        body = pack({**fields, **changed})
    except OverflowError:  # beyond what msgpack can say at all
        body = pack({**fields, "request_ids": [1, 2]}).replace(pack([1, 2]), b"\x92\xcf" + b"\xff" * 8 + b"\x02\x00")
    refused(body)


def test_hi_112_what_may_be_negative_may() -> None:
    request = SubmitRequest(RequestId(1), b"", SamplingParams(top_k=-1, logprobs=-1, seed=-5), priority=-9)
    assert decode(Encoder().encode(request)[0]) == request


def test_token_ids_as_bytes_are_whole_int32s() -> None:
    request = {"type": "SubmitRequest", "request_id": 1, "params": {}}
    assert decode({**request, "prompt_token_ids": array("i", [5, 6]).tobytes()})
    refused({**request, "prompt_token_ids": b"\0\0\0\0\0"})


def test_columns_of_a_step_are_equally_long() -> None:
    step = ExecuteStep(Epoch(0), StepId(1), (RequestId(1),), (1, 1))
    refused(Encoder().encode(step)[0])
    refused(Encoder().encode(StepExecuted(Epoch(0), StepId(1), (RequestId(1),), ()))[0])


def test_hi_124_there_are_samples_of_every_type_with_and_without_something_in_its_fields() -> None:
    samples = sample_messages()
    assert {type(message) for message in samples} > set(all_messages())
    assert len(samples) == 2 * len(KINDS)
    assert any(each.tensors for each in RECORDED)
    assert {each.kind for each in RECORDED} == set(range(envelope.HELLO, envelope.RESET + 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_hi_124_f_30_damaged_traffic_is_never_accepted_and_never_crashes(seed: int) -> None:
    tally = fuzz(RECORDED, 800, seed)
    assert tally.num_frames > 700
    assert tally.num_bodies > 500


def test_hi_124_damaged_tensors_are_refused() -> None:
    tally = fuzz([each for each in RECORDED if any(each.tensors)], 500, 1)
    assert tally.num_tensors > 200


@pytest.mark.parametrize("seed", range(3))
def test_hi_124_a_port_that_is_sent_damaged_traffic_hands_on_what_is_a_message_and_nothing_else(
    tmp_path: Path, seed: int
) -> None:
    tmp_path.chmod(0o700)
    assert fuzz_port(RECORDED, 2000, seed, tmp_path) > 50


def test_hi_124_any_one_bit_flipped_is_noticed() -> None:
    for recorded in RECORDED:
        for position in range(len(recorded.frame)):
            damaged = bytearray(recorded.frame)
            damaged[position] ^= 0x10
            with pytest.raises(envelope.NotAnEnvelopeError):
                envelope.unseal(bytes(damaged))


def tensors() -> Carried:
    hidden = np.arange(12, dtype=np.float32).reshape(3, 4)
    return Carried("layer 3", Tensor("float32", (3, 4), hidden.data), Tensor("bool", (3,), b"\x01\x00\x01"))


def test_tensors_travel_beside_their_message_without_a_copy() -> None:
    message = tensors()
    body, frames = Encoder().encode(message)
    assert len(body) < 100
    assert [frame.nbytes for frame in frames] == [48, 3]
    assert frames[0].obj is message.hidden.data.obj
    arrived = Decoder([Carried]).decode(body, frames)
    assert arrived == message
    assert np.frombuffer(arrived.hidden.data, np.float32)[7] == 7.0  # type: ignore[attr-defined]
    assert arrived.hidden.data.obj is frames[0].obj  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", ["missing", "more", "damaged", "shorter", "swapped"])
def test_frames_that_do_not_fit_their_tensors_are_refused(case: str) -> None:
    body, frames = Encoder().encode(tensors())
    given = {
        "missing": [frames[0]],
        "more": [*frames, b""],
        "damaged": [bytes(47) + b"\x01", frames[1]],
        "shorter": [frames[0][:-4], frames[1]],
        "swapped": [frames[1], frames[0]],
    }[case]
    with pytest.raises(MalformedMessageError):
        Decoder([Carried]).decode(body, given)


@pytest.mark.parametrize(
    "tensor",
    [
        ("float32", [3, 4], 0, 0),
        ("float64", [1], 0, 0),
        ("float32", [-1, -12], 0, 0),
        ("float32", [12], 1, 0),
        ("float32", [12], -1, 0),
        ("float32", [2**40, 2**40], 0, 0),
        "float32",
        {"dtype": "float32"},
    ],
    ids=repr,
)
def test_tensors_that_lie_about_themselves_are_refused(tensor: object) -> None:
    import zlib

    frame = struct.pack("<12f", *range(12))
    value = (*tensor[:3], zlib.crc32(frame)) if isinstance(tensor, tuple) and tensor[1] != [3, 4] else tensor
    with pytest.raises(MalformedMessageError):
        Decoder([Carried]).decode(pack({"type": "Carried", "name": "", "hidden": value, "mask": value}), [frame])


def test_the_schema_hash_tells_builds_apart_and_not_docstrings() -> None:
    class One(Message, frozen=True, tag="Probe"):
        """Said so."""

        count: int

    class Two(Message, frozen=True, tag="Probe"):
        """Or so."""

        count: int

    Two.__name__ = Two.__qualname__ = "One"
    One.__qualname__ = "One"

    class Three(Message, frozen=True, tag="Probe"):
        count: int
        more: int = 0

    Three.__name__ = Three.__qualname__ = "One"
    assert schema_hash((One,)) == schema_hash((Two,))
    assert schema_hash((One,)) != schema_hash((Three,))
    assert len(schema_hash()) == 32 and CancelRequest in all_messages()
