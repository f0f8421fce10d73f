from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journaled_ring import CONFIG, entries_of, header_of, record_ring

from octavo.actors.journal.core import MAGIC, MAX_FRAME_BYTES, FrameSealer
from octavo.actors.journal.disguise import num_mark_bytes
from octavo.actors.journal.records import (
    AllocatorHears,
    AllocatorTakes,
    Cancelled,
    Executed,
    ExecutedLate,
    Lost,
    Raised,
    SchedulerHears,
    SchedulerTakes,
    Stopped,
    Submitted,
)
from octavo.messages.errors import InvalidJournalError
from octavo.messages.ids import RequestId
from octavo.messages.kv import BlocksFreed, MatchPrefix, PrefixMatched
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import PlanStep
from octavo.sim.journal.diff import diff
from octavo.sim.journal.reader import JournalReader
from octavo.sim.journal.replay import replay
from octavo.sim.workload.from_journal import read_journal


def frames_of(data: bytes) -> list[tuple[int, int]]:
    """Begin and end of each frame."""
    found, begin = [], len(MAGIC)
    while begin < len(data):
        end = begin + 40 + int.from_bytes(data[begin : begin + 4], "little")
        found.append((begin, end))
        begin = end
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "j"
    record_ring(path, seed=1, num_requests=6, num_steps=250)
    data = path.read_bytes()
    assert len(frames_of(data)) >= 2
    return data


def file_of(*payloads: object) -> bytes:
    """A journal of these payloads, with seals that are right."""
    sealer = FrameSealer()
    data = MAGIC
    for payload in payloads:
        encoded = payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload)
        data += sealer.seal(encoded) + encoded
    return data


