"""How a node joins an engine elsewhere, and with what: read from its flags and from torchrun's environment."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import msgspec

from ..actors.runtime.addresses import in_brackets, split_endpoint
from ..actors.runtime.curve import check_public_key
from ..messages.errors import InvalidConfigError

DEFAULT_PORT = 7000


class NodeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a node joins, and with what.

    Attributes:
        join: where edge 0 listens.
        name: of the node.
        address: of this host, for the others; empty: that of the interface that leads to edge 0.
        keys: key file; empty: plain loopback.
        server_key: public key of the engine's host.
        num_slots: executors at most; 0 for any number.
        model: here; None: what the engine was given.
        offline, trust_remote_code: as of an engine.
        num_threads, cpu_affinity: of executors; None: what the engine was given.
        log_format: of the processes.
        rank, world_size: among the nodes that a launcher starts; -1 and 0 without one.
        first_gpu: of its executors'; others of this host's are other nodes'.
    """

    join: str
    name: str
    address: str = ""
    keys: str = ""
    server_key: str = ""
    num_slots: int = 0
    model: str | None = None
    offline: bool = False
    trust_remote_code: bool = False
    num_threads: int | None = None
    cpu_affinity: str | None = None
    log_format: str = "auto"
    rank: int = -1
    world_size: int = 0
    first_gpu: int = 0


def node_settings(arguments: argparse.Namespace) -> NodeSettings:
    """Settings of parsed flags and of torchrun's environment.

    Raises:
        InvalidConfigError: what is missing, or makes no sense.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, which starts a process for each rank
    join = arguments.join
    if join is None and is_launched:
        join = f"tcp://{in_brackets(os.environ['MASTER_ADDR'])}:{DEFAULT_PORT}"
    if join is None:
        raise InvalidConfigError("--join tcp://HOST:PORT says where the engine listens", field="join")
    split_endpoint(join)
    server_key = _read_public_key(arguments.server_key) if arguments.server_key else ""
    if bool(arguments.keys) != bool(server_key):
        raise InvalidConfigError(
            "--keys FILE (this host's) and --server-key KEY (the engine's) go together", field="server_key"
        )
    if not arguments.keys and not arguments.plain_loopback:
        raise InvalidConfigError(
            "links between hosts need keys: --keys FILE (`octavo keys FILE` makes one) and --server-key KEY; on a "
            "loopback address, --plain-loopback does without",
            field="keys",
        )
    name, num_slots = arguments.name or platform.node(), arguments.slots or 0
    if is_launched:
        name += f".{os.environ['RANK']}"
        num_slots = arguments.slots or 1
    if not name.isprintable() or not 0 < len(name) <= 56:
        raise InvalidConfigError(f"the name {name!r} must have 1 to 56 printable characters", field="name")
    return NodeSettings(
        join=join,
        name=name,
        address=arguments.address or "",
        keys=arguments.keys or "",
        server_key=server_key,
        num_slots=num_slots,
        model=arguments.model,
        offline=arguments.offline,
        trust_remote_code=arguments.trust_remote_code,
        num_threads=arguments.num_threads,
        cpu_affinity=arguments.cpu_affinity,
        log_format=arguments.log_format,
        rank=int(os.environ["RANK"]) if is_launched else -1,
        world_size=int(os.environ["WORLD_SIZE"]) if is_launched else 0,
        first_gpu=int(os.environ.get("LOCAL_RANK", "0")) * num_slots if is_launched else 0,
    )


def _read_public_key(given: str) -> str:
    """A public key, or that of the file at a path: the key alone, or the first of an allow-list or key file."""
    path = Path(given)
    if len(given) != 40 or path.is_file():
        try:
            words = path.read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfigError(f"--server-key {given}: neither a public key nor a file: {error}") from error
        given = next((word for word in words if len(word) == 40), "")
    return check_public_key(given)
