"""The streams that clients wait for, on disk, so that a server that died can go on with them when it starts again.

    file    magic, frame, frame, ...
    frame   payload's length (u32), CRC-32 of the payload (u32), CRC-32 of these 8 bytes (u32), payload (msgpack);
            integers little endian

A payload is a `StreamRecord`, when its stream was accepted, or a response id, when it ended. A thread hands the frames
to the system one by one as they come, and does not sync them: a stream's first event leaves once its record was handed
over, so that the death of the process, by whatever signal, loses no stream that a client has heard of; a power failure
may lose what the system had not written yet. Of an end that was not handed over the next server learns when nobody
comes back for the stream. A frame that was cut short by the end is as if it had not begun.
A frame whose payload is damaged is told of and passed over; behind a damaged head nothing is looked for, as bodies that
clients sent could pass for frames.
When the journal is opened, and when it has grown too long, only the unfinished records are kept: they are written to a
new file, which is synced and takes the old one's place.

The file holds what clients sent: only its owner may read it (mode 0600).
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from ...messages.errors import InvalidConfigError
from ..generation_config import RequestDefaults
from .journal_file import JournalFile

log = structlog.get_logger("octavo.stream_journal")

FILE_NAME: Final = "streams.octj"
LOCK_NAME: Final = "streams.lock"
MAX_BYTES: Final = 64 * 1024 * 1024
"""A longer file is compacted, unless more than half of it is unfinished streams."""

MAX_ATTEMPTS: Final = 3
"""A stream that outlived so many starts of the server without getting any further is held to be what kills it, and is
given up."""

_MAGIC: Final = b"octavos\x02"
_HEAD: Final = struct.Struct("<III")


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
        num_late: streams that did not wait any longer for their record to be written.

    Raises:
        InvalidConfigError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._path = folder / FILE_NAME
        self._max_bytes = max_bytes
        self.num_late = 0
        self.num_given_up = 0
        self._is_open = True
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
        self._num_bytes = sum(map(len, self._frames.values()))  # of the file, once all is written
        try:
            self._file = JournalFile(self._path, _MAGIC, self._frames.values())
        except InvalidConfigError:
            os.close(self._lock)
            raise

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

    @property
    def num_failed_writes(self) -> int:
        """Notes that could not be written, or not in time; those streams cannot be taken up again."""
        return self._file.num_failed + self.num_late

    def accepted(self, record: StreamRecord, on_written: Callable[[], None] | None = None) -> None:
        """Note a stream.

        Args:
            on_written: called, on any thread, when its first event may leave: the system has the note, or it is lost.
        """
        frame = _frame(_encode(record))
        self._frames[record.response_id] = frame
        self._append(frame, on_written)

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
        """Give the file and its lock back, once all is written or the disk has had its time.

        What has not ended will be unfinished for whoever opens it next.
        """
        if self._is_open:
            self._is_open = False
            if not self._file.close():
                log.error("stream_journal.not_closed", path=str(self._path), why="the disk does not answer")
            os.close(self._lock)

    def flush(self) -> bool:
        """Wait until the system has every note; False if the disk did not answer in time."""
        return self._file.flush()

    def _append(self, frame: bytes, on_written: Callable[[], None] | None = None) -> None:
        self._file.append(frame, on_written)
        self._num_bytes += len(frame)
        if self._num_bytes > self._max_bytes and self._num_bytes > 2 * (live := sum(map(len, self._frames.values()))):
            self._num_bytes = live
            self._file.rewrite(tuple(self._frames.values()))


def _frame(payload: bytes) -> bytes:
    return _head(len(payload), zlib.crc32(payload)) + payload


def _head(length: int, checksum: int) -> bytes:
    return _HEAD.pack(length, checksum, zlib.crc32(_HEAD.pack(length, checksum, 0)[:8]))


def _entries(data: bytes) -> Iterable[StreamRecord | str]:
    """What the whole frames say, up to one that was cut short or whose head is damaged."""
    position = len(_MAGIC)
    while position + _HEAD.size <= len(data):
        head = data[position : position + _HEAD.size]
        length, checksum, _ = _HEAD.unpack(head)
        if head != _head(length, checksum):
            log.error("stream_journal.damaged", at=position, lost_bytes=len(data) - position)
            return
        payload = data[position + _HEAD.size : position + _HEAD.size + length]
        if len(payload) < length:
            return
        if zlib.crc32(payload) != checksum:
            log.error("stream_journal.damaged", at=position, lost_bytes=length)
        else:
            try:
                yield _decode(payload)
            except msgspec.DecodeError:  # of a later version; its frame is whole, so what follows can be read
                log.warning("stream_journal.unknown_entry", bytes=length)
        position += _HEAD.size + length
