"""Which values a message's fields may hold beyond their types; what `msgspec` does not check on arrival.

The rules follow the house's names: ids and counts are not negative (unless their default is), floats are finite,
`bytes` called token ids hold whole int32s, columns of one table are equally long. A rule is compiled once per message
type.
"""

from __future__ import annotations

import types
import typing
from array import array
from collections.abc import Callable, Collection, Iterable
from itertools import chain
from typing import Any, Union

import msgspec

from ...messages.processes import EngineFailed
from ...messages.request import StepTexts, SubmitPrompt, SubmitRequest, TokenLogprobs
from ...messages.sampling import SamplingParams
from ...messages.step import ExecuteStep, PlanStep, StepExecuted

Check = Callable[[Any], None]  # any value a decoder can make; raises `ValueError` or `OverflowError`

MAX_INT = 2**63 - 1

LOWEST: dict[tuple[type, str], int] = {
    (EngineFailed, "request_id"): -1,
    (SubmitPrompt, "priority"): -MAX_INT,
    (SubmitPrompt, "truncate_prompt_tokens"): -1,
    (SubmitRequest, "priority"): -MAX_INT,
    (SamplingParams, "top_k"): -1,
    (SamplingParams, "logprobs"): -1,
    (SamplingParams, "prompt_logprobs"): -1,
    (SamplingParams, "seed"): -MAX_INT,
}
"""Integers that may be negative although their default is not."""

COLUMNS: dict[type, tuple[tuple[str, ...], ...]] = {
    PlanStep: (("request_ids", "num_tokens"),),
    ExecuteStep: (("request_ids", "num_tokens"), ("start", "block_tables")),
    StepExecuted: (("request_ids", "token_ids"),),
    StepTexts: (("request_ids", "texts", "token_ids"),),
}
"""Fields that are columns of one table."""

LOGARITHMS = frozenset({TokenLogprobs})
"""Types whose floats are logarithms of probabilities: minus infinity is one of zero."""


class OutOfRangeError(ValueError):
    """A field holds what its type allows but its meaning does not."""


def compile_check(struct: type[msgspec.Struct], is_checked: Collection[str] = ()) -> Check | None:
    """The check of one struct type and all it contains; None if any decoded value will do.

    Args:
        is_checked: fields of `struct` whose values were checked as they were decoded.
    """
    return _struct_check(struct, {}, is_checked)


def _struct_check(
    struct: type[msgspec.Struct], known: dict[type, Check | None], is_checked: Collection[str] = ()
) -> Check | None:
    if struct in known:
        return known[struct]
    known[struct] = None  # a struct never contains itself: the compiler would not end otherwise
    checks: list[tuple[str, Any, Check]] = []
    for field in msgspec.structs.fields(struct):
        if field.name in is_checked:
            continue
        lowest = LOWEST.get((struct, field.name))
        if lowest is None:
            lowest = field.default if type(field.default) is int and field.default < 0 else 0
        check = _type_check(field.type, lowest, field.name, struct, known)
        if check is not None:
            checks.append((field.name, field.default, check))
    columns = COLUMNS.get(struct, ())
    if not checks and not columns:
        return None

    def check_struct(value: Any) -> None:
        for name, default, check in checks:
            held = getattr(value, name)
            if held is not default:
                check(held)
        for names in columns:
            length = len(getattr(value, names[0]))
            for name in names[1:]:
                if len(getattr(value, name)) != length:
                    raise OutOfRangeError(f"{struct.__name__}.{name} is not as long as {names[0]}")

    known[struct] = check_struct
    return check_struct


def _type_check(
    annotation: Any, lowest: int, name: str, struct: type[msgspec.Struct], known: dict[type, Check | None]
) -> Check | None:
    while hasattr(annotation, "__supertype__"):  # NewType
        annotation = annotation.__supertype__
    if annotation is int:
        return _int_check(lowest, f"{struct.__name__}.{name}")
    if annotation is float:
        return _float_check(float("-inf") if struct in LOGARITHMS else -MAX_FLOAT, f"{struct.__name__}.{name}")
    if annotation is bytes:
        return _int32s_check(f"{struct.__name__}.{name}") if name.endswith("token_ids") else None
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return _struct_check(annotation, known)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return _sequence_check(arguments[0], lowest, name, struct, known)
        return _record_check([_type_check(argument, lowest, name, struct, known) for argument in arguments])
    if origin is dict:
        return _mapping_check(*[_type_check(argument, lowest, name, struct, known) for argument in arguments])
    if origin in (Union, types.UnionType):
        return _union_check(arguments, lowest, name, struct, known)
    return None


