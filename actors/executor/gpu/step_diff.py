"""What a step writes to the batch that stays on the device, in pieces."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ....kernels.step_layout import MAX_EDITS, PIECE_ENTRY_WORDS, PIECE_WORDS, StepLayout
from ....messages.step import StartRequest
from .logit_edits import NO_EDITS, LogitEdits

Int32 = npt.NDArray[np.int32]

_SOURCE = 2  # which word of an entry says where the piece's words lie
_PARAMS = struct.Struct("<fiffqiifffii12x")  # see `octavo.kernels.step_layout.PARAM_WORDS`


class StepDiff:
    """Pieces of standing rows, each a run of words.

    Args:
        layout: of steps and rows.
    """

    __slots__ = ("_layout", "_num_words", "_parts", "_table")

    def __init__(self, layout: StepLayout) -> None:
        self._layout = layout
        # As in `StepLayout`, one entry behind the other, but sources count from the first word of the pieces.
        self._table: list[int] = []
        self._parts: list[bytes] = []  # the words, one part behind the other
        self._num_words = 0

    @property
    def num_pieces(self) -> int:
        return len(self._table) // PIECE_ENTRY_WORDS

    @property
    def packed_words(self) -> int:
        """Words that the whole packed step takes."""
        return self._layout.diff + len(self._table) + self._num_words

    def write_start(
        self, row: int, start: StartRequest, block_table: Sequence[int], seed: int, edits: LogitEdits = NO_EDITS
    ) -> None:
        """All that a row holds: parameters, blocks, tokens, edits.

        Args:
            seed: as a signed number.
        """
        params = start.params
        top_k = params.top_k if 0 < params.top_k < 2**31 else 0  # outside of int32 it means all, as 0 does
        words = _PARAMS.pack(
            *(params.temperature, top_k, params.top_p, params.min_p, seed, start.num_prompt_tokens),
            *(edits.min_tokens, edits.repetition, edits.frequency, edits.presence),
            *(len(edits.biased), len(edits.stops)),
        )
        self._write(row, 0, words)
        if block_table:
            self._write(row, self._layout.blocks, array("i", block_table).tobytes())
        self._write(row, self._layout.token_ids, start.token_ids)
        if edits.biased or edits.stops:
            self._write(row, self._layout.edits, array("i", (*edits.biased, *edits.stops)).tobytes())
            self._write(row, self._layout.edits + MAX_EDITS, array("f", edits.biased.values()).tobytes())

    def write_blocks(self, appended: Iterable[tuple[int, int, Sequence[int]]]) -> None:
        """Blocks that are appended to block tables.

        Args:
            appended: `(row, index, block_ids)`, the second where in the row's block table.
        """
        table, first, source = self._table, self._layout.blocks, self._num_words
        ids: list[int] = []
        for row, index, block_ids in appended:
            count = len(block_ids)
            ids += block_ids
            if count <= PIECE_WORDS:
                table += (row, first + index, source, count)
            else:
                for begin in range(0, count, PIECE_WORDS):
                    table += (row, first + index + begin, source + begin, min(PIECE_WORDS, count - begin))
            source += count
        self._parts.append(array("i", ids).tobytes())
        self._num_words = source

    def pack(self, words: Int32) -> int:
        """Write number, table and words of the pieces to their place in a packed step; returns where they end."""
        begin = self._layout.diff
        words[self._layout.num_pieces] = self.num_pieces
        if not self._table:
            return begin
        end = begin + len(self._table) + self._num_words
        words[begin:end] = np.frombuffer(b"".join((array("i", self._table), *self._parts)), dtype=np.int32)
        words[begin + _SOURCE : begin + len(self._table) : PIECE_ENTRY_WORDS] += begin + len(self._table)
        return end

    def _write(self, row: int, column: int, words: bytes) -> None:
        num_words = len(words) // 4
        for begin in range(0, num_words, PIECE_WORDS):
            length = min(PIECE_WORDS, num_words - begin)
            self._table += (row, column + begin, self._num_words + begin, length)
        self._parts.append(words)
        self._num_words += num_words
