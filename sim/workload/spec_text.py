"""Reading the small texts that describe workloads on a command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import NoReturn

from ...messages.errors import InvalidWorkloadError


def unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    """Refuse a name, and say which one was probably meant."""
    names = list(known)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    raise InvalidWorkloadError(f"unknown {kind} {name!r}: {guess}Known: {', '.join(names)}")


def number(text: str, name: str, *, low: float = 0.0, high: float = 1e12, above: bool = False) -> float:
    """A finite number in `[low, high]` (in `(low, high]` if `above`)."""
    try:
        value = float(text)
    except ValueError:
        raise InvalidWorkloadError(f"{name}={text!r} is not a number") from None
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        bound = f"above {low:g}" if above else f"at least {low:g}"
        raise InvalidWorkloadError(f"{name}={text} must be {bound} and at most {high:g}")
    return value


def whole(text: str, name: str, *, low: int = 0, high: int = 2**31 - 1) -> int:
    """A whole number in `[low, high]`; `1e5` is one, too."""
    value = number(text, name, low=low, high=high)
    if value != int(value):
        raise InvalidWorkloadError(f"{name}={text} must be a whole number")
    return int(value)


def key_values(text: str, what: str) -> dict[str, str]:
    """Of `a=1,b=2`; no key twice."""
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise InvalidWorkloadError(f"{what}: {part!r} is not KEY=VALUE")
        if key in found:
            raise InvalidWorkloadError(f"{what}: {key} is given twice")
        found[key] = value
    return found
