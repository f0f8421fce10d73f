"""What edge 0 says to its engines in the front end's name; no process is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from octavo.gateway.processes.process_graph import ProcessGraph
from octavo.messages.base import Message
from octavo.messages.kv import ResetPrefixCache
from octavo.messages.system import Drain


def graph_of(others: object) -> tuple[ProcessGraph, list[Message]]:
    """A graph that only remembers what was sent."""
    sent: list[Message] = []
    graph = ProcessGraph.__new__(ProcessGraph)
    supervision: Any = SimpleNamespace(others=others)
    runtime: Any = SimpleNamespace(send=lambda sender, message: sent.append(message))
    graph._supervision, graph._runtime = supervision, runtime
    return graph, sent


@pytest.mark.parametrize(("others", "is_drained"), [(None, True), (object(), False)])
def test_engines_refuse_no_request_that_another_edge_has_accepted_and_not_yet_tokenized(
    others: object, is_drained: bool
) -> None:
    graph, sent = graph_of(others)
    graph.send(Drain())
    graph.send(ResetPrefixCache())
    assert sent == [*([Drain()] if is_drained else []), ResetPrefixCache()]
