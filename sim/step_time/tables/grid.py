"""Piecewise-linear functions of measured points: clamped below what was measured, extrapolated linearly above.

Never in log space, which bends what is linear between the points (LLMServingSim measured 9 to 14 % from it).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import numpy.typing as npt


class Curve:
    """A piecewise-linear function of one number.

    Args:
        points: `(x, y)`, at least one; of equal x the mean y counts.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        if not points:
            raise ValueError("a curve needs at least one point")
        by_x: dict[float, list[float]] = {}
        for x, y in points:
            by_x.setdefault(float(x), []).append(float(y))
        self.xs: list[float] = sorted(by_x)
        self.ys: list[float] = [sum(by_x[x]) / len(by_x[x]) for x in self.xs]
        last = len(self.xs) - 1
        self._slopes = [(self.ys[i + 1] - self.ys[i]) / (self.xs[i + 1] - self.xs[i]) for i in range(last)]
        base = _base_of(self.xs)
        far = (self.ys[last] - self.ys[base]) / (self.xs[last] - self.xs[base]) if base < last else 0.0
        self._slopes.append(max(0.0, far))
        self._xs_array = np.array(self.xs)
        self._ys_array = np.array(self.ys)
        self._slopes_array = np.array(self._slopes)

    @property
    def low(self) -> float:
        """Least x measured."""
        return self.xs[0]

    @property
    def high(self) -> float:
        """Greatest x measured."""
        return self.xs[-1]

    def at(self, x: float) -> float:
        """The value at `x`."""
        i = bisect_right(self.xs, x) - 1
        if i < 0:
            return self.ys[0]
        return self.ys[i] + (x - self.xs[i]) * self._slopes[i]

    def at_many(self, xs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """`at` of each, bit for bit."""
        i = np.maximum(np.searchsorted(self._xs_array, xs, side="right") - 1, 0)
        value = self._ys_array[i] + (xs - self._xs_array[i]) * self._slopes_array[i]
        result: npt.NDArray[np.float64] = np.where(xs < self._xs_array[0], self._ys_array[0], value)
        return result


def _base_of(xs: Sequence[float]) -> int:
    """Where the line begins that goes on past the last point: at half of it, so that one noisy gap decides nothing."""
    return max(bisect_right(xs, xs[-1] / 2) - 1, 0)


class Grid:
    """A multilinear function of several numbers, from points that need not fill the grid they span.

    Points that are missing are filled in beforehand: along the axis on which the gap between measured neighbours is
    narrowest in proportion, linearly. Where no axis has neighbours on both sides (a corner that did not fit the GPU),
    by the line through the last two points of an axis, or the nearest point below the first; those count as outside.

    Args:
        points: coordinates -> value; all of one length, at least one point.
    """

    def __init__(self, points: Mapping[tuple[int, ...], float]) -> None:
        if not points:
            raise ValueError("a grid needs at least one point")
        num_axes = len(next(iter(points)))
        self.axes: list[list[int]] = [sorted({point[axis] for point in points}) for axis in range(num_axes)]
        shape = tuple(len(axis) for axis in self.axes)
        places = [{x: i for i, x in enumerate(axis)} for axis in self.axes]
        values = np.full(shape, np.nan)
        for point, value in points.items():
            values[tuple(places[axis][x] for axis, x in enumerate(point))] = value
        self.num_measured = len(points)
        filled, extended = _fill(values, self.axes)
        self._values: list[float] = filled.ravel().tolist()
        self._extended: list[bool] = extended.ravel().tolist()
        self._strides = [int(np.prod(shape[axis + 1 :])) for axis in range(num_axes)]

    def outside(self, point: Sequence[float]) -> bool:
        """Whether a point lies beyond what was measured."""
        corner = 0
        for x, axis, stride in zip(point, self.axes, self._strides, strict=True):
            if x > axis[-1]:
                return True
            corner += bisect_left(axis, x) * stride
        return self._extended[corner]

    def at(self, point: Sequence[float]) -> float:
        """The value at a point."""
        corners = [(0, 1.0)]
        is_beyond = False
        for x, axis, stride in zip(point, self.axes, self._strides, strict=True):
            last = len(axis) - 1
            if x <= axis[0] or last == 0:
                continue
            if x <= axis[last]:
                high = bisect_left(axis, x)
                low = high - 1
            else:
                low, high = _base_of(axis), last
                is_beyond = True
            part = (x - axis[low]) / (axis[high] - axis[low])
            if part == 1.0:
                corners = [(at + high * stride, weight) for at, weight in corners]
            else:
                corners = [(at + low * stride, weight * (1.0 - part)) for at, weight in corners] + [
                    (at + high * stride, weight * part) for at, weight in corners
                ]
        values = self._values
        value = sum([values[at] * weight for at, weight in corners])
        if is_beyond:
            # What falls towards the end of the table (noise) does not go on falling.
            inside = [min(x, axis[-1]) for x, axis in zip(point, self.axes, strict=True)]
            value = max(value, self.at(inside))
        return value

    def curve(self, point: Sequence[float], axis: int) -> Curve:
        """The function along one axis, the other coordinates held (`point[axis]` is ignored)."""
        at = list(point)
        points = []
        for x in self.axes[axis]:
            at[axis] = x
            points.append((float(x), self.at(at)))
        return Curve(points)


def _fill(
    values: npt.NDArray[np.float64], axes: Sequence[Sequence[int]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Fill in what is missing (NaN); returns also which points lie beyond all measured ones."""
    filled = values.copy()
    extended = np.zeros(values.shape, dtype=bool)
    arrays = [np.array(axis, dtype=float) for axis in axes]
    while np.isnan(filled).any():
        known = ~np.isnan(filled)
        estimate = np.full(values.shape, np.nan)
        gap = np.full(values.shape, np.inf)
        for axis, xs in enumerate(arrays):
            axis_estimate, axis_gap = _interpolate(filled, known, axis, xs)
            better = axis_gap < gap
            estimate, gap = np.where(better, axis_estimate, estimate), np.where(better, axis_gap, gap)
        new = ~known & np.isfinite(gap)
        if new.any():
            filled[new] = estimate[new]
        else:
            _extend(filled, known, arrays)
            extended |= ~known & ~np.isnan(filled)
    return filled, extended


def _interpolate(
    filled: npt.NDArray[np.float64], known: npt.NDArray[np.bool_], axis: int, xs: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Values between known neighbours on `axis`, and how wide the gap is; infinite where there are not two."""
    estimate, gap = np.full(filled.shape, np.nan), np.full(filled.shape, np.inf)
    for at in _lines(filled.shape, axis):
        there = np.flatnonzero(known[at])
        missing = np.flatnonzero(~known[at])
        if not len(there) or not len(missing):
            continue
        missing = missing[(missing > there[0]) & (missing < there[-1])]
        right = np.searchsorted(there, missing)
        low, high = there[right - 1], there[right]
        estimate[at][missing] = np.interp(xs[missing], xs[there], filled[at][there])
        gap[at][missing] = (xs[high] - xs[low]) / (xs[high] + 1.0)
    return estimate, gap


def _lines(shape: tuple[int, ...], axis: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of every line along `axis`."""
    for index in product(*(range(size) if i != axis else (0,) for i, size in enumerate(shape))):
        yield (*index[:axis], slice(None), *index[axis + 1 :])


def _extend(
    filled: npt.NDArray[np.float64], known: npt.NDArray[np.bool_], axes: Sequence[npt.NDArray[np.float64]]
) -> None:
    """Go on past the known points, along the last axis that lets us."""
    for axis in range(filled.ndim - 1, -1, -1):
        xs = axes[axis]
        progress = False
        for at in _lines(filled.shape, axis):
            there = np.flatnonzero(known[at])
            if len(there) in (0, len(xs)):
                continue
            line = filled[at]
            first, last = there[0], there[-1]
            line[:first] = line[first]
            slope = 0.0
            if len(there) > 1:
                slope = max(0.0, (line[last] - line[there[-2]]) / (xs[last] - xs[there[-2]]))
            line[last + 1 :] = line[last] + slope * (xs[last + 1 :] - xs[last])
            progress = True
        if progress:
            return
    raise AssertionError("a grid with a known point has a line with one")
