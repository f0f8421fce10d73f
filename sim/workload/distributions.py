"""Distributions of lengths and times, by a text like `lognormal:1000:0.8`."""

from __future__ import annotations

import math
from typing import Protocol

import msgspec

from ...messages.errors import InvalidWorkloadError
from .draws import Draw
from .spec_text import number, unknown
from .trace import read_trace

_MAX_VALUE = 1e9
FORMS = (
    "fixed:VALUE (or VALUE alone), uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA, exponential:MEAN, "
    "empirical:TRACE_FILE (prompts and outputs only)"
)


class Distribution(Protocol):
    """A non-negative quantity."""

    @property
    def max_value(self) -> float:
        """No draw is larger."""
        ...

    def draw(self, draw: Draw) -> float:
        """One value."""
        ...


class Fixed(msgspec.Struct, frozen=True):
    """Always the same."""

    value: float

    @property
    def max_value(self) -> float:
        """It."""
        return self.value

    def draw(self, draw: Draw) -> float:
        """It."""
        return self.value


class Uniform(msgspec.Struct, frozen=True):
    """Whole and broken numbers from `low` to `high`; rounded, all whole ones are as likely."""

    low: float
    high: float
    is_whole: bool

    @property
    def max_value(self) -> float:
        """The upper end."""
        return self.high

    def draw(self, draw: Draw) -> float:
        """One value."""
        if self.is_whole:
            return float(int(self.low) + int(draw.uniform() * (int(self.high) - int(self.low) + 1)))
        return self.low + draw.uniform() * (self.high - self.low)


class LogNormal(msgspec.Struct, frozen=True):
    """Its logarithm is normal."""

    median: float
    sigma: float

    @property
    def max_value(self) -> float:
        """Of all quantities here."""
        return _MAX_VALUE

    def draw(self, draw: Draw) -> float:
        """One value."""
        return min(self.median * math.exp(self.sigma * draw.normal()), _MAX_VALUE)


class Exponential(msgspec.Struct, frozen=True):
    """Memoryless."""

    mean: float

    @property
    def max_value(self) -> float:
        """Of all quantities here."""
        return _MAX_VALUE

    def draw(self, draw: Draw) -> float:
        """One value."""
        return min(self.mean * draw.exponential(), _MAX_VALUE)


class Empirical(msgspec.Struct, frozen=True):
    """Values that were observed, each as likely."""

    values: tuple[int, ...]

    @property
    def max_value(self) -> float:
        """The largest observed."""
        return float(max(self.values))

    def draw(self, draw: Draw) -> float:
        """One of them."""
        return float(self.values[int(draw.uniform() * len(self.values))])


def parse_distribution(text: str, name: str, *, is_whole: bool, low: float = 0.0) -> Distribution:
    """Of `FORMS`.

    Args:
        name: of the quantity, for messages; `output` takes a trace's output lengths, others its prompt lengths.
        is_whole: a number of tokens or turns, not a time.
        low: no parameter may be below.

    Raises:
        InvalidWorkloadError: not a distribution.
        InvalidTraceError: the file of an empirical one cannot be read.
    """
    kind, _, rest = text.partition(":")
    if not rest and kind[:1] in "0123456789.+-":
        kind, rest = "fixed", text
    parts = rest.split(":") if rest else []
    counts = {"fixed": 1, "uniform": 2, "lognormal": 2, "exponential": 1, "empirical": 1}
    if kind not in counts:
        unknown(f"distribution of {name}", kind, counts)
    if kind == "empirical":
        if name not in ("prompt", "followup", "output"):
            raise InvalidWorkloadError(f"{name}={text}: a trace gives prompt and output lengths; give another form")
        if not rest:
            raise InvalidWorkloadError(f"{name}={text}: name the trace, as in {name}=empirical:FILE")
        requests = read_trace(rest).arrivals()
        if name != "output":
            return Empirical(tuple([request.num_prompt_tokens for request in requests]))
        return Empirical(tuple([request.num_output_tokens for request in requests]))
    if len(parts) != counts[kind]:
        raise InvalidWorkloadError(
            f"{name}={text}: {kind} has {counts[kind]} number(s), not {len(parts)}. Forms: {FORMS}"
        )
    first = number(parts[0], name, low=low, high=_MAX_VALUE, above=kind in ("lognormal", "exponential"))
    if kind == "fixed":
        if is_whole and first != int(first):
            raise InvalidWorkloadError(f"{name}={text} must be a whole number")
        return Fixed(first)
    if kind == "uniform":
        last = number(parts[1], name, low=first, high=_MAX_VALUE)
        if is_whole and (first != int(first) or last != int(last)):
            raise InvalidWorkloadError(f"{name}={text} must go from one whole number to another")
        return Uniform(first, last, is_whole)
    if kind == "lognormal":
        return LogNormal(first, number(parts[1], name, high=5))
    return Exponential(first)
