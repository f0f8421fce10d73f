"""What happened at a port: counters, events for the supervisor, and few log lines."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Literal

import msgspec
import structlog

log = structlog.get_logger("octavo.port")

LOG_INTERVAL_NS = 1_000_000_000
MAX_EVENTS = 1024

COUNTERS = (
    "malformed",  # no frame of ours, damaged, or no message that this peer may send
    "multipart",  # more or fewer frames than the head says
    "version",  # another protocol version in the middle of a session
    "refused_hello",
    "parked",  # hellos of incarnations that nobody announced, while another has the name: they wait
    "stale_incarnation",
    "repeated",
    "gap",
    "stranger",  # connections shut, as too many had not said hello
    "foreign",  # of a connection that did not say hello
    "overrun",  # beyond the window that was granted
    "held_back",  # grants held back because a peer sends too fast
    "full",  # `send` refused
    "reconnected",
    "resent",
    "denied_key",
    "handshake_failed",
    "dropped_events",
)


NOT_DROPS = frozenset({"parked", "held_back", "reconnected", "resent", "dropped_events", "stranger"})
"""Counters of something else than messages that were thrown away."""


def drops_of(*counters: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Messages that these ports threw away, by reason; reasons that had none are left out."""
    totals: Counter[str] = Counter()
    for each in counters:
        totals.update(each)
    return tuple((name, count) for name, count in totals.items() if count and name not in NOT_DROPS)


class LinkEvent(msgspec.Struct, frozen=True):
    """Something that happened to a link, for the supervisor.

    Attributes:
        what: `up`: `peer` welcomed us. `lost`: the connection to it was torn, and is being made again. `refused`: it
            does not want us (`why`), the link is dead. `keys`: a handshake failed for its keys. From the receiving
            side: `heard`: `peer` said hello. `gap`: messages of it are missing, it was asked to send them again.
            `overrun`: it sends more than it may. `malformed`: it sends nonsense (once a second at most).
    """

    peer: str
    what: Literal["up", "lost", "refused", "keys", "heard", "gap", "overrun", "malformed"]
    why: str = ""


class PortRecord:
    """Keeps a port's account.

    Args:
        name: of the port's process, for the log.
    """

    def __init__(self, name: str) -> None:
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.events: deque[LinkEvent] = deque()
        self._name = name
        self._logged: dict[str, int] = {}

    def report(self, peer: str, what: str, why: str = "") -> None:
        """Keep an event until somebody takes it; past the bound they are counted alone."""
        if len(self.events) >= MAX_EVENTS:
            self.counters["dropped_events"] += 1
            return
        self.events.append(LinkEvent(peer, what, why))  # type: ignore[arg-type]  # of the closed set, by construction

    def count(self, reason: str, peer: str = "", why: str = "") -> bool:
        """Count, and log at most one line a second and reason; returns whether it did."""
        self.counters[reason] += 1
        now_ns = time.monotonic_ns()
        if now_ns - self._logged.get(reason, -LOG_INTERVAL_NS) < LOG_INTERVAL_NS:
            return False
        self._logged[reason] = now_ns
        log.warning("port.dropped", port=self._name, peer=peer, reason=reason, why=why, total=self.counters[reason])
        return True
