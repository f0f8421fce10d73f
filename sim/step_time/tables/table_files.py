"""Reading measured CSV files, plain or gzip, with errors that name file and line."""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ....messages.errors import InvalidConfigError


class TableFile:
    """One CSV file with a header.

    Args:
        path: ends in `.csv` or `.csv.gz`.

    Raises:
        InvalidConfigError: it cannot be read, or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InvalidConfigError(f"{path} cannot be read as a table: {error}", field="profile") from None
        self._rows = list(csv.reader(io.StringIO(text, newline="")))
        if len(self._rows) < 2:
            raise InvalidConfigError(f"{path} holds no rows of measurements", field="profile")
        self.columns: list[str] = self._rows[0]

    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """The named columns of each row, as text.

        Raises:
            InvalidConfigError: a column is missing, or a row is short.
        """
        for _, row in self._numbered(names):
            yield row

    def numbers(self, names: Sequence[str]) -> Iterator[tuple[float, ...]]:
        """The same as numbers from 0 up.

        Raises:
            InvalidConfigError: as `rows`, and a field is no such number.
        """
        for number, row in self._numbered(names):
            try:
                values = tuple([float(text) for text in row])
            except ValueError:
                values = (math.nan,)
            if not all(math.isfinite(value) and value >= 0.0 for value in values):
                raise InvalidConfigError(
                    f"{self.path}:{number}: {', '.join(names)} are {', '.join(row)}, but must be numbers from 0 up",
                    field="profile",
                )
            yield values

    def _numbered(self, names: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Line number and the named columns; blank lines are passed over."""
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise InvalidConfigError(
                f"{self.path}: column {', '.join(missing)} is missing; there are {', '.join(self.columns)}",
                field="profile",
            )
        places = [self.columns.index(name) for name in names]
        for number, row in enumerate(self._rows[1:], start=2):
            if not row:
                continue
            if len(row) != len(self.columns):
                raise InvalidConfigError(
                    f"{self.path}:{number}: {len(row)} fields, but the header has {len(self.columns)}", field="profile"
                )
            yield number, tuple([row[place] for place in places])


def find_tables(folder: Path) -> dict[str, TableFile]:
    """Every CSV file of a folder by its name without `.csv` and `.gz`, in the order of names."""
    found = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.removesuffix(".gz")
        if path.is_file() and stem.endswith(".csv"):
            found[stem.removesuffix(".csv")] = TableFile(path)
    return found
