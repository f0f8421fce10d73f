"""F-43, F-45: the journal of streams on a disk that turns a bit, is full, or may not be written to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import structlog

from octavo.gateway.api.stream_journal import FILE_NAME, StreamJournal, StreamRecord
from octavo.messages.errors import InvalidConfigError

NAMES = "abcdef"


def written(folder: Path) -> tuple[bytes, list[int]]:
    """A journal of six streams, and where each of them ends."""
    journal = StreamJournal(folder)
    ends = [(folder / FILE_NAME).stat().st_size]
    for name in NAMES:
        journal.accepted(StreamRecord(name, 0, "completion", name.encode() * 50))
        assert journal.flush()
        ends.append((folder / FILE_NAME).stat().st_size)
    journal.close()
    return (folder / FILE_NAME).read_bytes(), ends


def names(folder: Path) -> list[str]:
    return [record.response_id for record in StreamJournal.unfinished(folder)]


def test_f_43_one_bit_turned_inside_a_journal_costs_one_stream_or_is_told_of_with_all_that_it_costs(
    tmp_path: Path,
) -> None:
    whole, ends = written(tmp_path)
    records = {record.response_id: record for record in StreamJournal.unfinished(tmp_path)}
    assert list(records) == list(NAMES)
    for at in range(ends[0], len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        (tmp_path / FILE_NAME).write_bytes(damaged)
        with structlog.testing.capture_logs() as told:
            found = StreamJournal.unfinished(tmp_path)
        assert all(record == records.get(record.response_id) for record in found), f"bit at {at}"
        hit = sum(end <= at for end in ends[1:])
        is_in_head = at < ends[hit] + 12
        left = NAMES[:hit] if is_in_head else NAMES[:hit] + NAMES[hit + 1 :]
        assert [record.response_id for record in found] == list(left), f"bit at {at}"
        [event] = told
        lost = len(whole) - ends[hit] if is_in_head else ends[hit + 1] - ends[hit] - 12
        assert event["event"] == "stream_journal.damaged"
        assert (event["at"], event["lost_bytes"]) == (ends[hit], lost)


def refusing(number: int) -> object:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_f_45_a_folder_that_cannot_be_written_to_is_a_clear_error_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as refused:
        refused.setattr(os, "open", refusing(number))
        with pytest.raises(InvalidConfigError) as told:
            StreamJournal(tmp_path / "folder")
    assert os.strerror(number) in str(told.value)
    assert str(tmp_path / "folder") in str(told.value)
    StreamJournal(tmp_path / "folder").close()  # nothing is held that would be in the way now


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_f_45_a_disk_that_takes_nothing_any_more_costs_no_stream_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    journal = StreamJournal(tmp_path)
    journal.accepted(StreamRecord("a", 0, "completion", b"a"))
    assert journal.flush()
    told: list[str] = []
    with monkeypatch.context() as refused:
        refused.setattr(os, "write", refusing(number))
        for name in "bcd":
            journal.accepted(StreamRecord(name, 0, "completion", b"x"), lambda name=name: told.append(name))
        assert journal.flush()
    assert told == ["b", "c", "d"], "their first events leave all the same"
    assert journal.num_failed_writes == 3
    journal.accepted(StreamRecord("e", 0, "completion", b"e"))
    journal.close()
    assert names(tmp_path) == ["a", "e"], "and what can be written again is"
