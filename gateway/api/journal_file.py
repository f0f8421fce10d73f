"""The journal of streams' file, written by a thread of its own: a disk that stands still holds up no event loop."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog

from ...messages.errors import InvalidConfigError

log = structlog.get_logger("octavo.stream_journal")

MAX_UNWRITTEN_BYTES: Final = 64 * 1024 * 1024
"""Frames that wait for a disk; one that finds no more room is lost, as one is for which the disk has none."""

CLOSE_S: Final = 10.0
"""How long a close waits for a disk that stands still."""


class JournalFile:
    """Frames behind a magic number, appended in order; now and then written anew.

    A frame that cannot be written whole is taken back, so that what comes behind it can be read.

    Args:
        path: a file that is there already is replaced.
        magic: the file's beginning.
        frames: what it holds at first; on the disk when this returns.

    Attributes:
        num_failed: frames that were not written, and rewritings that did not take place.

    Raises:
        InvalidConfigError: the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        magic: bytes,
        frames: Iterable[bytes],
        *,
        max_unwritten_bytes: int = MAX_UNWRITTEN_BYTES,
    ) -> None:
        self.num_failed = 0
        self._path = path
        self._magic = magic
        self._max_unwritten_bytes = max_unwritten_bytes
        self._num_unwritten = 0
        self._jobs: deque[Callable[[], None]] = deque()  # the first of them is under way
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._fd, self._size = self._write_anew(frames)

    def append(self, frame: bytes, on_written: Callable[[], None] | None = None) -> None:
        """Have a frame written, without waiting for it.

        Args:
            on_written: called once the system has it, or it is lost; on any thread, and must not block.
        """
        with self._changed:
            if not self._is_closed:
                if self._num_unwritten + len(frame) <= self._max_unwritten_bytes:
                    self._num_unwritten += len(frame)
                    self._put(lambda: self._append(frame, on_written))
                    return
                self._fail(f"{self._num_unwritten} bytes wait for the disk")
        if on_written is not None:
            on_written()

    def rewrite(self, frames: tuple[bytes, ...]) -> None:
        """Have these frames alone take the place of all that were appended until now, durably; waits for nothing."""
        with self._changed:
            if not self._is_closed:
                self._put(lambda: self._rewrite(frames))

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait for all that was asked for until now; False if the disk did not do it in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Write what waits and close the file; False if the disk did not do it in time. Safe to call again."""
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._put(lambda: os.close(self._fd))
        return self.flush(timeout_s)

    def _put(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="octavo-streams", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job = self._jobs[0]
            try:
                job()
            except Exception as error:
                with self._changed:
                    self._fail(str(error))
            with self._changed:
                self._jobs.popleft()
                self._changed.notify_all()
                if self._is_closed and not self._jobs:
                    return

    def _append(self, frame: bytes, on_written: Callable[[], None] | None) -> None:
        try:
            if os.write(self._fd, frame) < len(frame):
                raise OSError("the disk is full")
            self._size += len(frame)
        except OSError:
            with suppress(OSError):  # else nothing behind the torn frame could be read
                os.ftruncate(self._fd, self._size)
            raise
        finally:
            with self._changed:
                self._num_unwritten -= len(frame)
            if on_written is not None:
                on_written()

    def _rewrite(self, frames: tuple[bytes, ...]) -> None:
        old = self._fd
        self._fd, self._size = self._write_anew(frames)
        os.close(old)

    def _write_anew(self, frames: Iterable[bytes]) -> tuple[int, int]:
        """Put a file with these frames in the journal's place, durably; returns its descriptor and length."""
        new = self._path.with_suffix(".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(fd, 0o600)  # it may have been there before
                size = _write_all(fd, [self._magic, *frames])
                os.fsync(fd)
                new.replace(self._path)
                folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise InvalidConfigError(
                f"no journal of streams can be kept in {self._path.parent}: {error.strerror or error}"
            ) from None
        return fd, size

    def _fail(self, why: str) -> None:
        self.num_failed += 1
        if self.num_failed == 1:
            with suppress(Exception):  # a log that cannot be written must not stop anything
                log.error("stream_journal.write_failed", path=str(self._path), why=why)


def _write_all(fd: int, parts: Iterable[bytes]) -> int:
    data = memoryview(b"".join(parts))
    size = len(data)
    while data:
        data = data[os.write(fd, data) :]
    return size
