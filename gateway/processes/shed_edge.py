"""What an edge does that an engine has shed, because it took no more messages: stopped, or far too slow."""

from __future__ import annotations

import structlog

from ...messages.processes import EdgeShed, ShedHeard
from .engine_link import EngineLink

log = structlog.get_logger("octavo.link")


def take_up_again(link: EngineLink, shed: EdgeShed) -> None:
    """Ask the engine anew for all that lives, each request from the tokens that reached this edge.

    An engine that has been replaced meanwhile was given all of it already; one that is being replaced will be.
    """
    if shed.incarnation != link.incarnation or not link.is_up:
        return
    link.send(ShedHeard(shed.number))
    again = link.say_again()
    log.error("engine.has_shed_this_edge", engine=link.name, number=shed.number, num_resubmitted=len(again))
    for message in again:
        link.send(message)
