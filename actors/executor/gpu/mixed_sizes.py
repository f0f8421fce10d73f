"""Sizes of steps that compute chunks of prompts beside decodes, for graphs: what is less than a size is padded to it.

A step's launches follow from two cuts of its tokens: the decodes, of one token each, come first, and the chunks behind
them. A graph has both cuts where it was captured, so that padding stands behind the decodes and behind the chunks:

    rows    decodes | rows of one token that is nobody's | chunks | rows without tokens
    tokens  decodes | those tokens                       | chunks | tokens of no row
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST_CHUNKS = 16
"""Rows of chunks in each size; a row without a chunk costs next to nothing but its share of sampling."""

_FEWEST_DECODES = 8
_WIDEST_STEP = 64


@dataclass(frozen=True, slots=True)
class MixedSize:
    """Rows of one token, and tokens of the chunks behind them."""

    num_decodes: int
    num_chunk_tokens: int

    @property
    def num_rows(self) -> int:
        """Also samples, at most."""
        return self.num_decodes + MOST_CHUNKS

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + self.num_chunk_tokens


class MixedSizes:
    """Some numbers of decodes, each with every number of chunks' tokens.

    Args:
        max_num_seqs: requests in one step.
        chunk_tokens: tokens of the chunks of one step; empty for no mixed sizes.
    """

    def __init__(self, max_num_seqs: int, chunk_tokens: Sequence[int]) -> None:
        self._chunk_tokens = sorted(set(chunk_tokens))
        self._decodes = rungs(max_num_seqs) if chunk_tokens else []

    def __iter__(self) -> Iterator[MixedSize]:
        for num_decodes in self._decodes:
            for num_chunk_tokens in self._chunk_tokens:
                yield MixedSize(num_decodes, num_chunk_tokens)

    @property
    def most_rows(self) -> int:
        """Of any size; 0 without sizes."""
        return self._decodes[-1] + MOST_CHUNKS if self._decodes else 0

    @property
    def most_tokens(self) -> int:
        """Likewise."""
        return self._decodes[-1] + self._chunk_tokens[-1] if self._decodes else 0

    def find(self, num_decodes: int, num_chunks: int, num_chunk_tokens: int) -> MixedSize | None:
        """The smallest size that holds a step; None if none does."""
        decodes = bisect_left(self._decodes, num_decodes)
        tokens = bisect_left(self._chunk_tokens, num_chunk_tokens)
        if num_chunks > MOST_CHUNKS or decodes == len(self._decodes) or tokens == len(self._chunk_tokens):
            return None
        return MixedSize(self._decodes[decodes], self._chunk_tokens[tokens])


def rungs(most: int) -> list[int]:
    """8, 16, 32, 64, 128, 192, then half as many more each, and at last `most`: few, so that there are not many graphs.

    A decode that is padded costs a row of products, whose weights are read anyway where rows are so few.
    """
    chosen = [min(_FEWEST_DECODES, most)]
    while chosen[-1] < most:
        last = chosen[-1]
        chosen.append(min(most, last + min(last, max(_WIDEST_STEP, last // 2))))
    return chosen
