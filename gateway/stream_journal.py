"""The streams that clients wait for, on disk, so that a server that died can go on with them when it starts again.

    file    magic, frame, frame, ...
    frame   payload's length (u32), CRC-32 of the payload (u32), payload (msgpack); integers little endian

A payload is a `StreamRecord`, when its stream was accepted, or a response id, when it ended. Frames are handed to the
system one by one as they come and not synced: the death of the process, by whatever signal, loses nothing; a power
failure may lose what the system had not written yet. A frame that was cut short by the end is as if it had not begun.
When the journal is opened, and when it has grown too long, only the unfinished records are kept: they are written to a
new file, which is synced and takes the old one's place.

The file holds what clients sent: only its owner may read it (mode 0600).
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from ..messages.errors import InvalidConfigError
from .generation_config import RequestDefaults

log = structlog.get_logger("octavo.stream_journal")

FILE_NAME: Final = "streams.octj"
LOCK_NAME: Final = "streams.lock"
MAX_BYTES: Final = 64 * 1024 * 1024
"""A longer file is compacted, unless more than half of it is unfinished streams."""

MAX_ATTEMPTS: Final = 3
"""A stream that outlived so many starts of the server without getting any further is held to be what kills it, and is
given up."""

_MAGIC: Final = b"octavos\x01"
_PREFIX: Final = struct.Struct("<II")


class StreamRecord(msgspec.Struct, frozen=True):
    """One accepted request whose answer is streamed: all that its answer is a function of.

    Attributes:
        response_id: as told to the client; events are numbered within it.
        created: as told to the client, Unix seconds.
        kind: which endpoint.
        body: as the client sent it.
        seeds: one for each prompt, if the body names none.
        owner: digest of the credentials it came with; only the same may have its events.
        num_attempts: how many servers have begun with it since it got further.
        num_events: told to clients when it was last noted to have got further than ever before.
        defaults: for what the body does not say; None is those of the server that reads it.
    """

    response_id: str
    created: int
    kind: Literal["chat", "completion"]
    body: bytes
    seeds: tuple[int, ...] = ()
    owner: str = ""
    num_attempts: int = 0
    num_events: int = 0
    defaults: RequestDefaults | None = None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StreamRecord | str).decode


class StreamJournal:
    """Appends to the journal in a folder. One process at a time: a lock is held until `close`.

    Args:
        folder: made if it is not there.
        max_bytes: of the file, before it is compacted.

    Attributes:
        to_resume: what the last process left unfinished, in order of arrival.
        num_given_up: records that outlived `MAX_ATTEMPTS` starts and are not tried again.
        num_failed_writes: frames that could not be written (a full disk); their streams cannot be taken up again.

    Raises:
        InvalidConfigError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path = folder / FILE_NAME
        self._max_bytes = max_bytes
        self.num_failed_writes = 0
        self.num_given_up = 0
        self._fd = -1
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidConfigError(f"no journal of streams can be kept in {folder}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = self.unfinished(folder)
        except OSError as error:
            os.close(self._lock)
            why = "another server uses it" if isinstance(error, BlockingIOError) else error.strerror
            raise InvalidConfigError(
                f"no journal of streams can be kept in {folder}: {why}. Give each server a folder of its own"
            ) from None
        except InvalidConfigError:
            os.close(self._lock)
            raise
        self.to_resume: list[StreamRecord] = []
        for record in before:
            if record.num_attempts >= MAX_ATTEMPTS:
                self.num_given_up += 1
                log.error("stream.given_up", response_id=record.response_id, attempts=record.num_attempts)
            else:
                self.to_resume.append(msgspec.structs.replace(record, num_attempts=record.num_attempts + 1))
        self._frames = {record.response_id: _frame(_encode(record)) for record in self.to_resume}
        self._compact()

    @staticmethod
    def unfinished(folder: Path) -> list[StreamRecord]:
        """Records in a folder's journal whose streams have not ended, in order of arrival; changes nothing.

        Raises:
            InvalidConfigError: what lies there is no journal.
            OSError: it cannot be read.
        """
        try:
            data = (folder / FILE_NAME).read_bytes()
        except FileNotFoundError:
            return []
        if data and not data.startswith(_MAGIC) and not _MAGIC.startswith(data):
            raise InvalidConfigError(f"{folder / FILE_NAME} is no journal of streams: move it away")
        records: dict[str, StreamRecord] = {}
        for entry in _entries(data):
            if isinstance(entry, str):
                records.pop(entry, None)
            else:
                records[entry.response_id] = entry
        return list(records.values())

    def accepted(self, record: StreamRecord) -> None:
        """Note a stream before its first event leaves."""
        frame = _frame(_encode(record))
        self._frames[record.response_id] = frame
        self._append(frame)

    def got_further(self, record: StreamRecord, num_events: int) -> None:
        """Note that a stream which was taken up has had more events than under any server before: it kills none."""
        if record.response_id in self._frames:
            self.accepted(msgspec.structs.replace(record, num_attempts=0, num_events=num_events))

    def ended(self, response_id: str) -> None:
        """Note that nobody will ask for this stream any more. Unknown ids are ignored."""
        if self._frames.pop(response_id, None) is not None:
            self._append(_frame(_encode(response_id)))

    @property
    def num_unfinished(self) -> int:
        return len(self._frames)

    def close(self) -> None:
        """Give the file and its lock back. What has not ended will be unfinished for whoever opens it next."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            os.close(self._lock)

    def _append(self, frame: bytes) -> None:
        if self._fd < 0:
            return
        try:
            if os.write(self._fd, frame) < len(frame):
                raise OSError("the disk is full")
            self._size += len(frame)
        except OSError as error:
            self.num_failed_writes += 1
            with suppress(OSError):  # else nothing behind the torn frame could be read
                os.ftruncate(self._fd, self._size)
            if self.num_failed_writes == 1:
                log.error("stream_journal.write_failed", path=str(self._path), why=str(error))
            return
        if self._size > self._max_bytes and self._size > 2 * self._live_bytes():
            try:
                self._compact()
            except InvalidConfigError as error:
                self.num_failed_writes += 1
                log.error("stream_journal.write_failed", path=str(self._path), why=str(error))

    def _live_bytes(self) -> int:
        return sum(map(len, self._frames.values()))

    def _compact(self) -> None:
        """Put a file with the unfinished records alone in the journal's place, durably."""
        new = self._path.with_suffix(".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.fchmod(fd, 0o600)  # it may have been there before
                size = _write_all(fd, [_MAGIC, *self._frames.values()])
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
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size = fd, size


def _frame(payload: bytes) -> bytes:
    return _PREFIX.pack(len(payload), zlib.crc32(payload)) + payload


def _write_all(fd: int, parts: Iterable[bytes]) -> int:
    data = memoryview(b"".join(parts))
    size = len(data)
    while data:
        data = data[os.write(fd, data) :]
    return size


def _entries(data: bytes) -> Iterable[StreamRecord | str]:
    """What the whole frames say; the first that is torn or damaged ends it."""
    position = len(_MAGIC)
    while position + _PREFIX.size <= len(data):
        length, checksum = _PREFIX.unpack_from(data, position)
        payload = data[position + _PREFIX.size : position + _PREFIX.size + length]
        position += _PREFIX.size + length
        if not length or len(payload) < length or zlib.crc32(payload) != checksum:
            return
        try:
            yield _decode(payload)
        except msgspec.DecodeError:  # of a later version; its frame is whole, so what follows can be read
            log.warning("stream_journal.unknown_entry", bytes=length)
