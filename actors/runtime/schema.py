"""What this build's messages look like, as one number: two builds that differ refuse each other at hello."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from typing import Any

import msgspec

from ...messages.base import Message


def all_messages() -> tuple[type[Message], ...]:
    """Every message type of this build, by name."""
    found: list[type[Message]] = []
    package = importlib.import_module(Message.__module__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        for kind in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(kind, type) and issubclass(kind, Message) and kind is not Message and kind not in found:
                found.append(kind)
    return tuple(sorted(found, key=lambda kind: kind.__name__))


@cache
def schema_hash(kinds: tuple[type[Message], ...] | None = None) -> str:
    """32 hexadecimal digits over names, fields, types and defaults of `kinds` (default: all of this build's).

    Text for people (docstrings) does not count, nor does the order of fields: they travel by name.
    """
    wanted: Iterable[type[Message]] = kinds or all_messages()
    references, components = msgspec.json.schema_components(
        list(wanted), schema_hook=lambda kind: {"custom": str(kind)}
    )
    described = msgspec.json.encode((references, _without_prose(components)), order="deterministic")
    return hashlib.sha256(described).hexdigest()[:32]


_UNORDERED = frozenset({"anyOf", "enum", "required"})
"""Lists of JSON schema whose order says nothing, and may differ: `typing` takes equal unions for one."""


def _without_prose(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {
            key: sorted(map(_without_prose, value), key=msgspec.json.encode)
            if key in _UNORDERED and isinstance(value, list)
            else _without_prose(value)
            for key, value in schema.items()
            if not (key in ("description", "title") and isinstance(value, str))
        }
    if isinstance(schema, (list, tuple)):
        return [_without_prose(value) for value in schema]
    return schema
