"""Configuration of the scheduler."""

from __future__ import annotations

import msgspec

from ...messages.ids import Epoch

FIRST_EPOCH = Epoch(0)

MAX_GROWTH = 4
"""Blocks that a decoding row takes at once where there are plenty: each time costs every actor of the ring."""


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the executor holds, and how it is shared out.

    Attributes:
        num_blocks: KV blocks of the executor.
        block_size: tokens in a block.
        max_model_len: longest sequence, prompt and output together.
        max_num_seqs: requests that run at the same time.
        max_num_batched_tokens: tokens in one step, of prompts and outputs together.
        pipeline_depth: steps in flight.
        max_num_queued_requests, max_num_queued_tokens: bounds of the waiting queue; past them requests are refused.
        priority_aging_ns: waiting this long is worth one level of priority.
        long_prefill_threshold: most tokens of one prompt in a step, so that short prompts pass long ones; 0: no limit.
        enable_prefix_caching: whether to tell the allocator what was computed.
        max_executor_losses: a request that is in flight at more losses of the executor than this, without a token
            gained between them, is held to be their cause.
        vocab_size: token ids are below it; 0: unknown.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    pipeline_depth: int = 2
    max_num_queued_requests: int = 4096
    max_num_queued_tokens: int = 8_000_000
    priority_aging_ns: int = 10_000_000_000
    long_prefill_threshold: int = 0
    enable_prefix_caching: bool = True
    max_executor_losses: int = 2
    vocab_size: int = 0

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "pipeline_depth",
            "max_num_queued_requests",
            "max_num_queued_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("priority_aging_ns", "long_prefill_threshold", "max_executor_losses", "vocab_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} must be at least 2: one prompt and one output token")

    @property
    def max_sequence_len(self) -> int:
        """Longest sequence that both the model and the KV cache hold."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    @property
    def num_blocks_plenty(self) -> int:
        """With more blocks than these to spend, a decoding row takes `MAX_GROWTH` at once.

        A quarter of the cache, and more than whoever waits could need: nobody is kept out by what was taken early.
        """
        longest = -(-self.max_sequence_len // self.block_size)
        return (self.num_blocks + 3) // 4 + longest + MAX_GROWTH * self.max_num_seqs
