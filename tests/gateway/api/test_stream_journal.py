from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.gateway.api.journal_file import JournalFile
from octavo.gateway.api.stream_journal import FILE_NAME, MAX_ATTEMPTS, StreamJournal, StreamRecord
from octavo.messages.errors import InvalidConfigError


def record(name: str, body: bytes = b"{}") -> StreamRecord:
    return StreamRecord(name, 1_700_000_000, "chat", body, seeds=(7,), owner="me")


def names(folder: Path) -> list[str]:
    return [record.response_id for record in StreamJournal.unfinished(folder)]


def test_what_was_accepted_and_did_not_end_is_unfinished_in_order_of_arrival(tmp_path: Path) -> None:
    journal = StreamJournal(tmp_path / "new" / "folder")
    for name in "cab":
        journal.accepted(record(name, name.encode() * 1000))
    journal.ended("a")
    journal.ended("nobody")
    journal.close()
    assert StreamJournal.unfinished(tmp_path / "new" / "folder") == [record("c", b"c" * 1000), record("b", b"b" * 1000)]
    again = StreamJournal(tmp_path / "new" / "folder")
    assert [r.response_id for r in again.to_resume] == ["c", "b"]
    assert [r.num_attempts for r in again.to_resume] == [1, 1]
    again.ended("c")
    again.close()
    assert names(tmp_path / "new" / "folder") == ["b"]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_f_43_a_file_cut_anywhere_or_damaged_behind_gives_what_came_before(tmp_path: Path, data: st.DataObject) -> None:
    for file in tmp_path.iterdir():
        file.unlink()
    journal = StreamJournal(tmp_path)
    sizes = [(tmp_path / FILE_NAME).stat().st_size]
    for name in "abcd":
        journal.accepted(record(name))
        assert journal.flush()
        sizes.append((tmp_path / FILE_NAME).stat().st_size)
    journal.close()
    cut = data.draw(st.integers(0, sizes[-1]))
    whole = (tmp_path / FILE_NAME).read_bytes()
    tail = data.draw(st.sampled_from([b"", b"\0" * 20, b"\xff" * 9]))
    damaged = whole[:cut] + tail if cut >= sizes[0] else whole[:cut]
    (tmp_path / FILE_NAME).write_bytes(damaged)
    num_whole = sum(damaged[:size] == whole[:size] for size in sizes[1:])  # a zero may stand where one was cut
    assert names(tmp_path) == list("abcd")[:num_whole]
    again = StreamJournal(tmp_path)
    again.accepted(record("e"))
    again.close()
    assert names(tmp_path) == [*"abcd"[:num_whole], "e"], "what is appended behind the cut can be read"


def test_the_file_is_for_its_owner_alone_and_only_one_process_writes_it(tmp_path: Path) -> None:
    journal = StreamJournal(tmp_path)
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
    with pytest.raises(InvalidConfigError, match="another server uses it"):
        StreamJournal(tmp_path)
    journal.close()
    StreamJournal(tmp_path).close()


