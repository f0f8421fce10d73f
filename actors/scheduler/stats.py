"""What the scheduler tells metrics."""

from __future__ import annotations

import msgspec


class SchedulerStats(msgspec.Struct, frozen=True):
    """Counts now and totals since the start.

    Attributes:
        num_running: requests that hold blocks or are about to.
        num_waiting: requests that hold none.
        num_steps_in_flight: planned and not executed.
        num_blocks: of the KV cache.
        credit: blocks that may still be promised.
        num_promised_blocks: set aside for tokens that requests have, and not yet in their block tables.
        num_steps: planned since the start.
        num_preemptions, num_ended, num_refused: of requests, since the start.
        prompt_tokens: computed ahead of sampling, recomputed ones counted again.
        generation_tokens: sampled, those few included that came after a request's end.
        prefix_cache_queries, prefix_cache_hits: tokens looked up in the prefix cache, and found there.
        num_dropped_messages: of older epochs, or about steps and requests nobody knows.
        num_executor_losses: since the start.
        num_faulty_results: results that could not be, for which an executor was told of as failed.
        num_requeued: requests sent back to the queue by losses, each time counted.
        num_resumed: requests that an earlier engine had accepted, submitted again.
        num_quarantined: requests found to kill the executor.
        num_numerics_losses: executors given up because no row of a step came to numbers.
        num_completed: requests that came to their own end (stop or length), since the start.
        num_accepted, num_failed, num_cancelled: requests that were not refused, and those of them that ended with an
            error, or by a cancel or a deadline, since the start. What was accepted and is none of the three is live.
        step_sizes, step_tokens: planned steps that compute anything, by `step_sizes.BOUNDS`, and their tokens.
    """

    num_running: int
    num_waiting: int
    num_steps_in_flight: int
    num_blocks: int
    credit: int
    num_promised_blocks: int
    num_steps: int
    num_preemptions: int
    num_ended: int
    num_refused: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_dropped_messages: int
    num_executor_losses: int
    num_faulty_results: int = 0
    num_requeued: int = 0
    num_resumed: int = 0
    num_quarantined: int = 0
    num_numerics_losses: int = 0
    step_sizes: tuple[int, ...] = ()
    step_tokens: int = 0
    num_completed: int = 0
    num_accepted: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
