"""`octavo keys`: CURVE key pairs for links between hosts."""

from __future__ import annotations

import argparse
from pathlib import Path

from .flag_parser import Parser

DESCRIPTION = """Make a CURVE key pair for links over TCP. FILE gets the pair, readable by you alone (mode 0600); the
public key is printed. Give FILE to the host whose key it is, and put the public key on a line of the allow-list of
every host that it may connect to (behind the key, a name: the only one that the key may speak for)."""


def add_keys(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the command."""
    keys = commands.add_parser("keys", help="make CURVE keys for links between hosts", description=DESCRIPTION)
    keys.add_argument("file", metavar="FILE", type=Path, help="where the pair is written")
    group = keys.add_mutually_exclusive_group()
    group.add_argument("--force", action="store_true", help="replace a file that is there")
    group.add_argument("--public", action="store_true", help="make nothing; print the public key of FILE")
    keys.set_defaults(run=_keys, parser=keys)


def _keys(arguments: argparse.Namespace) -> int:
    from ..actors.runtime.curve import make_keys, read_keys, write_keys

    if arguments.public:
        keys = read_keys(arguments.file)
    else:
        keys = make_keys()
        write_keys(keys, arguments.file, replace=arguments.force)
    print(keys.public)
    return 0