MAX_FLOAT = float.fromhex("0x1.fffffffffffffp+1023")


def _int_check(lowest: int, where: str) -> Check:
    def check_int(value: int) -> None:
        if not lowest <= value <= MAX_INT:
            raise OutOfRangeError(f"{where} is out of range")

    check_int.lowest = lowest  # type: ignore[attr-defined]  # how `_sequence_check` knows a plain integer
    return check_int


def _float_check(lowest: float, where: str) -> Check:
    def check_float(value: float) -> None:
        if not lowest <= value <= MAX_FLOAT:  # false for NaN as well
            raise OutOfRangeError(f"{where} is not a finite number")

    return check_float


def _int32s_check(where: str) -> Check:
    def check_int32s(value: bytes) -> None:
        if len(value) % 4:
            raise OutOfRangeError(f"{where} is no whole number of int32s")

    return check_int32s


def _sequence_check(
    element: Any, lowest: int, name: str, struct: type[msgspec.Struct], known: dict[type, Check | None]
) -> Check | None:
    arguments = typing.get_args(element)
    is_tuple = typing.get_origin(element) is tuple
    if is_tuple and arguments[1:] != (Ellipsis,):  # rows of a table: a column at a time
        columns = [_sequence_check(argument, lowest, name, struct, known) for argument in arguments]
        return _table_check(columns) if any(columns) else None
    check = _type_check(element, lowest, name, struct, known)
    if check is None:
        return None
    if lowest == 0 and hasattr(check, "lowest"):
        return _check_unsigned
    if is_tuple and check is _check_unsigned:
        return lambda value: _check_unsigned(chain.from_iterable(value))

    def check_sequence(value: Iterable[Any]) -> None:
        for held in value:
            check(held)

    return check_sequence


def _table_check(checks: list[Check | None]) -> Check:
    def check_table(value: Iterable[tuple[Any, ...]]) -> None:
        for check, column in zip(checks, zip(*value, strict=True), strict=False):  # no columns if there are no rows
            if check is not None:
                check(column)

    return check_table


def _check_unsigned(value: Iterable[int]) -> None:
    # One pass in C (2.5 us for 256 numbers; `min` and `max` take 9): negative ones and beyond 64 bits overflow.
    array("Q", value)


def _record_check(checks: list[Check | None]) -> Check | None:
    wanted = [(index, check) for index, check in enumerate(checks) if check is not None]
    if not wanted:
        return None

    def check_record(value: tuple[Any, ...]) -> None:
        for index, check in wanted:
            check(value[index])

    return check_record


def _mapping_check(check_key: Check | None, check_value: Check | None) -> Check | None:
    if check_key is None and check_value is None:
        return None

    def check_mapping(value: dict[Any, Any]) -> None:
        for key, held in value.items():
            if check_key is not None:
                check_key(key)
            if check_value is not None:
                check_value(held)

    return check_mapping


def _union_check(
    arguments: tuple[Any, ...], lowest: int, name: str, struct: type[msgspec.Struct], known: dict[type, Check | None]
) -> Check | None:
    by_type: dict[type, Check] = {}
    for argument in arguments:
        check = _type_check(argument, lowest, name, struct, known)
        if check is not None:
            by_type[typing.get_origin(argument) or _plain(argument)] = check
    if not by_type:
        return None

    def check_union(value: Any) -> None:
        check = by_type.get(type(value))
        if check is not None:
            check(value)

    return check_union


def _plain(annotation: Any) -> type:
    while hasattr(annotation, "__supertype__"):
        annotation = annotation.__supertype__
    assert isinstance(annotation, type)
    return annotation