def test_every_flipped_bit_is_found_and_its_frame_is_named(recorded: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j"
    frames = frames_of(recorded)
    for position in [*range(120), *range(120, len(recorded), 11)]:
        damaged = bytearray(recorded)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(InvalidJournalError) as caught:
            entries_of(path)
        if position >= len(MAGIC):
            number, (begin, _) = next((i, frame) for i, frame in enumerate(frames) if position < frame[1])
            assert f"frame {number} at byte {begin}:" in str(caught.value)


def test_a_journal_that_ends_within_a_frame_is_read_up_to_there(recorded: bytes, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(recorded)
    whole = entries_of(path)
    frames = frames_of(recorded)
    begin, end = frames[-1]
    for cut in range(begin, end, 9):
        path.write_bytes(recorded[:cut])
        with JournalReader(path) as reader:
            entries = list(reader.entries())
        assert entries == whole[: len(entries)]
        assert len(entries) < len(whole)
        assert reader.end is not None
        assert not reader.end.is_complete
        assert reader.end.num_torn_bytes == cut - begin
        assert reader.end.num_frames == len(frames) - 1
        assert replay(path).is_identical


def test_frames_cannot_be_swapped_left_out_or_appended(tmp_path: Path) -> None:
    path = tmp_path / "j"
    one = file_of(header_of(CONFIG), [-1, 5, -1], [7, -1, [12, ""]])
    path.write_bytes(one)
    assert len(entries_of(path)) == 3
    frames = frames_of(one)
    cut = [one[begin:end] for begin, end in frames]
    for wrong in ([0, 2, 1], [0, 2], [0, 1, 2, 2], [0, 1, 1, 2]):
        path.write_bytes(MAGIC + b"".join(cut[i] for i in wrong))
        with pytest.raises(InvalidJournalError, match="frame"):
            entries_of(path)


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        (b"\xdd\xff\xff\xff\xff", "more than 8192 records"),
        (b"", "malformed"),
        ([[99, 1]], "malformed"),
        ([-17], "no record -17"),
        ([-64], "an answer follows no message"),
        ([1 << 62, 1 << 62, -1], "end of time"),
        ([[12, ""], -1], "follows the last record"),
        ([[2, None, ["a"], [], [], 0]], "malformed"),
        ([[1]], "malformed"),
        ({"a": 1}, "malformed"),
    ],
)
def test_well_sealed_nonsense_is_refused(payload: object, error: str, tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(file_of(header_of(CONFIG), payload))
    with pytest.raises(InvalidJournalError, match=error):
        entries_of(path)


def test_a_length_beyond_all_bounds_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "j"
    sealer = FrameSealer()
    data = file_of(header_of(CONFIG))
    prefix = sealer.seal(bytes(MAX_FRAME_BYTES + 1))
    path.write_bytes(data + prefix)
    with pytest.raises(InvalidJournalError, match="bytes, of"):
        entries_of(path)


def test_marks_of_another_number_of_tokens_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for num_tokens in (1 << 50, 400_000_000, 9, -1):
        record = Submitted(
            RequestId(0), num_tokens, 0, bytes(16), SamplingParams(max_tokens=1), 0, 0, 0, "", RequestId(-1), ()
        )
        path.write_bytes(file_of(header_of(CONFIG), [record]))
        with pytest.raises(InvalidJournalError, match="request 0"):
            replay(path)


def test_a_header_no_engine_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j"
    good = msgspec.msgpack.decode(msgspec.msgpack.encode(header_of(CONFIG)))
    for change, error in (
        ({"version": 2}, "another version"),
        ({"scheduler": {**good["scheduler"], "num_blocks": 1 << 40}}, "num_blocks"),
        ({"scheduler": {**good["scheduler"], "pipeline_depth": 1 << 40}}, "pipeline_depth"),
        ({"scheduler": {**good["scheduler"], "max_num_seqs": 0}}, "max_num_seqs"),
        ({"allocator": {**good["allocator"], "block_size": 3}}, "block_size"),
        ({"scheduler": 7}, "malformed"),
    ):
        path.write_bytes(file_of({**good, **change}))
        with pytest.raises(InvalidJournalError, match=error):
            JournalReader(path)


def test_what_is_no_journal_says_so(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("text", b"hello, this is text"), ("head", MAGIC), ("torn", MAGIC + b"abc")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InvalidJournalError, match=r"not a journal|within its header"):
            JournalReader(path)
    with pytest.raises(InvalidJournalError, match="cannot be read: No such file"):
        JournalReader(tmp_path / "none")
    with pytest.raises(InvalidJournalError, match="cannot be read: Is a directory"):
        JournalReader(tmp_path)


small = st.integers(-2, 6)
ids = st.lists(small, max_size=4).map(tuple)
numbers = st.sampled_from([-1, 0, 1, 2, 3, 100, 1 << 31, (1 << 62), -(1 << 62)])
well_shaped = st.one_of(
    st.integers(-80, 3),
    st.builds(
        lambda num_tokens, num_output, *rest: Submitted(rest[0], num_tokens - num_output, num_output, *rest[1:]),
        st.integers(0, 30),
        st.integers(0, 4),
        small,
        st.binary(max_size=8).map(lambda seed: (seed * 16)[:8] * 8),
        st.builds(SamplingParams, max_tokens=st.none() | numbers, prompt_logprobs=st.none() | small),
        numbers,
        numbers,
        numbers,
        st.sampled_from(["", "a"]),
        small,
        ids,
    ),
    st.builds(Executed, st.none() | ids, st.lists(numbers, max_size=4).map(tuple), ids, st.just(()), small),
    st.builds(ExecutedLate, small, small, ids),
    st.builds(Cancelled, small),
    st.builds(Stopped, small),
    st.builds(Lost, small, st.text(max_size=2)),
    st.builds(SchedulerTakes, numbers),
    st.builds(AllocatorTakes, numbers),
    st.builds(SchedulerHears, st.builds(PrefixMatched, small, small, numbers, numbers)),
    st.builds(SchedulerHears, st.builds(BlocksFreed, small, numbers, small, small)),
    st.builds(AllocatorHears, st.builds(MatchPrefix, small, small, st.binary(max_size=40))),
    st.builds(
        AllocatorHears, st.builds(PlanStep, small, small, ids, ids, grow=st.lists(st.tuples(small, small)).map(tuple))
    ),
    st.builds(Raised, st.text(max_size=2)),
)
records = st.recursive(
    st.integers(-80, 3) | st.none() | st.text(max_size=2) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=12),
    max_leaves=30,
)


def submitted_well(record: object) -> object:
    """Give a forged `Submitted` the marks that its tokens need, so that it reaches the cores."""
    if isinstance(record, Submitted):
        num_tokens = record.num_prompt_tokens + record.num_output_tokens
        return msgspec.structs.replace(record, tokens=bytes(num_mark_bytes(num_tokens, CONFIG.block_size)))
    return record


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
@given(st.lists(records, max_size=8) | st.lists(well_shaped.map(submitted_well), max_size=40))
def test_forged_journals_lead_to_a_report_or_an_error_and_nothing_else(tmp_path: Path, forged: list[object]) -> None:
    path = tmp_path / "j"
    path.write_bytes(file_of(header_of(CONFIG), forged))
    for read in (replay, lambda path: diff(path, path), read_journal):
        with suppress(InvalidJournalError):
            read(path)
