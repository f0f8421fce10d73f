"""Cached blocks in the order in which they are evicted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from ...messages.ids import BlockId

_FEW = 64  # entries that count no more, among which it is not worth to tidy up


class EvictionQueue:
    """Blocks, the least recently used first; each at most once.

    Nearly every block leaves at the front. One that leaves from within, since somebody holds it again, keeps its entry,
    which is passed over when it comes to the front. So each step costs a third of what an `OrderedDict`'s does, and the
    queue is at most twice as long as what is in it.

    Attributes:
        append: put a block, which is not in the queue, at the end.
    """

    def __init__(self) -> None:
        self._entries: deque[BlockId] = deque()
        self._num_void: dict[BlockId, int] = {}  # entries of a block, its oldest ones, that count no more
        self._num_void_entries = 0
        self.append = self._entries.append

    def __len__(self) -> int:
        return len(self._entries) - self._num_void_entries

    def __iter__(self) -> Iterator[BlockId]:
        num_void = dict(self._num_void)
        for block_id in self._entries:
            if num_void.get(block_id):
                num_void[block_id] -= 1
            else:
                yield block_id

    def remove(self, block_id: BlockId) -> None:
        """Take a block, which is in the queue, out of it."""
        self._num_void[block_id] = self._num_void.get(block_id, 0) + 1
        self._num_void_entries += 1
        if self._num_void_entries > _FEW + len(self):
            entries = list(self)
            self.clear()
            self._entries.extend(entries)

    def pop(self, num_blocks: int) -> list[BlockId]:
        """Take out so many blocks, of which there are enough, in order."""
        entries, num_void = self._entries, self._num_void
        if not num_void:
            return [entries.popleft() for _ in range(num_blocks)]
        popped: list[BlockId] = []
        while len(popped) < num_blocks:
            block_id = entries.popleft()
            if block_id not in num_void:
                popped.append(block_id)
                continue
            self._num_void_entries -= 1
            num_void[block_id] -= 1
            if not num_void[block_id]:
                del num_void[block_id]
        return popped

    def clear(self) -> None:
        """Take out all."""
        self._entries.clear()
        self._num_void.clear()
        self._num_void_entries = 0

    def check(self) -> None:
        """Assert that no block is in it twice, and that entries and counts agree."""
        blocks = list(self)
        assert len(set(blocks)) == len(blocks) == len(self)
        assert self._num_void_entries == sum(self._num_void.values())
        assert all(num_void > 0 for num_void in self._num_void.values())
