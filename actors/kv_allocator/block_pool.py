"""Free, cached and held blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from ...messages.ids import BlockId
from .eviction_queue import EvictionQueue
from .prefix_index import PrefixIndex


class BlockPool:
    """Reference counts, the free list, and the least-recently-used order of cached blocks; all in constant time.

    A block is held (reference count > 0), or cached (nobody holds it, the prefix index finds it), or free.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self._index = index
        self._num_blocks = num_blocks
        # A stack: the block freed last is likeliest to be in a cache of the hardware. Blocks never used yet come after
        # them, and are not written down: a thousand pools of a simulation would be mostly that.
        self._free: list[BlockId] = []
        self._cached = EvictionQueue()
        self.ref_counts: list[int] = []  # of blocks that have been used, which are those below its length
        self.num_evicted = 0

    @property
    def num_free(self) -> int:
        """Blocks nobody holds and nobody can find."""
        return len(self._free) + self._num_blocks - len(self.ref_counts)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds but the prefix index can find."""
        return len(self._cached)

    def take(self, num_blocks: int) -> list[BlockId]:
        """Return blocks for new contents, held once; evicts the least recently used cached ones once none is free.

        Taken in several calls, they would be the same in the same order.
        """
        free = self._free
        num_kept = max(0, len(free) - num_blocks)
        taken = free[num_kept:]
        del free[num_kept:]
        taken.reverse()
        if len(taken) < num_blocks:
            self._take_unused(num_blocks - len(taken), taken)
        if len(taken) < num_blocks:
            self._evict(num_blocks - len(taken), taken)
        ref_counts = self.ref_counts
        for block_id in taken:
            ref_counts[block_id] = 1
        return taken

    def _take_unused(self, num_blocks: int, taken: list[BlockId]) -> None:
        """Move blocks that were never used to `taken`, as many as there are of `num_blocks`."""
        begin = len(self.ref_counts)
        unused = range(begin, min(begin + num_blocks, self._num_blocks))
        taken += cast("Iterable[BlockId]", unused)
        self.ref_counts.extend([0] * len(unused))
        self._index.add_blocks(len(unused))

    def _evict(self, num_blocks: int, taken: list[BlockId]) -> None:
        """Move the least recently used cached blocks to `taken`."""
        assert num_blocks <= len(self._cached), "the scheduler promised blocks that do not exist"
        evicted = self._cached.pop(num_blocks)
        self._index.forget(evicted)
        taken += evicted
        self.num_evicted += num_blocks

    def hold(self, block_ids: Iterable[BlockId]) -> int:
        """Hold these blocks once more; return how many of them nobody held before."""
        num_taken = 0
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                self._cached.remove(block_id)
                num_taken += 1
            self.ref_counts[block_id] += 1
        return num_taken

    def release(self, block_ids: list[BlockId]) -> int:
        """Hold these blocks once less; return how many of them nobody holds any more.

        The last block is queued for eviction first, so that prefixes, which others may share, survive longest.
        """
        ref_counts, node_of = self.ref_counts, self._index.node_of
        append_free, append_cached = self._free.append, self._cached.append
        num_freed = 0
        for block_id in reversed(block_ids):
            num_left = ref_counts[block_id] - 1
            assert num_left >= 0
            ref_counts[block_id] = num_left
            if num_left == 0:
                num_freed += 1
                if node_of[block_id] is None:
                    append_free(block_id)
                else:
                    append_cached(block_id)
        return num_freed

    def forget_held(self, block_ids: list[BlockId]) -> None:
        """Let held blocks not be found any more."""
        node_of = self._index.node_of
        self._index.forget([block_id for block_id in block_ids if node_of[block_id] is not None])

    def forget_cached(self) -> None:
        """Empty the prefix index; cached blocks become free, held ones are held on."""
        node_of = self._index.node_of
        self._index.forget([BlockId(i) for i, node in enumerate(node_of) if node is not None])
        self._free.extend(reversed(list(self._cached)))
        self._cached.clear()

    def check(self) -> None:
        """Assert that free + cached + held is the whole, and that index and blocks agree."""
        held = [block_id for block_id, count in enumerate(self.ref_counts) if count > 0]
        assert len(self.ref_counts) <= self._num_blocks
        assert sorted([*self._free, *self._cached, *held]) == list(range(len(self.ref_counts)))
        node_of = self._index.node_of
        assert len(node_of) == len(self.ref_counts)
        assert all(node_of[block_id] is None for block_id in self._free)
        assert all(node_of[block_id] is not None for block_id in self._cached)
        self._cached.check()
        self._index.check()
