"""A packed step in which every row decodes, kept ready: from one step to the next it is counted up and copied."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import numpy as np

from ....kernels.step_layout import StepLayout
from ....messages.ids import RequestId
from .packed_step import Standing
from .step_diff import Int32

# The sections of a packed step, in the order of `StepLayout`: lines of a sheet.
ROWS, STARTS, QUERY_START, CONTEXT_LENS, SAMPLE_ROWS, SAMPLE_COLUMNS, SAMPLE_TOKENS = range(7)
NUM_SECTIONS = 7

_COUNTED = slice(STARTS, SAMPLE_COLUMNS + 1, 2)  # starts, context_lens, sample_columns: one more in the next step
_IN_ORDER = slice(QUERY_START, SAMPLE_TOKENS + 1, 4)  # query_start, sample_tokens: 0, 1, 2 ...
_NOBODY = np.array([[0], [0], [0], [0], [-1], [0], [0]], dtype=np.int32)  # behind the rows, query_start apart

_Run = range  # of columns
_start = attrgetter("start")


def sheet_of(words: Int32, layout: StepLayout) -> Int32:
    """The sections of a packed step as `[NUM_SECTIONS, layout.section]`, in the same memory."""
    return words[: layout.num_pieces].reshape(NUM_SECTIONS, layout.section)


class DecodeSheet:
    """The rows that sampled in their last step and will in their next one, a column each.

    They are most of the rows, and most steps do the same to all of them. What they have computed stands here alone, in
    the order in which steps name them, and is entered in a row's `Standing` when it leaves.

    Args:
        layout: of steps.

    Attributes:
        standing, request_ids: of the rows, in order; replaced when they change, never changed: plans share them.
        max_context_len: of the rows, in the step that was counted last.
    """

    def __init__(self, layout: StepLayout) -> None:
        self._sheet: Int32 = np.repeat(_NOBODY, layout.section, axis=1)
        self._steps: Int32 = np.zeros_like(self._sheet)  # by how much a step counts up what stands there
        # The same memory in one dimension, of which numpy makes a quarter of the work.
        self._words, self._words_of_steps = self._sheet.reshape(-1), self._steps.reshape(-1)
        self._in_order = np.arange(layout.section, dtype=np.int32)
        self.standing: list[Standing] = []
        self.request_ids: tuple[RequestId, ...] = ()
        self.max_context_len = 0

    def count_up(self, words: Int32) -> None:
        """Count one more token of every row, and write that step to the beginning of `words`."""
        if self.standing:
            self._words += self._words_of_steps
            self.max_context_len += 1
        words[: len(self._words)] = self._words

    def settle(self) -> None:
        """Enter what stands here in every row's `Standing`."""
        context_lens: list[int] = self._sheet[CONTEXT_LENS, : len(self.standing)].tolist()
        for standing, context_len in zip(self.standing, context_lens, strict=True):
            standing.enter(context_len)

    def clear(self) -> None:
        """Settle, and let all rows go."""
        self.turn_to((), {})

    def turn_to(self, request_ids: tuple[RequestId, ...], standing_of: Mapping[RequestId, Standing]) -> None:
        """Let these be the rows, in this order, up to the first that will not sample.

        From one step to the next few leave, and few come, mostly behind the others. So what stays is found in runs, by
        comparing tuples: Python does that faster than it looks up what is in them.
        """
        parts: list[_Run | list[Standing]] = []
        count = at = 0
        while count < len(request_ids):
            run = _run_of(self.request_ids, at, request_ids, count)
            if run is not None:
                parts.append(run)
                at = run.stop
                count += len(run)
                continue
            standing = standing_of[request_ids[count]]
            if not standing.will_sample:
                break
            if parts and isinstance(parts[-1], list):
                parts[-1].append(standing)
            else:
                parts.append([standing])
            count += 1
        is_longest_gone = self._retire([part for part in parts if isinstance(part, range)])
        self._arrange(parts)
        if is_longest_gone:
            self.max_context_len = int(self._sheet[CONTEXT_LENS, : len(self.standing)].max(initial=0))
        self.request_ids = request_ids if count == len(request_ids) else request_ids[:count]

    def _retire(self, runs: list[_Run]) -> bool:
        """Enter in their `Standing` what is here of the rows outside of these runs; was the longest among them?"""
        is_longest_gone = False
        begin = 0
        for run in (*sorted(runs, key=_start), range(len(self.standing), 0)):
            for column in range(begin, run.start):
                context_len = int(self._sheet[CONTEXT_LENS, column])
                self.standing[column].enter(context_len)
                is_longest_gone |= context_len == self.max_context_len
            begin = run.stop
        return is_longest_gone

    def _arrange(self, parts: list[_Run | list[Standing]]) -> None:
        """Put runs of the rows that are here, and rows that are new, one behind the other."""
        sheet, before = self._sheet, self.standing
        self.standing = []
        blocks: list[Int32] = []
        first = 0  # column behind those that stay where they are
        for part in parts:
            if isinstance(part, list):
                self.standing += part
                blocks.append(_columns_of(part))
                self.max_context_len = max(self.max_context_len, *[standing.num_computed for standing in part])
                continue
            self.standing += before[part.start : part.stop]
            if part.start == 0 and not blocks:
                first = part.stop
            else:
                blocks.append(sheet[:, part.start : part.stop])
        end = len(self.standing)
        if blocks:
            sheet[:, first:end] = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
            sheet[_IN_ORDER, first:end] = self._in_order[first:end]
        if end < len(before):
            sheet[:, end : len(before)] = _NOBODY
            self._steps[_COUNTED, end : len(before)] = 0
        elif end > len(before):
            self._steps[_COUNTED, len(before) : end] = 1
        sheet[QUERY_START, end:] = end


def _columns_of(rows: list[Standing]) -> Int32:
    """What stands in the sheet before a row's next step is counted."""
    columns = [(each.row, each.num_computed - 1, 0, each.num_computed, each.row, each.num_computed, 0) for each in rows]
    return np.array(columns, dtype=np.int32).T


def _run_of(ours: tuple[RequestId, ...], at: int, theirs: tuple[RequestId, ...], begin: int) -> _Run | None:
    """Where what one tuple has from `begin` on stands in another, likelier behind `at`, as far as it goes on alike.

    None if its first entry is not there; neither has anything twice.
    """
    try:
        at = ours.index(theirs[begin], at)
    except ValueError:
        try:
            at = ours.index(theirs[begin], 0, at)
        except ValueError:
            return None
    least, most = 1, min(len(ours) - at, len(theirs) - begin)
    if ours[at : at + most] == theirs[begin : begin + most]:
        return range(at, at + most)
    while least < most - 1:  # so many are the same, so many are not
        middle = (least + most) // 2
        if ours[at + least : at + middle] == theirs[begin + least : begin + middle]:
            least = middle
        else:
            most = middle
    return range(at, at + least)
