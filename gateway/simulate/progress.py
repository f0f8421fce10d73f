"""What long commands have in common: they tell how far they are, and look first whether results can be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...messages.errors import InvalidConfigError

DELAY_S = 2.0


class Bar:
    """A progress bar; draws nothing for what is over within two seconds, and nothing at all without a terminal."""

    def __init__(self, bar: Any) -> None:  # tqdm is not typed
        self._bar = bar

    def show(self, done: int, total: int, text: str = "") -> None:
        """So many of so many, and a remark."""
        self._bar.total = total
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)


def check_writable(*paths: str | None) -> None:
    """Before hours of work: whether its results can be written.

    Raises:
        InvalidConfigError: a folder is missing, or the path is one, or it may not be written.
    """
    for path in paths:
        if path is None:
            continue
        file = Path(path).resolve()
        if not path or file.is_dir() or not file.parent.is_dir():
            raise InvalidConfigError(f"{path!r} cannot be written: give a file in a folder that exists")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise InvalidConfigError(f"{path!r} cannot be written: permission denied")


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Bar]:
    """A bar that goes away when its work is done."""
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own: a simulation allows none
    with tqdm(desc=what, unit=unit, delay=DELAY_S, disable=None, leave=False, dynamic_ncols=True) as bar:
        yield Bar(bar)
