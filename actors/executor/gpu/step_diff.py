"""What a step writes to the batch that stays on the device, in pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ....kernels.step_inputs import MAX_EDITS, PIECE_ENTRY_WORDS, PIECE_WORDS, StepLayout
from ....messages.step import StartRequest
from .logit_edits import NO_EDITS, LogitEdits

Int32 = npt.NDArray[np.int32]

_PARAMS = struct.Struct("<fiffqiifffii12x")  # see `octavo.kernels.step_inputs.PARAM_WORDS`


@dataclass(slots=True)
class StepDiff:
    """Pieces of standing rows, each a run of words.

    Attributes:
        table: entries as in `StepLayout`, one behind the other; sources count from the first word.
        words: what they write, one array behind the other.
    """

    layout: StepLayout
    table: list[int] = field(default_factory=list)
    words: list[Int32] = field(default_factory=list)
    num_words: int = 0

    @property
    def num_pieces(self) -> int:
        return len(self.table) // PIECE_ENTRY_WORDS

    @property
    def packed_words(self) -> int:
        """Words that the whole packed step takes."""
        return self.layout.diff + len(self.table) + self.num_words

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
        self._write(row, 0, np.frombuffer(words, dtype=np.int32))
        self._write(row, self.layout.blocks, np.array(block_table, dtype=np.int32))
        self._write(row, self.layout.token_ids, np.frombuffer(start.token_ids, dtype=np.int32))
        if edits.biased or edits.stops:
            bias = np.array(list(edits.biased.values()), dtype=np.float32)
            self._write(row, self.layout.edits, np.array([*edits.biased, *edits.stops], dtype=np.int32))
            self._write(row, self.layout.edits + MAX_EDITS, bias.view(np.int32))

    def write_blocks(self, appended: Iterable[tuple[int, int, Sequence[int]]]) -> None:
        """Blocks that are appended to block tables.

        Args:
            appended: `(row, index, block_ids)`, the second where in the row's block table.
        """
        table, first, source = self.table, self.layout.blocks, self.num_words
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
        if ids:
            self.words.append(np.array(ids, dtype=np.int32))
            self.num_words = source

    def pack(self, words: Int32) -> int:
        """Write table and words to their place in a packed step; returns where they end."""
        begin = self.layout.diff
        end = begin + len(self.table)
        if self.table:
            table = np.array(self.table, dtype=np.int32)
            table[2::PIECE_ENTRY_WORDS] += end
            words[begin:end] = table
        for part in self.words:
            words[end : end + len(part)] = part
            end += len(part)
        return end

    def _write(self, row: int, column: int, words: Int32) -> None:
        for begin in range(0, len(words), PIECE_WORDS):
            length = min(PIECE_WORDS, len(words) - begin)
            self.table += (row, column + begin, self.num_words + begin, length)
        self.words.append(words)
        self.num_words += len(words)
