"""Chance by name and number: every draw is a function of (seed, name, number), never of what was drawn before."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_UNIT = 2.0**-53
_NORMAL = NormalDist()


def _mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


class Draw:
    """The draws that belong to one number: a splitmix64 sequence of its own.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """

    __slots__ = ("_state",)

    def __init__(self, state: int) -> None:
        self._state = state

    def uniform(self) -> float:
        """In [0, 1)."""
        self._state = (self._state + _GAMMA) & _MASK
        return (_mix(self._state) >> 11) * _UNIT

    def exponential(self) -> float:
        """Mean 1."""
        return -math.log1p(-self.uniform())

    def normal(self) -> float:
        """Mean 0, deviation 1."""
        return _NORMAL.inv_cdf(self.uniform() * (1 - 2 * _UNIT) + _UNIT)  # the ends are infinite

    def gamma(self, shape: float) -> float:
        """Mean `shape`, variance `shape`.

        Source: Marsaglia and Tsang, "A simple method for generating gamma variables", ACM TOMS 26(3), 2000.
        """
        if shape < 1:
            boost = self.uniform() or _UNIT
            return float(self.gamma(shape + 1) * boost ** (1 / shape))
        d = shape - 1 / 3
        c = 1 / math.sqrt(9 * d)
        while True:
            x = self.normal()
            v = (1 + c * x) ** 3
            if v > 0 and math.log(self.uniform() or _UNIT) < 0.5 * x * x + d - d * v + d * math.log(v):
                return d * v


class Stream:
    """All the draws of one name."""

    __slots__ = ("_key",)

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little")

    def at(self, number: int) -> Draw:
        """The draws of `number`."""
        return Draw(_mix((self._key + number * _GAMMA) & _MASK))
