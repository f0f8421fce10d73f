"""When synthetic requests arrive."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from .draws import Stream

ArrivalKind = Literal["poisson", "gamma", "bursts", "diurnal", "constant", "closed"]


class ArrivalProcess(msgspec.Struct, frozen=True, kw_only=True):
    """An open-loop arrival process of `rate` arrivals a second in the long run.

    Attributes:
        kind: poisson: memoryless gaps; gamma: gaps with coefficient of variation `cv`; bursts: Poisson while on,
            nothing while off, both times exponential; diurnal: Poisson whose rate swings as a sine; constant: equal
            gaps.
        rate: a second, > 0.
        cv: of gamma, > 0; 1 is Poisson, more is burstier.
        on_s, off_s: mean lengths of bursts and of the pauses between.
        period_s, amplitude: of diurnal; the rate goes from `rate (1 - amplitude)` to `rate (1 + amplitude)`.
    """

    kind: ArrivalKind
    rate: float
    cv: float = 1.0
    on_s: float = 10.0
    off_s: float = 10.0
    period_s: float = 86_400.0
    amplitude: float = 0.5

    def times(self, seed: int) -> Iterator[int]:
        """Ever later times in ns, without end; each gap is rounded by itself, so sums are exact."""
        stream = Stream(seed, "arrival")
        match self.kind:
            case "constant":
                return self._constant()
            case "gamma":
                shape = self.cv**-2
                mean_ns = 1e9 / self.rate
                return self._sums(round(stream.at(place).gamma(shape) / shape * mean_ns) for place in _from_zero())
            case "bursts":
                return self._bursts(stream, Stream(seed, "burst"))
            case "diurnal":
                return self._diurnal(stream)
            case _:
                mean_ns = 1e9 / self.rate
                return self._sums(round(stream.at(place).exponential() * mean_ns) for place in _from_zero())

    def _constant(self) -> Iterator[int]:
        return (round(place * 1e9 / self.rate) for place in _from_zero())

    @staticmethod
    def _sums(gaps_ns: Iterator[int]) -> Iterator[int]:
        time_ns = 0
        for gap_ns in gaps_ns:
            time_ns += gap_ns
            yield time_ns

    def _bursts(self, gaps: Stream, lengths: Stream) -> Iterator[int]:
        mean_ns = 1e9 / self.rate * self.on_s / (self.on_s + self.off_s)
        begin_ns, place = 0, 0
        for burst in _from_zero():
            draw = lengths.at(burst)
            end_ns = begin_ns + round(draw.exponential() * self.on_s * 1e9)
            time_ns = begin_ns
            while True:
                time_ns += round(gaps.at(place).exponential() * mean_ns)
                place += 1
                if time_ns >= end_ns:
                    break
                yield time_ns
            begin_ns = end_ns + round(draw.exponential() * self.off_s * 1e9)

    def _diurnal(self, stream: Stream) -> Iterator[int]:
        # Thinning of the highest rate: Lewis and Shedler 1979.
        mean_ns = 1e9 / (self.rate * (1 + self.amplitude))
        time_ns = 0
        for place in _from_zero():
            draw = stream.at(place)
            time_ns += round(draw.exponential() * mean_ns)
            swing = math.sin(2 * math.pi * (time_ns / 1e9) / self.period_s)
            if draw.uniform() * (1 + self.amplitude) < 1 + self.amplitude * swing:
                yield time_ns


def _from_zero() -> Iterator[int]:
    place = 0
    while True:
        yield place
        place += 1
