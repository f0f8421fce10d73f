"""Reads a journal: verifies each frame, and returns its records one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from ...actors.journal.core import (
    FIRST_CHECK,
    FORMAT_VERSION,
    MAGIC,
    MAX_FRAME_BYTES,
    MAX_FRAME_RECORDS,
    MAX_REQUEST_TOKENS,
    PREFIX_BYTES,
    Ended,
    FrameSealer,
    HeardRecord,
    JournalHeader,
    Raised,
    Record,
    Submitted,
    expand_marks,
)
from ...messages.errors import InvalidJournalError

_decode_records = msgspec.msgpack.Decoder(list[Record]).decode
_decode_header = msgspec.msgpack.Decoder(JournalHeader).decode

_ARRAY_HEADERS = {0xDC: 3, 0xDD: 5}  # first byte -> length of an array's header


class JournalEnd(msgspec.Struct, frozen=True):
    """How a journal ends.

    Attributes:
        is_complete: it holds everything up to the engine's end.
        why: what is missing, if it is not complete.
        num_frames: that were read and are intact, the header's included.
        num_bytes: of the file.
        num_torn_bytes: of a last frame that was not written to its end.
    """

    is_complete: bool
    why: str
    num_frames: int
    num_bytes: int
    num_torn_bytes: int = 0


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One message heard, as recorded.

    Attributes:
        frame: number of the frame, from 0 (the header's).
        now_ns: the clock when it was heard.
        record: what was heard.
        check: of the answers; 0 if there were none.
        raised: type of the exception that the core raised instead of answering; else empty.
    """

    frame: int
    now_ns: int
    record: int | HeardRecord
    check: int
    raised: str