def test_a_file_of_something_else_is_left_alone_and_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"my dear diary")
    with pytest.raises(InvalidConfigError, match="is no journal of streams"):
        StreamJournal(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == b"my dear diary"
    with pytest.raises(InvalidConfigError, match="no journal of streams can be kept"):
        StreamJournal(tmp_path / FILE_NAME)


def test_a_stream_that_every_server_dies_of_is_given_up(tmp_path: Path) -> None:
    journal = StreamJournal(tmp_path)
    journal.accepted(record("poison"))
    journal.close()
    for _ in range(MAX_ATTEMPTS):
        journal = StreamJournal(tmp_path)
        assert [r.response_id for r in journal.to_resume] == ["poison"]
        journal.close()
    journal = StreamJournal(tmp_path)
    assert (journal.to_resume, journal.num_given_up) == ([], 1)
    journal.close()
    assert names(tmp_path) == []


def test_a_stream_that_got_further_is_no_poison_until_it_stops_getting_further(tmp_path: Path) -> None:
    journal = StreamJournal(tmp_path)
    journal.accepted(record("long"))
    journal.close()
    for life in range(1, 10):
        journal = StreamJournal(tmp_path)
        (again,) = journal.to_resume
        assert (again.num_attempts, again.num_events) == (1, 10 * (life - 1))
        journal.got_further(again, 10 * life)
        journal.close()
    for _ in range(MAX_ATTEMPTS):
        journal = StreamJournal(tmp_path)
        (again,) = journal.to_resume
        assert again.num_events == 90
        journal.close()
    journal = StreamJournal(tmp_path)
    assert (journal.to_resume, journal.num_given_up) == ([], 1)
    journal.got_further(record("long"), 100)
    journal.close()
    assert names(tmp_path) == [], "what was given up or has ended does not come back"


def test_a_long_journal_is_compacted_to_what_is_unfinished(tmp_path: Path) -> None:
    journal = StreamJournal(tmp_path, max_bytes=20_000)
    journal.accepted(record("kept"))
    for i in range(300):
        journal.accepted(record(f"r{i}", b"x" * 500))
        journal.ended(f"r{i}")
        assert journal.flush()
        assert (tmp_path / FILE_NAME).stat().st_size < 22_000
    journal.accepted(record("last"))
    journal.close()
    assert names(tmp_path) == ["kept", "last"]


def test_f_42_a_disk_that_is_full_costs_the_journal_that_stream_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = StreamJournal(tmp_path)
    journal.accepted(record("a"))
    assert journal.flush()
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:5]))
        journal.accepted(record("b"))
        assert journal.flush()
    journal.accepted(record("c"))
    assert journal.flush()
    assert journal.num_failed_writes == 1
    journal.close()
    assert names(tmp_path) == ["a", "c"]


def test_f_45_a_folder_that_is_deleted_live_costs_no_stream_however_long_the_journal_grows(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    journal = StreamJournal(folder, max_bytes=20_000)
    journal.accepted(record("a"))
    shutil.rmtree(folder)
    for i in range(100):  # far beyond the length at which it is written anew, in a folder that is not there
        journal.accepted(record(f"r{i}", b"x" * 500))
        journal.ended(f"r{i}")
    journal.close()


def test_an_entry_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    import zlib

    journal = StreamJournal(tmp_path)
    journal.accepted(record("a"))
    assert journal.flush()
    payload = msgspec.msgpack.encode(17)
    head = len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little")
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(head + zlib.crc32(head).to_bytes(4, "little") + payload)
    journal.accepted(record("b"))
    journal.close()
    assert names(tmp_path) == ["a", "b"]


def test_a_process_that_is_killed_has_lost_nothing_that_the_system_had(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "from octavo.gateway.api.stream_journal import StreamJournal, StreamRecord\n"
        "journal = StreamJournal(pathlib.Path(sys.argv[1]))\n"
        "for i in range(100): journal.accepted(StreamRecord(str(i), 0, 'completion', b'body'))\n"
        "journal.ended('0')\n"
        "assert journal.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [str(i) for i in range(1, 100)]


def test_a_record_may_be_acted_on_only_once_the_system_has_it_or_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = StreamJournal(tmp_path)
    found: list[list[str]] = []
    for name in "ab":
        journal.accepted(record(name), lambda: found.append(names(tmp_path)))
        assert journal.flush()
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda fd, data: 0)
        journal.accepted(record("c"), lambda: found.append(["told all the same"]))
        assert journal.flush()
    assert found == [["a"], ["a", "b"], ["told all the same"]]
    journal.close()


def test_f_44_a_disk_that_stands_still_keeps_nobody_waiting_and_what_waits_for_it_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = JournalFile(tmp_path / "file", b"magic", [b"first"], max_unwritten_bytes=10)
    write, goes_on = os.write, threading.Event()

    def stall(fd: int, data: bytes) -> int:
        goes_on.wait()
        return write(fd, data)

    told: list[str] = []
    with monkeypatch.context() as still:
        still.setattr(os, "write", stall)
        file.append(b"12345", lambda: told.append("second"))
        file.append(b"67890", lambda: told.append("third"))
        assert (file.num_failed, told) == (0, [])
        file.append(b"x", lambda: told.append("lost"))
        file.rewrite((b"anew",))
        file.append(b"", lambda: told.append("behind"))
        assert (file.num_failed, told) == (1, ["lost"])
        assert not file.flush(0.0) and not file.close(0.0)
        goes_on.set()
        assert file.close()
    assert told == ["lost", "second", "third", "behind"]
    assert (tmp_path / "file").read_bytes() == b"magicanew"
    file.append(b"too late", lambda: told.append("closed"))
    assert told[-1] == "closed" and file.num_failed == 1
