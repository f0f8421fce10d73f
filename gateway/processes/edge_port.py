"""What every edge of several processes has: whom it listens to, what it routes, how it adds up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from ...actors.runtime.port import LinkEvent, Port
from ...actors.runtime.routes import ROUTES, Routes
from ...messages.processes import EdgeShed, EngineFailed, EngineReport
from ...messages.request import RequestEnded
from ...messages.step import StepExecuted
from ...messages.system import Beat, EngineReady, ExecutorFailed
from ..stats import EngineStats
from .edge import EdgeActors
from .engine_link import EngineLink, summed

log = structlog.get_logger("octavo.edge")

FROM_ENGINE: Final = (
    StepExecuted,
    RequestEnded,
    ExecutorFailed,
    EngineReady,
    EngineReport,
    EngineFailed,
    EdgeShed,
    Beat,
)


def edge_routes() -> Routes:
    """What the actors at an edge say, and what engines say to them."""
    local = {"frontend", "tokenizer", "detokenizer"}
    return {
        (sender, kind): receivers
        for (sender, kind), receivers in ROUTES.items()
        if sender in local or (sender == "scheduler" and receivers == ("detokenizer",))
    }


def log_link_event(event: LinkEvent) -> None:
    """Tell of what should not happen between processes of one engine."""
    if event.what in ("refused", "overrun", "malformed", "gap"):
        log.warning("link", peer=event.peer, what=event.what, why=event.why)


def fleet_stats(
    links: Sequence[EngineLink],
    actors: EdgeActors,
    port: Port,
    restarts: Mapping[str, int],
    drops_of_others: Mapping[str, int],
    *,
    num_late_compilations: int = 0,
) -> EngineStats:
    """The account of all engines together, as far as they have reported.

    Args:
        drops_of_others: messages that were dropped neither here nor by an engine, by reason.
        num_late_compilations: as executors tell it.
    """
    reports = [link.report for link in links if link.report is not None]
    num_blocks = sum(report.num_blocks for report in reports)

    dropped = Counter(port.counters)
    for drops in (*(link.drops.totals for link in links), drops_of_others):
        dropped.update(drops)
    late = dropped.pop("late", 0) + sum(link.ledger.num_dropped_messages for link in links)

    def total(name: str) -> int:
        return sum(link.total(name) for link in links)

    return EngineStats(
        num_running=sum(report.num_running for report in reports),
        num_waiting=sum(report.num_waiting for report in reports),
        num_live=actors.frontend.num_live,
        kv_cache_usage=sum(report.num_held_blocks for report in reports) / num_blocks if num_blocks else 0.0,
        num_preemptions=total("num_preemptions"),
        prefix_cache_queries=total("prefix_cache_queries"),
        prefix_cache_hits=total("prefix_cache_hits"),
        prompt_tokens=total("prompt_tokens"),
        generation_tokens=total("generation_tokens"),
        num_steps=total("num_steps"),
        num_dropped_messages=total("num_dropped_messages") + late,
        actor_restarts={**restarts, **actors.restarts},
        num_requeued=total("num_requeued"),
        num_quarantined=total("num_quarantined"),
        num_numerics_losses=total("num_numerics_losses"),
        step_sizes=summed(*(link.step_sizes for link in links)),
        step_tokens=total("step_tokens"),
        messages_dropped=dict(dropped),
        num_failed_streams=actors.num_failed_streams,
        num_edges_shed=total("num_edges_shed"),
        num_late_compilations=num_late_compilations,
        num_completed=total("num_completed"),
        num_accepted=total("num_accepted"),
        num_failed=total("num_failed"),
        num_cancelled=total("num_cancelled"),
        num_lost=sum(link.num_lost for link in links),
    )
