"""Running requests with exactly the newest token to compute: one row of one token each in every step."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import defaultdict
from operator import attrgetter

from ...messages.ids import RequestId
from .config import MAX_GROWTH
from .sequence import NOT_DECODING, Sequence

_by_key = attrgetter("key")

_Columns = tuple[list[Sequence], tuple[RequestId, ...], list["array[int]"]]


def num_blocks_ahead(sequence: Sequence, block_size: int) -> int:
    """Return how many blocks a decoding row that needs one takes where there are plenty: no more than it can fill."""
    num_tokens = sequence.max_total - 1 - sequence.num_slots
    return MAX_GROWTH if num_tokens > (MAX_GROWTH - 1) * block_size else -(-num_tokens // block_size)


class DecodingRows:
    """Keeps the rows by key, and knows when each needs more than to be counted.

    Most steps do the same to every row. So the rows' progress is one number, `clock`, which counts steps; what a row
    has computed is its base plus the clock, and a row that sits a step out has its base lowered. When a row needs a
    block, or samples its last token, stands in a calendar. So a step costs what changes, not what runs.

    Attributes:
        rows: by key. Like the next two, replaced when it changes, never changed: steps in flight share them.
        request_ids: of the rows.
        token_arrays: tokens of the rows, to be appended to.
        clock: steps so far.
    """

    def __init__(self) -> None:
        self.rows: list[Sequence] = []
        self.request_ids: tuple[RequestId, ...] = ()
        self.token_arrays: list[array[int]] = []
        self.clock = 0
        self._first_end_clock: int | None = None  # None: to be found
        self._left_out: tuple[list[Sequence], list[Sequence], _Columns] = ([], [], ([], (), []))  # see `without`
        self._calendar: defaultdict[int, list[Sequence]] = defaultdict(list)  # by clock; may hold who is due no more

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, sequence: Sequence) -> None:
        """Take in a request whose known tokens are all computed."""
        rows, request_ids, token_arrays = self.rows, self.request_ids, self.token_arrays
        if not rows or rows[-1].key < sequence.key:  # as nearly always
            self.rows = [*rows, sequence]
            self.token_arrays = [*token_arrays, sequence.tokens]
            self.request_ids = (*request_ids, sequence.request_id)
        else:
            at = self._place_of(sequence)
            self.rows = [*rows[:at], sequence, *rows[at:]]
            self.token_arrays = [*token_arrays[:at], sequence.tokens, *token_arrays[at:]]
            self.request_ids = (*request_ids[:at], sequence.request_id, *request_ids[at:])
        self._first_end_clock = None
        sequence.decode_base = sequence.num_computed - self.clock
        self.schedule(sequence, self.clock + 1)

    def remove(self, sequence: Sequence) -> None:
        """Let a request go, and bring its `num_computed` up to date."""
        self.rows, self.request_ids, self.token_arrays = self.without([sequence])
        self._first_end_clock = None
        sequence.num_computed = self.num_computed(sequence)
        sequence.due_clock = NOT_DECODING

    def without(self, left_out: list[Sequence]) -> _Columns:
        """Return `rows`, `request_ids` and `token_arrays` without a few of the rows.

        Who samples its last token sits out until it is heard of, and leaves then: the same is asked for again.
        """
        of_rows, before, found = self._left_out
        if of_rows is self.rows and before == left_out:
            return found
        rows, request_ids, token_arrays = self.rows.copy(), self.request_ids, self.token_arrays.copy()
        for at in sorted([self._place_of(sequence) for sequence in left_out], reverse=True):
            del rows[at], token_arrays[at]
            request_ids = request_ids[:at] + request_ids[at + 1 :]
        found = rows, request_ids, token_arrays
        self._left_out = self.rows, left_out, found
        return found

    def _place_of(self, sequence: Sequence) -> int:
        return bisect_left(self.rows, sequence.key, key=_by_key)

    def clear(self) -> None:
        """Let all requests go; their `num_computed` means nothing any more."""
        for sequence in self.rows:
            sequence.due_clock = NOT_DECODING
        self.rows = []
        self.request_ids = ()
        self.token_arrays = []
        self._first_end_clock = None
        self._left_out = [], [], ([], (), [])
        self._calendar.clear()

    def num_computed(self, sequence: Sequence) -> int:
        """Return how many tokens of a row are computed by steps that were sent."""
        return sequence.decode_base + self.clock

    def first_end_clock(self) -> int:
        """Return the clock of the first step that samples a request's last possible token, if no row sits out."""
        if self._first_end_clock is None:
            self._first_end_clock = min([sequence.max_total - sequence.decode_base for sequence in self.rows]) - 1
        return self._first_end_clock

    def pop_due(self, clock: int) -> list[Sequence]:
        """Return the rows to be looked at before the step of this clock, by key.

        Whose `due_clock` is not this clock (any more) is to be passed over: it left, or was looked at already.
        """
        due = self._calendar.pop(clock, None)
        if due is None:
            return []
        if len(due) > 1:
            due.sort(key=_by_key)
        return due

    def schedule(self, sequence: Sequence, earliest: int) -> None:
        """Note the step at which a row needs a block or samples its last token; not before the clock is `earliest`."""
        last = sequence.num_slots  # computed up to here, it needs no look
        if last > sequence.max_total - 2:  # noqa: PLR1730 - half the time of `min`, sixteen times a step
            last = sequence.max_total - 2
        due_clock = last + 1 - sequence.decode_base
        if due_clock < earliest:  # noqa: PLR1730
            due_clock = earliest
        sequence.due_clock = due_clock
        self._calendar[due_clock].append(sequence)

    def sit_out(self, sequence: Sequence) -> None:
        """Leave a row out of the step about to be counted; if it was due in it, it is due in the next one."""
        self._first_end_clock = None
        sequence.decode_base -= 1
        if sequence.due_clock == self.clock + 1:
            self.schedule(sequence, self.clock + 2)

    def check(self) -> None:
        """Assert that every row is in the calendar, in time."""
        assert [sequence.key for sequence in self.rows] == sorted(sequence.key for sequence in self.rows)
        assert self.request_ids == tuple(sequence.request_id for sequence in self.rows)
        assert all(tokens is row.tokens for tokens, row in zip(self.token_arrays, self.rows, strict=True))
        ends = [sequence.max_total - 1 - sequence.decode_base for sequence in self.rows]
        assert self._first_end_clock is None or self._first_end_clock == min(ends)
        for sequence in self.rows:
            due_clock = sequence.due_clock
            assert due_clock > self.clock
            assert sequence in self._calendar[due_clock]
            last = min(sequence.num_slots, sequence.max_total - 2)
            assert due_clock == self.clock + 1 or sequence.decode_base + due_clock <= last + 1
