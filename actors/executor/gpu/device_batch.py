"""What the host knows of the batch that stays on the device.

The host mirrors what follows from the plans alone: a request's row, how many tokens it has and how many are computed,
how many blocks. It never needs the tokens, so a step can be packed while the ones before it are running.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ....kernels.step_inputs import StepLayout
from ....messages.ids import RequestId
from ....messages.step import ExecuteStep, StartRequest
from ..sampling_state import SamplingState
from .mixed_sizes import MixedSize, MixedSizes
from .packed_step import Int64, PackedStep, Standing, fill
from .step_diff import Int32, StepDiff

_ONE = np.int32(1)


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
        self._row_of: dict[RequestId, int] = {}
        self._num_special = 0  # standing that are not plain
        self._num_with_stops: dict[frozenset[int], int] = {}
        self._any_stop: frozenset[int] | None = frozenset()
        self._num_tokens: Int32 = np.zeros(num_state_rows, dtype=np.int32)
        self._num_computed: Int32 = np.zeros(num_state_rows, dtype=np.int32)
        self._num_blocks = [0] * num_state_rows
        self._has_failed = np.zeros(num_state_rows, dtype=np.bool_)
        self._num_failed = 0
        self._key: tuple[RequestId, ...] = ()  # the rows of the last step, whose next four things follow from it
        self._rows: Int64 = np.zeros(0, dtype=np.int64)
        self._of_rows: list[Standing] = []
        self._ones: tuple[int, ...] = ()
        self._dropped: set[RequestId] = set()  # since the last step
        self._every_row = np.arange(layout.max_rows + 1, dtype=np.int32)
        self._every_one = np.ones(layout.max_rows, dtype=np.int32)
        self._zeros = np.zeros(layout.max_rows, dtype=np.int32)
        # Where every row has sampled, only these go on while rows decode, and some of them leave; the two arrays above
        # are brought up to date when that ends.
        self._context_lens: Int32 | None = None
        self._max_context_len = 0
        self._shape = 0
        # What the sections held when a step of that shape was packed first: others of it copy that in one go.
        self._template: Int32 = np.zeros(layout.diff, dtype=np.int32)
        self._template_shape = -1

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._standing

    def __len__(self) -> int:
        return len(self._standing)

    def num_output_tokens(self, standing: Standing) -> int:
        """Sampled so far, those of steps in flight included."""
        self._catch_up()
        return int(self._num_tokens[standing.row]) - standing.num_prompt_tokens

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
            self._dropped.add(request_id)
            self._free_rows.append(self._row_of.pop(request_id))
            self._num_failed -= standing.has_failed
            self._num_special -= not standing.is_plain
            self._count_stops(standing.sampling.stop_token_ids, -1)

    def fail(self, standing: Standing) -> None:
        """Sample no more for this request: what it has is not known to be a sequence any longer."""
        standing.has_failed = True
        if self._standing.get(standing.request_id) is standing:
            self._catch_up()
            self._has_failed[standing.row] = True
            self._num_failed += 1

    def clear(self) -> None:
        """Forget every request."""
        for request_id in list(self._standing):
            self.drop(request_id)

    def start(self, start: StartRequest, num_blocks: int, sampling: SamplingState) -> Standing:
        """Give a request a row."""
        self._catch_up()  # a row that was left by another, perhaps in this very step
        if start.request_id in self._dropped:
            self._dropped.remove(start.request_id)
            self._key, self._of_rows, self._rows = (), [], self._rows[:0]  # it may be one of them, and is another now
        row = self._free_rows.pop()
        is_plain = start.params.logprobs is None and not sampling.is_processed
        standing = Standing(start.request_id, row, start.num_prompt_tokens, sampling, is_plain)
        self._standing[start.request_id] = standing
        self._row_of[start.request_id] = row
        self._num_special += not is_plain
        self._count_stops(sampling.stop_token_ids, 1)
        self._num_tokens[row] = len(start.token_ids) // 4
        self._num_computed[row] = start.num_computed_tokens
        self._num_blocks[row] = num_blocks
        self._has_failed[row] = False
        return standing

    def append_blocks(self, step: ExecuteStep) -> Iterator[tuple[int, int, Sequence[int]]]:
        """Count the blocks that the step appends: `(row, index in its block table, block_ids)`."""
        num_blocks, row_of = self._num_blocks, self._row_of
        for request_id, block_ids in step.append_blocks:
            row = row_of[request_id]
            yield row, num_blocks[row], block_ids
            num_blocks[row] += len(block_ids)

    def pack(
        self, step: ExecuteStep, diff: StepDiff, words: Int32, shape: int = -1, *, pads: bool = True
    ) -> PackedStep:
        """Write the packed step to `words`, and count its tokens as computed and its samples as tokens.

        Args:
            words: `diff.packed_words` at least; every word up to there is written that has to be.
            shape: of the step that `words` has held last; -1 for none.
            pads: a step with chunks may be laid out for one of the mixed sizes.
        """
        if step.request_ids != self._key:
            self._turn_to(step.request_ids, is_decode=step.num_tokens.count(1) == len(step.num_tokens))
        if self._dropped:
            assert not [each for each in self._dropped if each in self._key], "a row of a request that was dropped"
            self._dropped.clear()
        if step.num_tokens == self._ones:  # which tuples of the same small numbers know quickly
            if self._context_lens is not None:
                return self._pack_next_decodes(step, diff, words, shape)
            query_start = self._every_row[: len(self._rows) + 1]
            return self._pack_any(diff, words, self._every_one[: len(self._rows)], query_start, pads=pads)
        self._catch_up()
        num_ones = step.num_tokens.count(1)  # nearly always the first ones: only the others need to be read
        longer = np.array(step.num_tokens[num_ones:], dtype=np.int32)
        if 1 in step.num_tokens[num_ones:]:
            num_ones, longer = 0, np.array(step.num_tokens, dtype=np.int32)
        num_new = np.concatenate((self._every_one[:num_ones], longer))
        ends = longer.cumsum(dtype=np.int32) + np.int32(num_ones)
        query_start = np.concatenate((self._every_row[: num_ones + 1], ends))
        return self._pack_any(diff, words, num_new, query_start, pads=pads)

    def _pack_any(self, diff: StepDiff, words: Int32, num_new: Int32, query_start: Int32, *, pads: bool) -> PackedStep:
        rows = self._rows
        before = self._num_computed[rows]
        context_lens = before + num_new
        self._num_computed[rows] = context_lens
        samples = context_lens == self._num_tokens[rows]
        if self._num_failed:
            samples &= ~self._has_failed[rows]
        sampled: Sequence[Standing]
        if samples.all():
            sampling_rows, columns, sampled = rows, context_lens, self._of_rows
            sample_tokens = query_start[1:] - _ONE
        else:
            chosen = samples.nonzero()[0]
            count = len(chosen)
            if count and chosen[-1] == count - 1:  # the first ones, as where prompts behind decodes go on
                sampling_rows, columns, sampled = rows[:count], context_lens[:count], self._of_rows[:count]
                sample_tokens = query_start[1 : count + 1] - _ONE
            else:
                sampling_rows, columns = rows[chosen], context_lens[chosen]
                sampled = [self._of_rows[index] for index in chosen.tolist()]
                sample_tokens = query_start[1:][chosen] - _ONE
        self._num_tokens[sampling_rows] += _ONE
        num_tokens, max_query_len = int(query_start[-1]), int(num_new.max(initial=0))
        self._max_context_len = int(context_lens.max(initial=0))
        self._shape += 1
        has_sampled_all = len(sampled) == len(rows)
        is_decode = max_query_len == 1 and has_sampled_all
        shape = self._shape
        if has_sampled_all and not self._num_failed:
            self._context_lens = context_lens
            self._shape += not is_decode  # what decodes behind these is not of their shape
        num_decodes = len(rows) if max_query_len <= 1 else int(np.argmax(num_new != 1))
        size = None
        if pads and len(rows) and not is_decode:
            size = self._mixed_sizes.find(num_decodes, len(rows) - num_decodes, num_tokens - num_decodes)
        self._write_rows(words, size, num_decodes, (rows, before, query_start, context_lens))
        self._write_samples(words, size, num_decodes, (sampling_rows, columns, sample_tokens))
        return PackedStep(
            num_words=diff.pack(words),
            num_pieces=diff.num_pieces,
            num_rows=len(rows),
            num_tokens=num_tokens,
            max_query_len=max_query_len,
            max_context_len=self._max_context_len,
            num_decodes=num_decodes,
            sampled=sampled,
            is_decode=is_decode,
            shape=shape,
            padded_to=size,
        )

    def _write_rows(
        self, words: Int32, size: MixedSize | None, num_decodes: int, values: tuple[Int64, Int32, Int32, Int32]
    ) -> None:
        """The sections of a step's rows, for a size with a gap behind the decodes."""
        layout, (rows, before, query_start, context_lens) = self._layout, values
        end = query_start[-1]
        if size is not None:
            gap, at = size.num_decodes - num_decodes, num_decodes
            zeros = self._zeros[:gap]
            rows = np.concatenate((rows[:at], zeros, rows[at:]), dtype=np.int64)
            before = np.concatenate((before[:at], zeros, before[at:]))
            context_lens = np.concatenate((context_lens[:at], zeros, context_lens[at:]))
            query_start = np.concatenate((self._every_row[: size.num_decodes], query_start[at:] + np.int32(gap)))
            end = query_start[-1]
        fill(words, layout.rows, layout.starts, rows, 0)
        fill(words, layout.starts, layout.query_start, before, 0)
        fill(words, layout.query_start, layout.context_lens, query_start, end)
        fill(words, layout.context_lens, layout.sample_rows, context_lens, 0)

    def _write_samples(
        self, words: Int32, size: MixedSize | None, num_decodes: int, values: tuple[Int64, Int32, Int32]
    ) -> None:
        """The sections of a step's samples, which lie one behind the other in any case."""
        layout, (rows, columns, tokens) = self._layout, values
        if size is not None:
            tokens = np.where(tokens < num_decodes, tokens, tokens + np.int32(size.num_decodes - num_decodes))
        fill(words, layout.sample_rows, layout.sample_columns, rows, -1)
        fill(words, layout.sample_columns, layout.sample_tokens, columns, 0)
        fill(words, layout.sample_tokens, layout.diff, tokens, 0)

    def _pack_next_decodes(self, step: ExecuteStep, diff: StepDiff, words: Int32, shape: int) -> PackedStep:
        """The same rows once more, each with the token that was sampled last; `_pack_any` would say the same, later."""
        layout, before = self._layout, self._context_lens
        assert before is not None
        self._context_lens = context_lens = before + _ONE
        self._max_context_len += 1
        count = len(before)
        if self._shape not in {shape, self._template_shape}:
            query_start = self._every_row[: count + 1]
            self._write_rows(words, None, count, (self._rows, before, query_start, context_lens))
            self._write_samples(words, None, count, (self._rows, context_lens, query_start[:-1]))
            self._template[:] = words[: layout.diff]
            self._template_shape = self._shape
        else:
            if shape != self._shape:
                words[: layout.diff] = self._template
            words[layout.starts : layout.starts + count] = before
            words[layout.context_lens : layout.context_lens + count] = context_lens
            words[layout.sample_columns : layout.sample_columns + count] = context_lens
        return PackedStep(
            num_words=diff.pack(words),
            num_pieces=diff.num_pieces,
            num_rows=count,
            num_tokens=count,
            max_query_len=1,
            max_context_len=self._max_context_len,
            num_decodes=count,
            sampled=self._of_rows,
            is_decode=True,
            shape=self._shape,
        )

    def _turn_to(self, request_ids: tuple[RequestId, ...], *, is_decode: bool) -> None:
        """Let these be the rows, in this order.

        From one step to the next few rows leave, and some come behind the others: runs that stay are taken over.
        """
        runs, num_kept = _runs_kept(self._key, request_ids)
        added = request_ids[num_kept:]
        of_rows, rows, context_lens = self._of_rows, self._rows, self._context_lens
        if context_lens is not None and is_decode and not added:
            # The others go on without those that leave, of which alone the counts are entered.
            begin = 0
            for run in (*runs, slice(len(rows), None)):
                self._enter(rows[begin : run.start], context_lens[begin : run.start])
                begin = run.stop
            self._context_lens = np.concatenate([context_lens[run] for run in runs]) if runs else context_lens[:0]
            self._max_context_len = int(self._context_lens.max(initial=0))
            self._shape += 1
        else:
            self._catch_up()
        self._of_rows = []  # a new one: plans hold the last
        for run in runs:
            self._of_rows += of_rows[run]
        self._of_rows += [self._standing[request_id] for request_id in added]
        new_rows = np.array([self._row_of[request_id] for request_id in added], dtype=np.int64)
        self._rows = np.concatenate([*(rows[run] for run in runs), new_rows])
        self._key = request_ids
        self._ones = (1,) * len(request_ids)

    def _count_stops(self, stops: frozenset[int], by: int) -> None:
        count = self._num_with_stops.get(stops, 0) + by
        if count:
            self._num_with_stops[stops] = count
        else:
            del self._num_with_stops[stops]
        if count in {0, by}:  # the last one, or the first
            self._any_stop = None

    def _catch_up(self) -> None:
        """Enter what decoding has counted on the side."""
        if self._context_lens is not None:
            self._enter(self._rows, self._context_lens)
            self._context_lens = None

    def _enter(self, rows: Int64, context_lens: Int32) -> None:
        """Note that so many tokens of these rows are computed, and that each has one more."""
        self._num_computed[rows] = context_lens
        self._num_tokens[rows] = context_lens + _ONE


def _runs_kept(before: tuple[RequestId, ...], after: tuple[RequestId, ...]) -> tuple[list[slice], int]:
    """What a tuple begins with that is left of another, in order: runs of the other, and how many there are in all.

    Neither has anything twice. Compared run by run, as Python compares tuples faster than it looks up what is in them.
    """
    runs: list[slice] = []
    at, count = 0, 0
    while count < len(after):
        try:
            at = before.index(after[count], at)
        except ValueError:
            break
        length = _count_equal(before, at, after, count)
        runs.append(slice(at, at + length))
        at += length
        count += length
    return runs, count


def _count_equal(ours: tuple[RequestId, ...], at: int, theirs: tuple[RequestId, ...], begin: int) -> int:
    """How many entries are the same from there on; the first ones are."""
    least, most = 1, min(len(ours) - at, len(theirs) - begin)
    if ours[at : at + most] == theirs[begin : begin + most]:
        return most
    while least < most - 1:  # so many are the same, so many are not
        middle = (least + most) // 2
        if ours[at + least : at + middle] == theirs[begin + least : begin + middle]:
            least = middle
        else:
            most = middle
    return least
