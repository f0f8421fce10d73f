"""Messages of every type that there is, with values that their fields may hold; for trying what damage does to them."""

from __future__ import annotations

import random
from typing import Any

from msgspec import inspect

from ...messages.base import Message
from ...messages.tensor import Tensor
from .schema import all_messages
from .wire import Decoder, Encoder, MalformedMessageError

_MAX_DEPTH = 6
_MAX_TRIES = 200


class CarriedTensors(Message, frozen=True):
    """Stands for messages with tensors."""

    name: str
    hidden: Tensor
    mask: Tensor


KINDS: tuple[type[Message], ...] = (*all_messages(), CarriedTensors)


def sample_messages(seed: int = 0) -> list[Message]:
    """Two messages of each type: one as short as may be, one with something in every field.

    Raises:
        AssertionError: there is a type that no value was found for.
    """
    chance = random.Random(seed)  # noqa: S311  # a test, not a secret
    decoder = Decoder(KINDS)
    return [_valid(kind, length, chance, decoder) for kind in KINDS for length in (0, 3)]


def _valid(kind: type[Message], length: int, chance: random.Random, decoder: Decoder) -> Message:
    """A message that arrives as it was sent; which values are in range the decoder knows."""
    info = inspect.type_info(kind)
    for _ in range(_MAX_TRIES):
        message: Message = _value(info, length, chance, _MAX_DEPTH)
        body, tensors = Encoder().encode(message)
        try:
            if decoder.decode(body, tensors) == message:
                return message
        except MalformedMessageError:
            length = max(1, length)  # some columns may not be empty
    raise AssertionError(f"no {kind.__name__} is in range")


def _value(info: inspect.Type, length: int, chance: random.Random, depth: int) -> Any:
    """A value of a type; whatever has a length has this one, as columns of one table must."""
    match info:
        case inspect.StructType(cls=cls, fields=fields) | inspect.NamedTupleType(cls=cls, fields=fields):
            return cls(**{field.name: _value(field.type, length, chance, depth - 1) for field in fields})
        case inspect.UnionType(types=types):
            rest = [each for each in types if not isinstance(each, inspect.NoneType)]
            is_none = len(rest) < len(types) and (not length or depth <= 0)
            return None if is_none else _value(chance.choice(rest), length, chance, depth)
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return tuple(_value(item, length, chance, depth - 1) for _ in range(length if depth > 0 else 0))
        case inspect.TupleType(item_types=items):
            return tuple(_value(item, length, chance, depth - 1) for item in items)
        case inspect.DictType(key_type=key, value_type=value):
            return {_value(key, length, chance, 1): _value(value, length, chance, depth - 1) for _ in range(length)}
        case inspect.CustomType(cls=cls) if cls is Tensor:
            return Tensor("float32", (length, 2), bytes(8 * length))
        case _:
            return _plain(info, length, chance)


def _plain(info: inspect.Type, length: int, chance: random.Random) -> Any:
    match info:
        case inspect.NoneType():
            return None
        case inspect.BoolType():
            return bool(length)
        case inspect.IntType():
            return chance.choice((0, 1, 7, 100, 40_000, 2**31 - 1)) if length else 0
        case inspect.FloatType():
            return chance.choice((0.0, -0.25, 0.5, 1.0))
        case inspect.StrType():
            return "".join(chance.choice("aé漢🎵 ") for _ in range(length))
        case inspect.BytesType():
            return chance.randbytes(4 * length)
        case inspect.LiteralType(values=values):
            return chance.choice(values)
        case inspect.EnumType(cls=cls):
            return chance.choice(list(cls))
        case _:
            raise AssertionError(f"messages hold a kind of value that is not known here: {info}")
