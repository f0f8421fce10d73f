"""What the host knows of the batch that stays on the device.

The host mirrors what follows from the plans alone: a request's row, how many tokens it has and how many are computed,
how many blocks. It never needs the tokens, so a step can be packed while the ones before it are running.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress, count

import numpy as np

from ....kernels.step_layout import StepLayout
from ....messages.ids import RequestId
from ....messages.step import ExecuteStep, StartRequest
from ..sampling_state import SamplingState
from .decode_sheet import CONTEXT_LENS, QUERY_START, SAMPLE_ROWS, DecodeSheet, sheet_of
from .mixed_sizes import MixedSizes
from .packed_step import PackedStep, Standing
from .step_diff import Int32, StepDiff


class DeviceBatch:
    """Rows of the standing batch, without their contents.

    Args:
        layout: of steps and rows.
        num_state_rows: requests that can stand at once.
        mixed_sizes: that steps with chunks are padded to, where one fits.
    """

    def __init__(self, layout: StepLayout, num_state_rows: int, mixed_sizes: MixedSizes | None = None) -> None:
        self._layout = layout
        self._mixed_sizes = mixed_sizes or MixedSizes(layout.max_rows, ())
        self._free_rows = list(range(num_state_rows - 1, -1, -1))
        self._standing: dict[RequestId, Standing] = {}
        self._num_special = 0  # standing that are not plain
        self._num_with_stops: dict[frozenset[int], int] = {}
        self._any_stop: frozenset[int] | None = frozenset()
        self._decodes = DecodeSheet(layout)
        self._dropped: list[RequestId] = []  # since the last step
        self._every_row = np.arange(layout.max_rows, dtype=np.int32)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._standing

    def __len__(self) -> int:
        return len(self._standing)

    def num_output_tokens(self, sampled: Sequence[Standing]) -> list[int]:
        """Of each: sampled so far, those of steps in flight included."""
        self._decodes.settle()
        return [standing.num_tokens - standing.num_prompt_tokens for standing in sampled]

    @property
    def has_special(self) -> bool:
        """Whether any request that stands is not plain."""
        return self._num_special > 0

    @property
    def any_stop(self) -> frozenset[int]:
        """The tokens that end some request that stands."""
        if self._any_stop is None:
            self._any_stop = frozenset().union(*self._num_with_stops)
        return self._any_stop

    def drop(self, request_id: RequestId) -> None:
        """Forget a request; unknown ids are ignored (its start may have been lost with an epoch)."""
        standing = self._standing.pop(request_id, None)
        if standing is not None:
            self._dropped.append(request_id)
            self._free_rows.append(standing.row)
            self._num_special -= not standing.is_plain
            self._count_stops(standing.sampling.stop_token_ids, -1)

    def fail(self, standing: Standing) -> None:
        """Sample no more for this request: what it has is not known to be a sequence any longer."""
        standing.has_failed = True
        if self._standing.get(standing.request_id) is standing:
            self._decodes.clear()  # which holds rows that will sample

    def clear(self) -> None:
        """Forget every request."""
        for request_id in list(self._standing):
            self.drop(request_id)
        self._decodes.clear()
        self._dropped.clear()

    def start(self, start: StartRequest, num_blocks: int, sampling: SamplingState) -> Standing:
        """Give a request a row."""
        request_id = start.request_id
        if request_id in self._dropped:
            self._dropped.remove(request_id)
            self._decodes.clear()  # which may hold it, and it is another now
        is_plain = start.params.logprobs is None and not sampling.is_processed
        standing = self._standing[request_id] = Standing(
            request_id,
            self._free_rows.pop(),
            start.num_prompt_tokens,
            sampling,
            is_plain,
            num_tokens=len(start.token_ids) // 4,
            num_computed=start.num_computed_tokens,
            num_blocks=num_blocks,
        )
        self._num_special += not is_plain
        self._count_stops(sampling.stop_token_ids, 1)
        return standing

    def append_blocks(self, step: ExecuteStep) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Count the blocks that the step appends: `(row, index in its block table, block_ids)`."""
        for request_id, block_ids in step.append_blocks:
            standing = self._standing[request_id]
            yield standing.row, standing.num_blocks, block_ids
            standing.num_blocks += len(block_ids)

    def pack(self, step: ExecuteStep, diff: StepDiff, words: Int32, *, pads: bool = True) -> PackedStep:
        """Write the packed step to `words`, and count its tokens as computed and its samples as tokens.

        Args:
            words: `diff.packed_words` at least; every word up to there is written.
            pads: a step with chunks may be laid out for one of the mixed sizes.
        """
        decodes, request_ids, num_tokens = self._decodes, step.request_ids, step.num_tokens
        num_rows, num_ones = len(request_ids), num_tokens.count(1)
        if num_ones != num_rows and num_tokens[:num_ones].count(1) != num_ones:  # nearly always they come first
            num_ones = next(compress(count(), map((1).__ne__, num_tokens)))
        ones = request_ids if num_ones == num_rows else request_ids[:num_ones]
        if ones != decodes.request_ids:
            decodes.turn_to(ones, self._standing)
        if self._dropped:
            assert not [each for each in self._dropped if each in request_ids], "a row of a request that was dropped"
            self._dropped.clear()
        decodes.count_up(words)
        if len(decodes.standing) < num_rows:
            return self._pack_others(step, diff, words, num_ones, pads=pads)
        return PackedStep(
            num_words=diff.pack(words),
            num_pieces=diff.num_pieces,
            num_rows=num_rows,
            num_tokens=num_rows,
            max_query_len=1 if num_rows else 0,
            max_context_len=decodes.max_context_len,
            num_decodes=num_rows,
            sampled=decodes.standing,
            is_decode=num_rows > 0,
        )

    def _pack_others(self, step: ExecuteStep, diff: StepDiff, words: Int32, num_ones: int, *, pads: bool) -> PackedStep:
        """Write the rows behind those that decode: of one token, which do not sample, then chunks.

        In a size of `MixedSizes` there is a gap before the chunks, of rows of one token that is nobody's.
        """
        decodes, sheet = self._decodes, sheet_of(words, self._layout)
        begin, num_rows, num_tokens = len(decodes.standing), len(step.request_ids), sum(step.num_tokens)
        size = self._mixed_sizes.find(num_ones, num_rows - num_ones, num_tokens - num_ones) if pads else None
        num_padded = num_ones if size is None else size.num_decodes
        sheet[QUERY_START, num_ones:num_padded] = self._every_row[num_ones:num_padded]
        sampled: list[Standing] = []
        samples: list[tuple[int, int, int]] = []
        end, max_context_len = begin, decodes.max_context_len
        for first, last, at in ((begin, num_ones, begin), (num_ones, num_rows, num_padded)):
            rows: list[tuple[int, int, int, int]] = []
            end = at  # before it lie rows of one token
            for request_id, num_new in zip(step.request_ids[first:last], step.num_tokens[first:last], strict=True):
                standing = self._standing[request_id]
                before = standing.num_computed
                context_len = standing.num_computed = before + num_new
                max_context_len = max(max_context_len, context_len)
                rows.append((standing.row, before, end, context_len))
                end += num_new
                if context_len == standing.num_tokens and not standing.has_failed:
                    standing.num_tokens += 1
                    sampled.append(standing)
                    samples.append((standing.row, context_len, end - 1))
            if rows:
                sheet[: CONTEXT_LENS + 1, at : at + len(rows)] = np.array(rows, dtype=np.int32).T
        sheet[QUERY_START, num_padded + num_rows - num_ones :] = end
        if samples:
            sheet[SAMPLE_ROWS:, begin : begin + len(samples)] = np.array(samples, dtype=np.int32).T
        return PackedStep(
            num_words=diff.pack(words),
            num_pieces=diff.num_pieces,
            num_rows=num_rows,
            num_tokens=num_tokens,
            max_query_len=max(step.num_tokens[begin:]),
            max_context_len=max_context_len,
            num_decodes=num_ones,
            sampled=[*decodes.standing, *sampled] if sampled else decodes.standing,
            is_decode=False,
            padded_to=size,
        )

    def _count_stops(self, stops: frozenset[int], by: int) -> None:
        count = self._num_with_stops.get(stops, 0) + by
        if count:
            self._num_with_stops[stops] = count
        else:
            del self._num_with_stops[stops]
        if count in {0, by}:  # the last one, or the first
            self._any_stop = None
