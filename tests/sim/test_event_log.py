"""The hash of a run is that of its numbers, however they were handed in."""

from __future__ import annotations

import hashlib
import struct

import pytest

from octavo.sim.event_log import MINUS_ONE, NumberStream, ReplicaLog


@pytest.mark.parametrize("size", [1, 7, 40_000, 100_000])
def test_a_stream_is_hashed_as_signed_64_bit_integers_whatever_the_pieces(size: int) -> None:
    numbers = [(i * 2_654_435_761) % 2**62 for i in range(100_000)]
    stream = NumberStream()
    for begin in range(0, len(numbers), size):
        stream.extend(numbers[begin : begin + size])
    stream.append(MINUS_ONE)
    assert len(stream) == 100_001
    expected = hashlib.sha256(struct.pack("<100001q", *numbers, -1)).digest()
    assert stream.digest() == stream.digest() == expected


@pytest.mark.parametrize("number", [-1, 2**64])
def test_a_number_that_does_not_fit_is_an_error(number: int) -> None:
    with pytest.raises(OverflowError):
        NumberStream().extend([number])


def test_the_streams_of_a_replica_are_kept_apart() -> None:
    logs = []
    for name in ("ends", "plans", "blocks"):
        log = ReplicaLog()
        getattr(log, name).append(5)
        logs.append(log.digest())
    assert len(set(logs)) == 3