class JournalReader:
    """One pass over a journal.

    Args:
        path: of the file.

    Raises:
        InvalidJournalError: it is not there, no journal, of a later version, or its header is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.end: JournalEnd | None = None
        self._sealer = FrameSealer()
        self._num_frames = 0
        self._offset = len(MAGIC)
        self._num_torn_bytes = 0
        try:
            self._file: BinaryIO = Path(path).open("rb")  # noqa: SIM115 (closed with the reader)
        except OSError as error:
            raise InvalidJournalError(f"journal {path} cannot be read: {error.strerror or error}") from None
        try:
            self._num_bytes = os.fstat(self._file.fileno()).st_size
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> JournalReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _fail(self, what: str) -> InvalidJournalError:
        return InvalidJournalError(f"journal {self.path}, frame {self._num_frames} at byte {self._offset}: {what}")

    def _read_header(self) -> JournalHeader:
        try:
            magic = self._file.read(len(MAGIC))
        except OSError as error:  # a folder, say
            raise InvalidJournalError(f"journal {self.path} cannot be read: {error.strerror or error}") from None
        if magic != MAGIC:
            raise InvalidJournalError(f"{self.path} is not a journal: give a file that --journal wrote")
        payload = self._read_frame()
        if payload is None:
            raise self._fail("the file ends within its header: nothing was recorded")
        try:
            version = msgspec.msgpack.decode(payload, type=dict[str, msgspec.Raw]).get("version")
            if version is None or msgspec.msgpack.decode(version, type=int) != FORMAT_VERSION:
                raise self._fail(
                    f"it is of another version of the format; this program reads {FORMAT_VERSION}: use the one that "
                    "wrote it"
                )
            header = _decode_header(payload)
        except (ValueError, RecursionError) as error:
            raise self._fail(f"the header is malformed: {error}") from None
        self._pass_frame(payload)
        return header

    def _read_frame(self) -> bytes | None:
        """The next frame's payload, verified; None if the file ends before it does."""
        prefix = self._file.read(PREFIX_BYTES)
        self._num_torn_bytes = len(prefix)
        if len(prefix) < PREFIX_BYTES:
            return None
        length = FrameSealer.payload_length(prefix)
        if length < 0:
            raise self._fail("its length was changed after it was written")
        if length > MAX_FRAME_BYTES:
            raise self._fail(f"it claims {length} bytes, of {MAX_FRAME_BYTES} at most")
        if self._offset + PREFIX_BYTES + length > self._num_bytes:
            self._num_torn_bytes = self._num_bytes - self._offset
            return None
        payload = self._file.read(length)
        if len(payload) < length:
            self._num_torn_bytes += len(payload)
            return None
        if self._sealer.seal(payload) != prefix:
            raise self._fail("its digest does not match: this frame was changed after it was written")
        return payload

    def _pass_frame(self, payload: bytes) -> None:
        self._num_frames += 1
        self._offset += PREFIX_BYTES + len(payload)
        self._num_torn_bytes = 0

    def _records(self) -> Iterator[Record]:
        while (payload := self._read_frame()) is not None:
            if _num_elements(payload) > MAX_FRAME_RECORDS:
                raise self._fail(f"it holds more than {MAX_FRAME_RECORDS} records")
            try:
                records = _decode_records(payload)
            except (ValueError, RecursionError) as error:
                raise self._fail(f"a record is malformed: {error}") from None
            yield from records
            self._pass_frame(payload)

    def entries(self) -> Iterator[Entry]:
        """Yield what was heard, in order; `end` is set when it is exhausted. Once only.

        Raises:
            InvalidJournalError: a frame was changed, with its number and offset.
        """
        now_ns = self.header.start_ns
        heard: int | HeardRecord | None = None
        heard_frame = heard_ns = 0
        ended: Ended | None = None
        for record in self._records():
            if ended is not None:
                raise self._fail("something follows the last record")
            if type(record) is int and record >= 0:
                now_ns += record
                if now_ns >= 1 << 63:
                    raise self._fail("the clock runs past the end of time")
            elif (is_check := type(record) is int and record <= FIRST_CHECK) or type(record) is Raised:
                if heard is None:
                    raise self._fail("an answer follows no message")
                check = record if is_check else 0
                raised = "" if is_check else record.error  # type: ignore[union-attr]  # is a Raised
                yield Entry(heard_frame, heard_ns, heard, check, raised)  # type: ignore[arg-type]  # is an int
                heard = None
            else:
                if heard is not None:
                    yield Entry(heard_frame, heard_ns, heard, 0, "")
                    heard = None
                if isinstance(record, Ended):
                    ended = record
                elif type(record) is int and not -5 <= record <= -1:
                    raise self._fail(f"there is no record {record}")
                else:
                    heard = record  # type: ignore[assignment]  # neither Raised nor Ended
                    heard_frame, heard_ns = self._num_frames, now_ns
        if heard is not None:
            yield Entry(heard_frame, heard_ns, heard, 0, "")
        self.end = self._describe_end(ended)

    def _describe_end(self, ended: Ended | None) -> JournalEnd:
        torn = self._num_torn_bytes
        if ended is not None:
            why = ended.why_incomplete and f"recording stopped before the engine did: {ended.why_incomplete}"
            if torn:
                raise self._fail("something follows the last record")
        elif torn:
            why = f"the last frame was not written to its end ({torn} bytes): the engine was killed, or the disk failed"
        else:
            why = "there is no mark of its end: the engine was killed, or runs still"
        return JournalEnd(not why, why, self._num_frames, self._num_bytes, torn)


def submitted_tokens(record: Submitted, header: JournalHeader) -> bytes:
    """The tokens that a request came with, int32, prompt then outputs: as they were, or disguised.

    Raises:
        InvalidJournalError: they are not as many as the record claims.
    """
    num_prompt, num_output = record.num_prompt_tokens, record.num_output_tokens
    num_tokens = num_prompt + num_output
    if min(num_prompt, num_output) < 0 or num_tokens > MAX_REQUEST_TOKENS:
        raise InvalidJournalError(f"request {record.request_id} claims {num_prompt} and {num_output} tokens")
    tokens = record.tokens
    if not header.has_tokens:
        try:
            tokens = expand_marks(tokens, num_tokens, header.scheduler.block_size)
        except ValueError as error:
            raise InvalidJournalError(f"request {record.request_id}: {error}") from None
    if len(tokens) != 4 * num_tokens:
        raise InvalidJournalError(f"request {record.request_id} claims {num_tokens} tokens, and has {len(tokens) // 4}")
    return tokens


def _num_elements(payload: bytes) -> int:
    """Elements that an array in msgpack claims, before it is decoded."""
    first = payload[0] if payload else 0
    if 0x90 <= first <= 0x9F:
        return first & 0x0F
    return int.from_bytes(payload[1 : _ARRAY_HEADERS.get(first, 1)], "big")
