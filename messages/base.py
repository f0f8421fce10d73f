"""The base of every message."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True, gc=False, forbid_unknown_fields=True):
    """A typed, immutable value that one actor sends to another.

    Fields are plain values, ids and tuples, so a message means the same before and after a process hop.
    New fields go last, with a default. A decoder refuses fields that it does not know.
    """
