"""Carries a journal to its file, on a thread of its own; whatever becomes of the file, serving goes on."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import structlog

from ...messages.errors import InvalidConfigError
from .config import JournalHeader
from .core import KEY_BYTES, JournalCore
from .frames import MAGIC, FrameSealer

log = structlog.get_logger("octavo.journal")

MAX_UNWRITTEN_BYTES = 64 << 20
"""A disk that is so far behind ends the journal."""

CLOSE_TIMEOUT_S = 10.0
"""How long a close waits for a disk that does not answer."""


class JournalWriter:
    """Seals frames and writes them to a file, on its own thread, in order.

    A frame that cannot be written ends the file there. Nothing in here waits for the disk but the thread, and `close`
    with a timeout.

    Args:
        file: open for writing, unbuffered; closed at the end.
        on_fault: called once, on the thread, if writing fails.
        max_unwritten_bytes: bound of what waits to be written.
    """

    def __init__(
        self, file: BinaryIO, on_fault: Callable[[str], None], *, max_unwritten_bytes: int = MAX_UNWRITTEN_BYTES
    ) -> None:
        self._file = file
        self._on_fault = on_fault
        self._max_unwritten_bytes = max_unwritten_bytes
        self._num_unwritten = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_behind = False
        self.fault = ""
        self._thread = threading.Thread(target=self._run, name="octavo-journal", daemon=True)
        self._thread.start()

    def put(self, payload: bytes) -> None:
        """Queue a frame's payload; never waits.

        Raises:
            BufferError: too much waits already, or writing has failed. One more frame is taken after this: the last.
        """
        if not self._is_behind:
            if self.fault:
                self._is_behind = True
                raise BufferError(self.fault)
            if self._num_unwritten + len(payload) > self._max_unwritten_bytes:
                self._is_behind = True
                raise BufferError(f"the disk is {self._num_unwritten} bytes behind")
        with self._lock:
            self._num_unwritten += len(payload)
        self._queue.put(payload)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Write what is queued and close the file; False if the disk did not do it in time."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        sealer = FrameSealer()
        try:
            self._write(MAGIC)
            while (payload := self._queue.get()) is not None:
                self._write(sealer.seal(payload) + payload)
                with self._lock:
                    self._num_unwritten -= len(payload)
            self._file.close()
        except Exception as error:
            self.fault = f"the journal cannot be written: {error}"
            with suppress(Exception):
                self._file.close()
            with suppress(Exception):
                self._on_fault(self.fault)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


class Journal:
    """The journal of one engine: wraps the `handle` of its cores, and writes until it is closed.

    Args:
        path: of the file. A journal that is there already is kept under another name.
        header: how the cores begin.

    Raises:
        InvalidConfigError: the file cannot be made, or is there and is no journal.
    """

    def __init__(self, path: str, header: JournalHeader) -> None:
        self._path = path
        self._is_reported = False
        file = _open_new(Path(path))
        self._writer = JournalWriter(file, self._report)
        self._core = JournalCore(header, self._writer.put, key=os.urandom(KEY_BYTES), on_fault=self._report)
        self.wrap_scheduler = self._core.wrap_scheduler
        self.wrap_allocator = self._core.wrap_allocator

    def flush_if_due(self, now_ns: int) -> None:
        """Let the writer have what is old, though nothing happens."""
        self._core.flush_if_due(now_ns)

    async def close(self) -> None:
        """Write the rest and the mark of a complete journal. Waits for the disk, but not for ever."""
        with suppress(Exception):  # the report was made, or is made by the writer
            self._core.end()
        try:
            is_written = await asyncio.to_thread(self._writer.close)
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            is_written = self._writer.close()
        if not is_written:
            self._report(f"the disk did not answer for {CLOSE_TIMEOUT_S:.0f} s")

    def _report(self, why: str) -> None:
        if not self._is_reported:
            self._is_reported = True
            with suppress(Exception):  # a log that cannot be written must not stop anything
                log.error("journal.incomplete", path=self._path, why=why)


def check_journal_path(path: str) -> None:
    """Raise `InvalidConfigError` if no journal can be made there, as far as that can be seen beforehand."""
    file = Path(path)
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InvalidConfigError(
            f"journal {path} cannot be made: {file.parent} is not a folder that may be written to", field="journal"
        )
    if file.exists():
        _check_replaceable(file)


def _check_replaceable(path: Path) -> None:
    if not path.is_file():
        raise InvalidConfigError(f"journal {path} is there and is not a plain file: give another name", field="journal")
    with path.open("rb") as old:
        head = old.read(len(MAGIC))
    if head and head != MAGIC:
        raise InvalidConfigError(f"journal {path} is there and is not a journal: give another name", field="journal")


def _open_new(path: Path) -> BinaryIO:
    """Make the file; one that is there already gets the next free number behind its name."""
    try:
        if path.exists():
            _check_replaceable(path)
            number = 1
            while (kept := path.with_name(f"{path.name}.{number}")).exists():
                number += 1
            path.rename(kept)
            with suppress(Exception):
                log.info("journal.kept", path=str(kept))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidConfigError(
            f"journal {path} cannot be made: {error.strerror or error}. Give a file in a folder that may be written to",
            field="journal",
        ) from None
    return os.fdopen(descriptor, "wb", buffering=0)
