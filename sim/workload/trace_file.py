"""A trace file's lines: plain or gzip, whatever the line ends, with errors that name file and line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

from ...messages.errors import InvalidTraceError

_CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 24
_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


class TraceFile:
    """One file of requests, read a line at a time.

    Attributes:
        name: the path as given, for messages.
        line: number of the line that was read last, from 1; 0 before the first.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._is_named = bool(str(path))
        self.name = str(path) or "''"
        self.line = 0

    def fail(self, message: str, advice: str = "", *, line: int | None = None) -> NoReturn:
        """Refuse the file because of its current line (or `line`; 0: as a whole)."""
        raise InvalidTraceError(message, file=self.name, line=self.line if line is None else line, advice=advice)

    def lines(self) -> Iterator[bytes]:
        """Each line without its end (LF or CRLF) and without a byte order mark; blank ones too.

        Raises:
            InvalidTraceError: no such file, no text, or broken compression.
        """
        self.line = 0
        rest = b""
        stream: gzip.GzipFile | BufferedReader | None = None
        try:
            stream = self._open()
            while chunk := stream.read1(_CHUNK_BYTES):  # what there is, though the rest be damaged
                if self.line == 0 and not rest:
                    chunk = self._without_mark(chunk)
                parts = (rest + chunk).split(b"\n")
                rest = parts.pop()
                for part in parts:
                    self.line += 1
                    yield part[:-1] if part.endswith(b"\r") else part
                if len(rest) > MAX_LINE_BYTES:
                    self.line += 1
                    self.fail(f"the line is longer than {MAX_LINE_BYTES} bytes", "Is this a trace, one request a line?")
            if rest:
                self.line += 1
                yield rest[:-1] if rest.endswith(b"\r") else rest
        except EOFError:
            self.fail(f"the compressed data ends early, after line {self.line}", "Copy or download it again", line=0)
        except (gzip.BadGzipFile, zlib.error) as error:
            self.fail(f"the compressed data is damaged after line {self.line}: {error}", "Copy it again", line=0)
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror or error}", line=0)
        finally:
            if stream is not None:
                stream.close()

    def starts_with(self, magic: bytes) -> bool:
        """Whether the file, as it is stored, begins so; False as well if it is none."""
        if not self._path.is_file():
            return False
        try:
            with self._path.open("rb") as file:
                return file.read(len(magic)) == magic
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror or error}", line=0)

    def _open(self) -> gzip.GzipFile | BufferedReader:
        if not self._is_named or not self._path.exists():
            self.fail("no such file", line=0)
        if self._path.is_dir():
            self.fail("is a folder", "Name one trace file in it", line=0)
        if not self._path.is_file():
            self.fail("is not a regular file", "A trace is read more than once: write it to a file first", line=0)
        with self._path.open("rb") as file:
            magic = file.read(2)
        if not magic:
            self.fail("is empty", line=0)
        if magic == _GZIP_MAGIC:
            return gzip.GzipFile(self._path, "rb")
        return self._path.open("rb")

    def _without_mark(self, chunk: bytes) -> bytes:
        if chunk.startswith(_UTF16_BOMS):
            self.fail("is UTF-16 text", "Save it as UTF-8", line=0)
        if b"\0" in chunk[:4096]:
            self.fail("is a binary file, not a trace", "A trace is CSV or JSON lines, plain or gzip", line=0)
        return chunk.removeprefix(_UTF8_BOM)
