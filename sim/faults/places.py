"""Which process each actor lives in."""

from __future__ import annotations

from ...actors.runtime.routes import Address
from .network import ADDRESSES
from .scenario import Topology

PLACES: dict[Topology, dict[Address, str]] = {
    "one": dict.fromkeys(ADDRESSES, "one"),
    "edge+engine": {
        "frontend": "edge",
        "tokenizer": "edge",
        "detokenizer": "edge",
        "scheduler": "engine",
        "kv_allocator": "engine",
        "supervisor": "edge",
        "executor": "device",
    },
    "edge+scheduler+allocator": {
        "frontend": "edge",
        "tokenizer": "edge",
        "detokenizer": "edge",
        "scheduler": "engine",
        "kv_allocator": "blocks",
        "supervisor": "edge",
        "executor": "device",
    },
}
