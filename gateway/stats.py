"""The engine's account of itself."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges, and totals since the start.

    Attributes:
        num_dropped_messages: by cores, of older epochs or incarnations, or about what nobody knows.
        actor_restarts: by actor, as `octavo.gateway.api.engine_metrics.RESTARTING_ACTORS` names them.
        num_requeued: sequences put back among the waiting because their executor or engine was lost.
        num_quarantined: requests refused or ended because they had killed executors.
        num_numerics_losses: executors given up because no row of a step came to numbers.
        step_sizes, step_tokens: steps by their tokens, as `octavo.actors.scheduler.step_sizes` counts, and all tokens.
        num_edges_shed: times that an edge took no more of what an engine told it.
        num_failed_streams: whose tokens could not be made into text.
        messages_dropped: by the ports between processes, by reason (`octavo.gateway.api.engine_metrics.DROP_REASONS`).
        num_completed: sequences of all edges that came to their own end (stop or length).
        num_accepted: sequences that engines took; those that have not completed, nor are any of the following, run or
            wait.
        num_failed, num_cancelled, num_lost: those of them that ended with an error; by a cancel, by a deadline or as
            another engine has them now; and those whose engine was lost, which the next one accepts again.
        num_late_compilations: kernels compiled and graphs captured since executors were ready.
    """

    num_running: int
    num_waiting: int
    num_live: int
    kv_cache_usage: float
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_dropped_messages: int
    actor_restarts: dict[str, int] = {}
    num_requeued: int = 0
    num_quarantined: int = 0
    messages_dropped: dict[str, int] = {}
    num_numerics_losses: int = 0
    step_sizes: tuple[int, ...] = ()
    step_tokens: int = 0
    num_edges_shed: int = 0
    num_failed_streams: int = 0
    num_late_compilations: int = 0
    num_completed: int = 0
    num_accepted: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_lost: int = 0
