"""How an edge adds up what all processes count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
from fake_carrier import FakeCarrier

from octavo.gateway.processes.edge_port import fleet_stats
from octavo.gateway.processes.engine_link import EngineLink
from octavo.messages.processes import EngineReport


def linked(name: str, *reports: EngineReport) -> EngineLink:
    """A link that has heard these reports."""
    carrier: Any = FakeCarrier()
    link = EngineLink(name, carrier, "/run", deliver=lambda message: None)
    for report in reports:
        link.take(report)
    return link


def test_messages_dropped_anywhere_are_in_the_account_of_all_engines_together() -> None:
    report = EngineReport(
        *(1, 4, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 2, 0),
        messages_dropped=(("malformed", 3),),
        num_completed=9,
        num_accepted=16,
        num_failed=1,
        num_cancelled=2,
    )
    second = msgspec.structs.replace(report, incarnation=2, messages_dropped=(("malformed", 1), ("denied_key", 4)))
    links = [linked("engine 0", report, second), linked("engine 1", report), linked("engine 2")]
    links[0].ledger.num_dropped_messages = 5
    port: Any = SimpleNamespace(counters={"malformed": 10, "gap": 0, "resent": 6})
    actors: Any = SimpleNamespace(frontend=SimpleNamespace(num_live=0), restarts={"tokenizer": 1}, num_failed_streams=2)
    stats = fleet_stats(links, actors, port, {"executor": 7}, {"late": 100, "stale_incarnation": 8})
    assert stats.messages_dropped == {
        "malformed": 10 + 3 + 1 + 3,
        "denied_key": 4,
        "stale_incarnation": 8,
        "gap": 0,
        "resent": 6,
    }
    assert stats.num_dropped_messages == 2 + 2 + 2 + 5 + 100
    assert stats.num_completed == 9 + 9 + 9  # of both incarnations
    assert (stats.num_accepted, stats.num_failed, stats.num_cancelled, stats.num_lost) == (48, 3, 6, 4)
    assert stats.num_running == 4 + 4
    assert (stats.num_failed_streams, stats.actor_restarts) == (2, {"executor": 7, "tokenizer": 1})
