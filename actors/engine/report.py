"""The engine's account of itself, for the edges."""

from __future__ import annotations

from ...messages.processes import EngineReport
from ..kv_allocator.core import KVAllocatorCore
from ..scheduler.core import SchedulerCore


class Reporter:
    """Makes the reports of one engine, and sees when its steps stop.

    Args:
        incarnation: of the engine.
    """

    def __init__(self, incarnation: int) -> None:
        self._incarnation = incarnation
        self._last_step = (-1, 0)  # steps so far, and when that was first seen; none was, before the first report

    def report(
        self,
        scheduler_core: SchedulerCore,
        allocator_core: KVAllocatorCore,
        *,
        num_edges_shed: int,
        messages_dropped: tuple[tuple[str, int], ...],
        now_ns: int,
    ) -> EngineReport:
        """How both cores do now, and the engine's port."""
        scheduler, allocator = scheduler_core.stats(), allocator_core.stats()
        num_executed = scheduler.num_steps - scheduler.num_steps_in_flight
        # Steps whose requests were cancelled are waited for as well: they hold blocks, and places in the pipeline.
        is_working = scheduler.num_running or scheduler.num_waiting or scheduler.num_steps_in_flight
        if num_executed != self._last_step[0] or not is_working:
            self._last_step = (num_executed, now_ns)
        return EngineReport(
            incarnation=self._incarnation,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_held_blocks=allocator.num_held,
            num_blocks=allocator.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            num_steps=scheduler.num_steps,
            num_steps_in_flight=scheduler.num_steps_in_flight,
            num_dropped_messages=scheduler.num_dropped_messages + allocator.num_dropped_messages,
            num_executor_losses=scheduler.num_executor_losses,
            num_requeued=scheduler.num_requeued + scheduler.num_resumed,
            num_quarantined=scheduler.num_quarantined,
            num_numerics_losses=scheduler.num_numerics_losses,
            step_sizes=scheduler.step_sizes,
            step_tokens=scheduler.step_tokens,
            step_age_ns=now_ns - self._last_step[1],
            num_edges_shed=num_edges_shed,
            messages_dropped=messages_dropped,
            num_completed=scheduler.num_completed,
            num_accepted=scheduler.num_accepted,
            num_failed=scheduler.num_failed,
            num_cancelled=scheduler.num_cancelled,
        )
