"""The engine's account of itself."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges, and totals since the start."""

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
    num_executor_restarts: int
