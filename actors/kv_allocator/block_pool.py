"""Free, cached and held blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from ...messages.ids import BlockId
from .prefix_index import PrefixIndex, PrefixLink


class BlockPool:
    """Reference counts, the free list, and the least-recently-used order of cached blocks; all in constant time.

    A block is held (reference count > 0), or cached (nobody holds it, the prefix index finds it), or free.
    """

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self._index = index
        # A stack: the block freed last is likeliest to be in a cache of the hardware.
        self._free = [BlockId(block_id) for block_id in range(num_blocks - 1, -1, -1)]
        self._cached: OrderedDict[BlockId, PrefixLink] = OrderedDict()  # the first is evicted first
        self._links: list[PrefixLink | None] = [None] * num_blocks  # of indexed blocks
        self.ref_counts = [0] * num_blocks
        self.num_evicted = 0

    @property
    def num_free(self) -> int:
        """Blocks nobody holds and nobody can find."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds but the prefix index can find."""
        return len(self._cached)

    def take(self, num_blocks: int) -> tuple[BlockId, ...]:
        """Return blocks for new contents, held once; evicts the least recently used cached ones once none is free."""
        free = self._free
        if num_blocks == 1 and free:
            taken = [free.pop()]
        else:
            num_from_free = min(num_blocks, len(free))
            taken = free[len(free) - num_from_free :]
            del free[len(free) - num_from_free :]
            if num_from_free < num_blocks:
                self._evict(num_blocks - num_from_free, taken)
        for block_id in taken:
            self.ref_counts[block_id] = 1
        return tuple(taken)

    def _evict(self, num_blocks: int, taken: list[BlockId]) -> None:
        """Move the least recently used cached blocks to `taken`."""
        cached, links = self._cached, self._links
        assert num_blocks <= len(cached), "the scheduler promised blocks that do not exist"
        forgotten = []
        for _ in range(num_blocks):
            block_id, link = cached.popitem(last=False)
            links[block_id] = None
            taken.append(block_id)
            forgotten.append(link)
        self._index.forget(forgotten)
        self.num_evicted += num_blocks

    def hold(self, block_ids: Iterable[BlockId]) -> int:
        """Hold these blocks once more; return how many of them nobody held before."""
        num_taken = 0
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                del self._cached[block_id]
                num_taken += 1
            self.ref_counts[block_id] += 1
        return num_taken

    def release(self, block_ids: list[BlockId]) -> int:
        """Hold these blocks once less; return how many of them nobody holds any more.

        The last block is queued for eviction first, so that prefixes, which others may share, survive longest.
        """
        num_freed = 0
        for block_id in reversed(block_ids):
            num_left = self.ref_counts[block_id] - 1
            assert num_left >= 0
            self.ref_counts[block_id] = num_left
            if num_left == 0:
                num_freed += 1
                link = self._links[block_id]
                if link is None:
                    self._free.append(block_id)
                else:
                    self._cached[block_id] = link
        return num_freed

    def publish(self, link: PrefixLink, token_ids: bytes, block_ids: list[BlockId]) -> PrefixLink:
        """Let held blocks whose KV is computed be found, one behind the other after `link`; return the last one's link.

        Args:
            token_ids: the int32 tokens of these blocks, all full.
        """
        extended = self._index.extend(link, token_ids, block_ids)
        links = self._links
        for block_id, published in zip(block_ids, extended, strict=True):
            if published.block_id == block_id:
                links[block_id] = published
        return extended[-1]

    def unpublish(self, block_id: BlockId) -> None:
        """Let a held block not be found any more."""
        link = self._links[block_id]
        if link is not None:
            self._index.forget([link])
            self._links[block_id] = None

    def forget_cached(self) -> None:
        """Empty the prefix index; cached blocks become free, held ones are held on."""
        for i, link in enumerate(self._links):
            if link is not None:
                self._index.forget([link])
                self._links[i] = None
        self._free.extend(reversed(self._cached))
        self._cached.clear()

    def check(self) -> None:
        """Assert that free + cached + held is the whole, and that index and blocks agree."""
        held = [block_id for block_id, count in enumerate(self.ref_counts) if count > 0]
        assert sorted([*self._free, *self._cached, *held]) == list(range(len(self.ref_counts)))
        for block_id in self._free:
            assert self._links[block_id] is None
        for block_id, cached_link in self._cached.items():
            assert self._links[block_id] is cached_link
        num_links = 0
        for i, link in enumerate(self._links):
            if link is not None:
                num_links += 1
                assert link.block_id == i
        assert num_links == len(self._index)
        self._index.check()
