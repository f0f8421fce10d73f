"""Scheduler and KV allocator, beside the step path."""

from __future__ import annotations

from .base import Message
from .ids import Epoch, RequestId


class MatchPrefix(Message, frozen=True):
    """Scheduler -> allocator: find and pin the longest cached prefix of a waiting request.

    Answered by exactly one `PrefixMatched`. At most `len(token_ids) - 1` tokens can match, in whole blocks.

    Attributes:
        token_ids: int32, little endian: prompt, then outputs so far.
        cache_salt: part of the history: nothing is shared under another salt.
        adapter: name of the LoRA adapter, part of the history as well.
        fork_of: share the leading full blocks of this request's table (its prompt is computed); -1 if none.
        skip_cache: pin nothing (prompt logprobs need every position computed).
    """

    epoch: Epoch
    request_id: RequestId
    token_ids: bytes
    cache_salt: str = ""
    adapter: str = ""
    fork_of: RequestId = RequestId(-1)
    skip_cache: bool = False


class PrefixMatched(Message, frozen=True):
    """Allocator -> scheduler: how much of the request is cached; those blocks are pinned until it is released.

    Attributes:
        num_cached_tokens: a multiple of the block size.
        num_blocks_taken: of the pinned blocks, those that counted as free before (nobody else held them).
    """

    epoch: Epoch
    request_id: RequestId
    num_cached_tokens: int
    num_blocks_taken: int


class ReleaseMatch(Message, frozen=True):
    """Scheduler -> allocator: a matched request will not start now; unpin. Answered by one `BlocksFreed`."""

    epoch: Epoch
    request_id: RequestId


class BlocksFreed(Message, frozen=True):
    """Allocator -> scheduler: one answer to each `PlanStep` with releases and to each `ReleaseMatch`.

    Attributes:
        num_blocks: blocks that nobody holds any more (shared ones do not count).
        num_cached_blocks: blocks that nobody holds but that the prefix index can still find.
        num_released: requests that this answers for.
    """

    epoch: Epoch
    num_blocks: int
    num_cached_blocks: int
    num_released: int


class ResetBlocks(Message, frozen=True):
    """Scheduler -> allocator: the executor's KV is lost; forget all tables and the prefix index."""

    epoch: Epoch


class ResetPrefixCache(Message, frozen=True):
    """Operator -> allocator: forget cached blocks that no request holds (weights changed, or a test)."""
