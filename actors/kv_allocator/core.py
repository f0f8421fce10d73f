"""Which KV block belongs to which request; the only owner of block tables."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ...messages.ids import BlockId, Epoch, RequestId
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks, ResetPrefixCache
from ...messages.step import DecodeStretch, ExecuteStep, PlanStep
from .block_pool import BlockPool
from .config import FIRST_EPOCH, AllocatorConfig
from .prefix_index import PrefixIndex, root_of

__all__ = ["AllocatorConfig", "AllocatorInbox", "AllocatorOutbox", "AllocatorStats", "KVAllocatorCore"]

AllocatorInbox = PlanStep | MatchPrefix | ReleaseMatch | ResetBlocks | ResetPrefixCache
AllocatorOutbox = ExecuteStep | PrefixMatched | BlocksFreed

_TOKEN_BYTES = 4


class AllocatorStats(msgspec.Struct, frozen=True):
    """What the allocator tells metrics.

    Attributes:
        num_blocks: all of them.
        num_held: blocks that requests hold.
        num_free: blocks nobody holds and nobody can find.
        num_cached: blocks nobody holds but the prefix index can find.
        num_evicted: cached blocks given to new contents since the start.
        num_dropped_messages: messages of an older epoch.
    """

    num_blocks: int
    num_held: int
    num_free: int
    num_cached: int
    num_evicted: int
    num_dropped_messages: int


class _RequestBlocks:
    """Blocks of one request, pinned or in use.

    Attributes:
        block_table: block ids in order.
        token_ids: int32 bytes, the tokens that were known when the request was matched.
        num_computed_tokens: leading tokens of `token_ids` whose KV is in the cache.
        root: of its history in the prefix index; None once nothing of it may be found.
        num_published: leading blocks that were found, or published after.
        num_shared_blocks: leading blocks that were found, not computed by this request.
        is_started: part of the executor's batch, no longer merely pinned.
    """

    __slots__ = (
        "block_table",
        "is_started",
        "num_computed_tokens",
        "num_published",
        "num_shared_blocks",
        "root",
        "token_ids",
    )

    def __init__(self, token_ids: bytes, block_table: list[BlockId], root: bytes | None, num_published: int) -> None:
        self.token_ids = token_ids
        self.block_table = block_table
        self.root = root
        self.num_published = num_published
        self.num_shared_blocks = len(block_table)
        self.num_computed_tokens = 0
        self.is_started = False


class KVAllocatorCore:
    """Stamps blocks on planned steps, and finds, pins and evicts cached prefixes.

    The scheduler alone spends blocks and never more than exist, so there is always a block to give. A block released
    while a step in flight still writes it may be given away at once: executors apply steps in order.

    Source: PagedAttention (Kwon et al., SOSP 2023), section 4.2; automatic prefix caching as in vLLM.

    Args:
        config: how much KV there is.
        epoch: the executor's incarnation to begin with.
    """

    def __init__(self, config: AllocatorConfig, epoch: Epoch = FIRST_EPOCH) -> None:
        self._config = config
        self._epoch = epoch
        self._num_dropped_messages = 0
        self._num_evicted_before = 0  # by pools of earlier epochs
        self._block_bytes = config.block_size * _TOKEN_BYTES
        self._handlers: dict[type, Callable[..., list[AllocatorOutbox]]] = {
            PlanStep: self._on_plan_step,
            MatchPrefix: self._on_match_prefix,
            ReleaseMatch: self._on_release_match,
            ResetBlocks: self._on_reset_blocks,
            ResetPrefixCache: self._on_reset_prefix_cache,
        }
        self._clear()

    def _clear(self) -> None:
        self._index = PrefixIndex(0, self._block_bytes)
        self._pool = BlockPool(self._config.num_blocks, self._index)
        self._requests: dict[RequestId, _RequestBlocks] = {}

    def handle(self, message: AllocatorInbox, now_ns: int) -> list[AllocatorOutbox]:
        """Take one message; return what to send. `now_ns` is not used: time decides nothing here."""
        return self._handlers[type(message)](message)

    # -- the step path ------------------------------------------------------------------------------------------------

    def _on_plan_step(self, plan: PlanStep) -> list[AllocatorOutbox]:
        if plan.epoch != self._epoch:
            self._num_dropped_messages += 1
            return []
        requests = self._requests
        out: list[AllocatorOutbox] = []
        drop: tuple[RequestId, ...] = ()
        num_freed = 0
        if plan.release:
            for request_id, token_ids in plan.release:
                num_freed += self._release(request_id, token_ids)
            drop = tuple([request_id for request_id, _ in plan.release])
        block_tables: tuple[tuple[BlockId, ...], ...] = ()
        if plan.start:
            heads = []
            for start in plan.start:
                request = requests[start.request_id]
                assert not request.is_started
                assert len(request.block_table) * self._config.block_size == start.num_computed_tokens
                request.is_started = True
                heads.append(tuple(request.block_table))
            block_tables = tuple(heads)
        append_blocks = self._grow(plan.grow) if plan.grow else ()
        for request_id, num_tokens in plan.computed_prompt_tokens:
            request = requests[request_id]
            request.num_computed_tokens = num_tokens
            self._publish(request, request.token_ids, num_tokens // self._config.block_size)
        out.append(
            ExecuteStep(
                plan.epoch,
                plan.step_id,
                plan.request_ids,
                plan.num_tokens,
                plan.start,
                block_tables,
                append_blocks,
                drop,
            )
        )
        if plan.release:
            out.append(BlocksFreed(self._epoch, num_freed, self._pool.num_cached, len(plan.release)))
        return out

    def _grow(self, grow: tuple[tuple[RequestId, int], ...]) -> tuple[tuple[RequestId, tuple[BlockId, ...]], ...]:
        """Append new blocks to block tables; return which."""
        requests = self._requests
        taken = self._pool.take(sum([num_blocks for _, num_blocks in grow]))
        appended: list[tuple[RequestId, tuple[BlockId, ...]]] = []
        at = 0
        for request_id, num_blocks in grow:
            if num_blocks == 1:  # as nearly every row that decodes
                block_id = taken[at]
                at += 1
                requests[request_id].block_table.append(block_id)
                appended.append((request_id, (block_id,)))
                continue
            block_ids = taken[at : at + num_blocks]
            at += num_blocks
            requests[request_id].block_table += block_ids
            appended.append((request_id, tuple(block_ids)))
        return tuple(appended)

    def advance_decode(self, stretch: DecodeStretch) -> list[tuple[int, RequestId, BlockId]]:
        """Append the blocks that the plans of a stretch would have appended; return them as `(step_offset, id, block)`.

        Beside `handle` for the simulator alone, which skips the messages of steps whose outcome is known.
        """
        assert stretch.epoch == self._epoch
        requests = self._requests
        block_ids = self._pool.take(len(stretch.grow))
        appended = []
        for (step_offset, request_id), block_id in zip(stretch.grow, block_ids, strict=True):
            requests[request_id].block_table.append(block_id)
            appended.append((step_offset, request_id, block_id))
        return appended

    def _release(self, request_id: RequestId, token_ids: bytes) -> int:
        request = self._requests.pop(request_id)
        if token_ids:
            num_full = min(len(token_ids) // self._block_bytes, len(request.block_table))
            self._publish(request, token_ids, num_full)
        else:
            self._pool.forget_held(request.block_table[request.num_shared_blocks : request.num_published])
        return self._pool.release(request.block_table)

    def _publish(self, request: _RequestBlocks, token_ids: bytes, num_blocks: int) -> None:
        """Let the first `num_blocks` blocks of a request be found by their tokens."""
        begin = request.num_published
        if request.root is None or num_blocks <= begin:
            return
        self._index.add(
            request.root, token_ids[: num_blocks * self._block_bytes], request.block_table[begin:num_blocks]
        )
        request.num_published = num_blocks

    # -- beside the step path -----------------------------------------------------------------------------------------

    def _on_match_prefix(self, match: MatchPrefix) -> list[AllocatorOutbox]:
        if match.epoch != self._epoch:
            self._num_dropped_messages += 1
            return []
        assert match.request_id not in self._requests
        token_ids = match.token_ids
        # The last token is always computed: its logits are what the next token is drawn from.
        max_blocks = 0 if match.skip_cache else (len(token_ids) - _TOKEN_BYTES) // self._block_bytes
        block_table: list[BlockId] = []
        root: bytes | None = None
        if self._config.enable_prefix_caching:
            root = root_of(match.cache_salt, match.adapter)
            block_table = self._index.find(root, token_ids, max_blocks)
        num_published = len(block_table)
        leader = self._requests.get(match.fork_of)
        if leader is not None and leader.root == root:  # of another salt or adapter there is nothing to share
            num_forked = min(leader.num_computed_tokens // self._config.block_size, max_blocks)
            while num_forked > num_published and not token_ids.startswith(
                leader.token_ids[: num_forked * self._block_bytes]
            ):
                num_forked -= 1
            if num_forked > num_published:
                block_table = leader.block_table[:num_forked]
        num_taken = self._pool.hold(block_table)
        self._requests[match.request_id] = _RequestBlocks(token_ids, block_table, root, num_published)
        num_cached_tokens = len(block_table) * self._config.block_size
        return [PrefixMatched(self._epoch, match.request_id, num_cached_tokens, num_taken)]

    def _on_release_match(self, release: ReleaseMatch) -> list[AllocatorOutbox]:
        if release.epoch != self._epoch:
            self._num_dropped_messages += 1
            return []
        request = self._requests.pop(release.request_id)
        assert not request.is_started
        num_freed = self._pool.release(request.block_table)
        return [BlocksFreed(self._epoch, num_freed, self._pool.num_cached, 1)]

    def _on_reset_blocks(self, reset: ResetBlocks) -> list[AllocatorOutbox]:
        if reset.epoch <= self._epoch:
            self._num_dropped_messages += 1
            return []
        self._epoch = reset.epoch
        self._num_evicted_before += self._pool.num_evicted
        self._clear()
        return []

    def _on_reset_prefix_cache(self, _: ResetPrefixCache) -> list[AllocatorOutbox]:
        self._pool.forget_cached()
        for request in self._requests.values():
            request.root = None  # what it computed before must not be found later either
        return []

    # -- for metrics and tests ----------------------------------------------------------------------------------------

    def stats(self) -> AllocatorStats:
        """Return counts for metrics; changes nothing."""
        return AllocatorStats(
            num_blocks=self._config.num_blocks,
            num_held=self._config.num_blocks - self._pool.num_free - self._pool.num_cached,
            num_free=self._pool.num_free,
            num_cached=self._pool.num_cached,
            num_evicted=self._num_evicted_before + self._pool.num_evicted,
            num_dropped_messages=self._num_dropped_messages,
        )

    def check(self) -> None:
        """Assert that every block is accounted for and every reference count equals the number of its holders."""
        self._pool.check()
        counts = [0] * len(self._pool.ref_counts)
        for request in self._requests.values():
            assert len(set(request.block_table)) == len(request.block_table)
            for block_id in request.block_table:
                counts[block_id] += 1
        assert counts == self._pool.ref_counts
