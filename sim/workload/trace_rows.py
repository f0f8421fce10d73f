"""A trace's requests as columns: small in memory, whatever the length of the prompts."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise

from .content_ids import FIRST_PRIVATE_ID, ContentIds
from .request import TraceRequest, WorkloadCounts


class TraceRows:
    """Rows in the order of the file, about 20 bytes each and 4 for each shared block.

    Request `i` (of those kept) owns the private ids `FIRST_PRIVATE_ID + 2 i` (its prompt, as far as it is not made of
    shared blocks) and the one after (its answer).

    Attributes:
        block_size: tokens of a shared block; 0: the trace has none.
        full_blocks_only: a prompt's partial last block has no id of its own.
    """

    def __init__(self, counts: WorkloadCounts, *, block_size: int = 0, full_blocks_only: bool = False) -> None:
        self.counts = counts
        self.block_size = block_size
        self.full_blocks_only = full_blocks_only
        self.num_shared_ids = 0
        self.arrival_ns = array("q")
        self.num_prompt_tokens = array("i")
        self.num_output_tokens = array("i")
        self._block_ends = array("q", [0])  # of request i: block_ids[_block_ends[i] : _block_ends[i + 1]]
        self._block_ids = array("i")
        self._sessions: array[int] | None = None
        self._others: dict[
            int, tuple[int, str, int, int]
        ] = {}  # priority, tenant, cancel and timeout ns, if any is set

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def add(
        self, arrival_ns: int, num_prompt_tokens: int, num_output_tokens: int, block_ids: list[int] | None = None
    ) -> None:
        """One request; sorted later."""
        self.arrival_ns.append(arrival_ns)
        self.num_prompt_tokens.append(num_prompt_tokens)
        self.num_output_tokens.append(num_output_tokens)
        if self.block_size:
            if block_ids:
                self._block_ids.extend(block_ids)
                self.num_shared_ids = max(self.num_shared_ids, max(block_ids) + 1)
            self._block_ends.append(len(self._block_ids))

    def set_session(self, session: int) -> None:
        """Of the request added last."""
        if self._sessions is None:
            self._sessions = array("q", [-1]) * (len(self) - 1)
        self._sessions.extend([-1] * (len(self) - 1 - len(self._sessions)))
        self._sessions.append(session)

    def set_others(self, *, priority: int, tenant: str, cancel_after_ns: int, timeout_ns: int) -> None:
        """Of the request added last."""
        if priority or tenant or cancel_after_ns or timeout_ns:
            self._others[len(self) - 1] = (priority, tenant, cancel_after_ns, timeout_ns)

    @property
    def has_shared_prefixes(self) -> bool:
        """Whether any block occurs twice."""
        return len(self._block_ids) > 0 and self._first_block_repeats()

    def _first_block_repeats(self) -> bool:
        ends, ids = self._block_ends, self._block_ids
        first = [ids[ends[i]] for i in range(len(self)) if ends[i] < ends[i + 1]]
        return len(set(first)) < len(first)

    @property
    def content_ids(self) -> ContentIds:
        """What the requests use."""
        return ContentIds(self.num_shared_ids, 2 * len(self))

    def order(self) -> range | list[int]:
        """Row numbers by arrival, ties by line."""
        times = self.arrival_ns
        if all(earlier <= later for earlier, later in pairwise(times)):
            return range(len(times))
        return sorted(range(len(times)), key=times.__getitem__)

    def requests(self, order: range | list[int], begin_ns: int) -> Iterator[TraceRequest]:
        """The rows that `order` names, arrivals counted from `begin_ns`."""
        arrival_ns, num_prompt, num_output = self.arrival_ns, self.num_prompt_tokens, self.num_output_tokens
        has_blocks, has_more = self.block_size > 0, self._sessions is not None or bool(self._others)
        for row in order:
            private_id = FIRST_PRIVATE_ID + 2 * row
            prompt = self._segments(row, private_id) if has_blocks else ((private_id, num_prompt[row]),)
            if has_more:
                yield self._with_others(row, arrival_ns[row] - begin_ns, prompt)
            else:
                yield TraceRequest(arrival_ns[row] - begin_ns, prompt, num_output[row], private_id + 1)

    def _segments(self, row: int, private_id: int) -> tuple[tuple[int, int], ...]:
        size = self.block_size
        num_tokens = self.num_prompt_tokens[row]
        ids = self._block_ids[self._block_ends[row] : self._block_ends[row + 1]]
        num_full = num_tokens // size
        rest = num_tokens - num_full * size
        if not ids:
            return ((private_id, num_tokens),)
        if not rest:
            return tuple([(content_id, size) for content_id in ids])
        runs = [(content_id, size) for content_id in ids[:num_full]]
        runs.append((private_id if self.full_blocks_only else ids[num_full], rest))
        return tuple(runs)

    def _with_others(self, row: int, arrival_ns: int, prompt: tuple[tuple[int, int], ...]) -> TraceRequest:
        sessions = self._sessions
        priority, tenant, cancel_after_ns, timeout_ns = self._others.get(row, (0, "", 0, 0))
        return TraceRequest(
            arrival_ns,
            prompt,
            self.num_output_tokens[row],
            FIRST_PRIVATE_ID + 2 * row + 1,
            priority,
            tenant,
            cancel_after_ns,
            timeout_ns,
            sessions[row] if sessions is not None and row < len(sessions) else -1,
        )
