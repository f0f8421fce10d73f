"""Decodes the messages of a step, whose columns are long and mostly as they were in the step before.

While a batch decodes, the same requests take part in step after step. So the bytes of such a column are compared with
those that came last; equal ones stand for the value that was made and checked then. On the wire nothing is different.
Other columns of integers are checked by the decoder itself, as it makes them.

Decoding an `ExecuteStep` of 256 requests took 21 us, checked afterwards, and takes 6; a `StepExecuted`, whose tokens
are new each time, 19 and 11 (CPU time; `python -m octavo.actors.runtime.bench_port`, two shared cores of an EPYC).
"""

from __future__ import annotations

import operator
import typing
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from ...messages.base import Message
from ...messages.step import ExecuteStep, StepExecuted
from .value_ranges import MAX_INT, Check, compile_check

STANDING: dict[type[Message], tuple[str, ...]] = {
    ExecuteStep: ("request_ids", "num_tokens"),
    StepExecuted: ("request_ids",),
}
"""The columns that mostly repeat. They have no default."""

MAX_KEPT_BYTES = 64 << 10
"""Longer columns are made anew each time: what a decoder keeps has a bound."""

_Unsigned = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]


class StepDecoder:
    """Makes messages of one kind of what stands for them on the wire; keeps the last value of each standing column.

    Args:
        kind: one of `STANDING`.

    Attributes:
        wire_type: what a msgpack decoder has to make of the bytes, for `message`.
    """

    def __init__(self, kind: type[Message]) -> None:
        self._kind = kind
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        self._columns: list[tuple[int, _Column]] = []
        is_checked: set[str] = set()
        for index, field in enumerate(msgspec.structs.fields(kind)):
            bounded = _bounded(field.type)
            annotation = field.type if bounded is None else bounded
            if bounded is not None:
                is_checked.add(field.name)
            if field.name in STANDING[kind]:
                assert field.required
                assert bounded is not None
                self._columns.append((index, _Column(msgspec.msgpack.Decoder(bounded).decode)))
                annotation = msgspec.Raw
            fields.append((field.name, annotation) if field.required else (field.name, annotation, field.default))
        self.wire_type = msgspec.defstruct(
            f"{kind.__name__}OnTheWire",
            fields,
            tag=kind.__struct_config__.tag,
            gc=False,
            forbid_unknown_fields=True,
        )
        self._values: Callable[[Any], tuple[Any, ...]] = operator.attrgetter(*(field[0] for field in fields))
        self._check: Check | None = compile_check(kind, is_checked)

    def message(self, wire: msgspec.Struct) -> Message:
        """The message for a value of `wire_type`.

        Raises:
            msgspec.ValidationError, ValueError, OverflowError, RecursionError: a field is of another type or out of
                range.
        """
        values: list[Any] = list(self._values(wire))
        for index, column in self._columns:
            values[index] = column.value(values[index])
        message = self._kind(*values)
        if self._check is not None:
            self._check(message)
        return message


class _Column:
    """One column, as it last came."""

    def __init__(self, decode: Callable[[msgspec.Raw], tuple[int, ...]]) -> None:
        self._decode = decode
        self._raw = msgspec.Raw(b"\x90")
        self._value: tuple[int, ...] = ()

    def value(self, raw: msgspec.Raw) -> tuple[int, ...]:
        if raw == self._raw:
            return self._value
        value = self._decode(raw)
        if len(memoryview(raw)) <= MAX_KEPT_BYTES:
            self._raw, self._value = raw.copy(), value
        return value


def _bounded(annotation: Any) -> Any:
    """The same type with the bounds of an id or a count, if it is made of tuples and integers alone; else None."""
    while hasattr(annotation, "__supertype__"):  # NewType
        annotation = annotation.__supertype__
    if annotation is int:
        return _Unsigned
    if typing.get_origin(annotation) is not tuple:
        return None
    arguments = [argument if argument is Ellipsis else _bounded(argument) for argument in typing.get_args(annotation)]
    return None if None in arguments else tuple[tuple(arguments)]  # type: ignore[misc]  # made at run time
