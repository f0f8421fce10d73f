"""`octavo node`: lend this host's processes to an engine that runs elsewhere."""

from __future__ import annotations

import argparse

from .flag_parser import Parser
from .node_flags import add_node_flags

DESCRIPTION = """Join an engine that `octavo serve --listen` runs on another host, and run executors for it. The model
is loaded from this host's own copy, which must be the same. Started by torchrun (-m octavo.gateway.node), each process
is the node of one executor, that of its RANK."""


def add_node(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    node = commands.add_parser("node", help="run executors for an engine on another host", description=DESCRIPTION)
    add_node_flags(node)
    node.set_defaults(run=_node, parser=node)


def _node(arguments: argparse.Namespace) -> int:
    from .node import run_node

    return run_node(arguments)
