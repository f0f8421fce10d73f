from __future__ import annotations

import asyncio
import errno
import io
import threading
from pathlib import Path

import pytest

from octavo.actors.journal import actor
from octavo.actors.journal.actor import Journal, JournalWriter, check_journal_path
from octavo.actors.journal.config import JournalHeader
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.errors import InvalidConfigError
from octavo.messages.step import PlanDue
from octavo.sim.journal.reader import JournalReader

HEADER = JournalHeader(
    scheduler=SchedulerConfig(num_blocks=8, block_size=4, max_model_len=32),
    allocator=AllocatorConfig(num_blocks=8, block_size=4),
)


class FullDisk(io.RawIOBase):
    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        num_bytes = min(len(data), self.room)
        self.room -= num_bytes
        return num_bytes


class HungDisk(io.RawIOBase):
    def __init__(self) -> None:
        self.lets_go = threading.Event()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.lets_go.wait()
        return len(data)


def answer_nothing(message: object, now_ns: int) -> list[object]:
    return []


def test_a_journal_is_complete_once_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(str(path), HEADER)
    journal.wrap_scheduler(answer_nothing)(PlanDue(), 7)
    asyncio.run(journal.close())
    with JournalReader(path) as reader:
        assert [(entry.now_ns, entry.record) for entry in reader.entries()] == [(7, -1)]
        assert reader.end is not None
        assert reader.end.is_complete
    assert path.stat().st_mode & 0o077 == 0, "others may not read it"


def test_f_42_a_full_disk_ends_the_journal_with_one_report_and_nothing_else(tmp_path: Path) -> None:
    faults: list[str] = []
    reported = threading.Event()
    writer = JournalWriter(FullDisk(100), lambda why: (faults.append(why), reported.set()))  # type: ignore[arg-type]
    writer.put(b"x" * 200)
    reported.wait(300)
    with pytest.raises(BufferError, match="No space left"):
        writer.put(b"y")
    writer.put(b"the mark of the end, which is lost as well")
    assert writer.close(60)
    assert len(faults) == 1


def test_f_44_a_disk_that_hangs_neither_blocks_nor_fills_memory() -> None:
    disk = HungDisk()
    writer = JournalWriter(disk, lambda why: None, max_unwritten_bytes=1000)  # type: ignore[arg-type]
    for _ in range(10):
        writer.put(b"x" * 100)
    with pytest.raises(BufferError, match="1000 bytes behind"):
        writer.put(b"x" * 100)
    assert not writer.close(0.0), "close does not wait for ever"
    disk.lets_go.set()
    writer._thread.join()


def test_a_journal_that_cannot_be_written_leaves_the_cores_alone(tmp_path: Path, monkeypatch) -> None:
    reports: list[str] = []
    monkeypatch.setattr(actor, "_open_new", lambda path: FullDisk(100))
    monkeypatch.setattr(actor.log, "error", lambda event, **fields: reports.append(f"{event} {fields['why']}"))
    journal = Journal(str(tmp_path / "j"), HEADER)
    handle = journal.wrap_scheduler(answer_nothing)
    for now_ns in range(0, 100_000_000_000, 500_000_000):  # a frame is due every second
        assert handle(PlanDue(), now_ns) == []
    asyncio.run(journal.close())
    assert len(reports) == 1
    assert reports[0].startswith("journal.incomplete the journal cannot be written")


def test_a_journal_that_is_there_is_kept_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "j"
    for now_ns in (1, 2, 3):
        journal = Journal(str(path), HEADER)
        journal.wrap_scheduler(answer_nothing)(PlanDue(), now_ns)
        asyncio.run(journal.close())
    times = {}
    for name in ("j", "j.1", "j.2"):
        with JournalReader(tmp_path / name) as reader:
            times[name] = [entry.now_ns for entry in reader.entries()]
    assert times == {"j": [3], "j.1": [1], "j.2": [2]}


def test_what_is_no_journal_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("ten years of work")
    for make in (check_journal_path, lambda p: Journal(p, HEADER)):
        with pytest.raises(InvalidConfigError, match=r"is no journal|is not a journal"):
            make(str(path))
        with pytest.raises(InvalidConfigError, match="plain file"):
            make(str(tmp_path))
        with pytest.raises(InvalidConfigError, match="cannot be made"):
            make(str(tmp_path / "no such folder" / "j"))
    assert path.read_text() == "ten years of work"
    assert list(tmp_path.iterdir()) == [path]
