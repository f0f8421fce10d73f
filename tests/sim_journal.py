"""A journal of cores under virtual time: no thread, no randomness."""

from __future__ import annotations

from typing import BinaryIO

from octavo.actors.journal.core import MAGIC, FrameSealer, JournalCore, JournalHeader


class SimJournal(JournalCore):
    """Writes the journal of two simulated cores as it comes; the same run gives the same bytes.

    Put `wrap_scheduler` and `wrap_allocator` around their `handle`, and call `end` last. Steps that are skipped
    (`SimConfig.fast_forward`) pass by the journal: switch that off.

    Args:
        file: open for writing; stays open.
        header: how the cores begin.
    """

    def __init__(self, file: BinaryIO, header: JournalHeader) -> None:
        self._file = file
        self._sealer = FrameSealer()
        file.write(MAGIC)
        super().__init__(header, self._write, on_fault=_fail)

    def _write(self, payload: bytes) -> None:
        self._file.write(self._sealer.seal(payload))
        self._file.write(payload)


def _fail(why: str) -> None:
    raise RuntimeError(f"the journal cannot be kept: {why}")  # a live engine would go on; a test should not
