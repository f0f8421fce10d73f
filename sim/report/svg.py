"""Charts as inline SVG: lines, steps, areas and points over a linear or a logarithmic axis.

Colours are classes of the page's style sheet (`html.py`), so that one picture serves light and dark.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

import msgspec

from .figures import quantity

_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 14, 44  # pixels around the plot: labels of the axes live there
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_IDLE_ZEROS = re.compile(r"(\.\d*?)0+(?!\d)")


class Axis(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of a chart.

    Attributes:
        label: what it is, with its unit where `text` gives none.
        text: how its numbers are written.
        is_log: logarithmic; values that are not above 0 are left out.
        lowest, highest: bounds; None takes the data's.
    """

    label: str
    text: Callable[[float], str] = quantity
    is_log: bool = False
    lowest: float | None = None
    highest: float | None = None


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Points that belong together.

    Attributes:
        colour: which of the page's colours, from 0.
        notes: texts shown on hovering over a point, as many as points; or none.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: Literal["line", "step", "area", "points", "ring"] = "line"
    colour: int = 0
    is_dashed: bool = False
    notes: Sequence[str] = ()


class Reference(msgspec.Struct, frozen=True):
    """A line across the chart at a value of one axis, such as a limit."""

    axis: Literal["x", "y"]
    value: float
    text: str


def chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    description: str,
    references: Sequence[Reference] = (),
    width: int = 560,
    height: int = 260,
    has_legend: bool | None = None,
) -> str:
    """An `<svg>` element, or a line that says there is nothing to draw.

    Args:
        description: for those who cannot see it.
        has_legend: None: if there is more than one series.
    """
    drawn = [(one, _drawable(one, x, y)) for one in series]
    drawn = [(one, points) for one, points in drawn if points]
    if not drawn:
        return '<p class="empty">Nothing to draw: no request got this far.</p>'
    x_values = [point[0] for _, points in drawn for point in points]
    y_values = [point[1] for _, points in drawn for point in points]
    x_values += [line.value for line in references if line.axis == "x" and _is_drawable(line.value, x)]
    y_values += [line.value for line in references if line.axis == "y" and _is_drawable(line.value, y)]
    across = _Scale(x, x_values, _LEFT, width - _RIGHT, num_ticks=max(3, width // 95))
    upward = _Scale(y, y_values, height - _BOTTOM, _TOP, num_ticks=max(3, height // 55))
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">',
        *_grid((across, x), (upward, y), width, height),
    ]
    order = sorted(drawn, key=lambda pair: pair[0].kind != "area")  # areas lie behind lines
    for one, points in order:
        parts += _draw(one, points, across, upward, y_base=height - _BOTTOM)
    inside = [line for line in references if _is_drawable(line.value, x if line.axis == "x" else y)]
    ends = [(upward(points[0][1]), upward(points[-1][1])) for one, points in drawn if one.kind != "points"]
    parts += _reference_lines(inside, across, upward, ends, (width, height))
    parts.append("</svg>")
    if len(drawn) > 1 if has_legend is None else has_legend:
        parts.insert(0, _legend([one for one, _ in drawn]))
    return "".join(parts)


def thinned(values: Sequence[float], most: int = 240) -> list[tuple[float, float]]:
    """The cumulative distribution of sorted values, as at most `most` points `(value, share not above it)`."""
    count = len(values)
    if not count:
        return []
    ranks = range(count) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]
    return [(values[rank], (rank + 1) / count) for rank in ranks]


def peaks(points: Sequence[tuple[float, float]], most: int = 480) -> list[tuple[float, float]]:
    """A long line with the highest point of each of `most` equal stretches: bursts stay visible."""
    if len(points) <= most:
        return list(points)
    begin, end = points[0][0], points[-1][0]
    width = (end - begin) / most or 1.0
    highest: dict[int, tuple[float, float]] = {}
    for point in points:
        stretch = min(most - 1, int((point[0] - begin) / width))
        if stretch not in highest or point[1] > highest[stretch][1]:
            highest[stretch] = point
    return sorted(highest.values())


def ticks(lowest: float, highest: float, count: int) -> list[float]:
    """About `count` round numbers between two values."""
    span = highest - lowest
    if not span > 0:
        return [lowest]
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in _NICE if power * factor >= raw * 0.999)
    first = math.ceil(lowest / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(highest / step + 1e-9) + 1)]


def log_ticks(lowest: float, highest: float, count: int) -> list[float]:
    """Round numbers on a logarithmic axis: powers of ten, with 2 and 5 between them if they fit."""
    decades = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    found: list[float] = []
    for factors in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        found = [10.0**d * f for d in decades for f in factors if lowest <= 10.0**d * f <= highest * 1.0001]
        if len(found) <= count + 2:
            break
    if len(found) < 2:
        return [value for value in ticks(lowest, highest, count) if value > 0]
    return found[:: max(1, math.ceil(len(found) / (count + 2)))]


class _Scale:
    """From a value to a pixel."""

    def __init__(self, axis: Axis, values: Sequence[float], begin: float, end: float, *, num_ticks: int) -> None:
        lowest = axis.lowest if axis.lowest is not None else min(values)
        highest = axis.highest if axis.highest is not None else max(values)
        if axis.is_log:
            if axis.lowest is None:
                lowest /= 1.08
            if axis.highest is None:
                highest *= 1.08
        elif axis.highest is None:
            highest += 0.04 * (highest - lowest)
        if highest <= lowest:
            highest = lowest + (abs(lowest) or 1.0)
        self._is_log = axis.is_log
        self._low, self._high = (math.log(lowest), math.log(highest)) if axis.is_log else (lowest, highest)
        self._begin, self._end = begin, end
        self.ticks = (log_ticks if axis.is_log else ticks)(lowest, highest, num_ticks)

    def __call__(self, value: float) -> float:
        at = ((math.log(value) if self._is_log else value) - self._low) / (self._high - self._low)
        return self._begin + min(1.0, max(0.0, at)) * (self._end - self._begin)


def _tick(axis: Axis, value: float) -> str:
    """Round numbers need no trailing zeros."""
    return _IDLE_ZEROS.sub(r"\1", axis.text(value)).replace(". ", " ").removesuffix(".")


def _is_drawable(value: float, axis: Axis) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.is_log)


def _drawable(series: Series, x: Axis, y: Axis) -> list[tuple[float, float, str]]:
    notes = series.notes or [""] * len(series.points)
    return [
        (point[0], point[1], note)
        for point, note in zip(series.points, notes, strict=True)
        if _is_drawable(point[0], x) and _is_drawable(point[1], y)
    ]


def _grid(horizontal: tuple[_Scale, Axis], vertical: tuple[_Scale, Axis], width: int, height: int) -> list[str]:
    (across, x), (upward, y) = horizontal, vertical
    parts = []
    for value in upward.ticks:
        at = upward(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{escape(_tick(y, value))}</text>'
        )
    last_right = -math.inf
    for value in across.ticks:
        at = across(value)
        text = _tick(x, value)
        half = 3.4 * len(text)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        if at - half > last_right + 4:  # labels that would run into each other are left out
            below = height - _BOTTOM + 17
            parts.append(f'<text class="tick" x="{at:.1f}" y="{below}" text-anchor="middle">{escape(text)}</text>')
            last_right = at + half
    parts.append(
        f'<text class="label" x="{(_LEFT + width - _RIGHT) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x.label)}</text>"
    )
    middle = (_TOP + height - _BOTTOM) / 2
    parts.append(
        f'<text class="label" x="13" y="{middle:.0f}" text-anchor="middle" transform="rotate(-90 13 {middle:.0f})">'
        f"{escape(y.label)}</text>"
    )
    return parts


def _draw(
    series: Series, points: list[tuple[float, float, str]], across: _Scale, upward: _Scale, y_base: float
) -> list[str]:
    places = [(across(x), upward(y)) for x, y, _ in points]
    colour = f"c{series.colour}"
    if series.kind in ("points", "ring"):
        radius = 5 if series.kind == "points" else 9
        return [
            f'<circle class="{series.kind} {colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{_title(note)}</circle>'
            for (x, y), (_, _, note) in zip(places, points, strict=True)
        ]
    path = "M" + (_stepped(places) if series.kind == "step" else "L".join(f"{x:.1f} {y:.1f}" for x, y in places))
    parts = []
    if series.kind == "area":
        closed = f"{path}L{places[-1][0]:.1f} {y_base:.1f}L{places[0][0]:.1f} {y_base:.1f}Z"
        parts.append(f'<path class="area {colour}" d="{closed}"/>')
    parts.append(f'<path class="line {colour}{_dashed(series)}" d="{path}"/>')
    if series.notes:
        parts += [
            f'<circle class="points {colour}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">{_title(note)}</circle>'
            for (x, y), (_, _, note) in zip(places, points, strict=True)
        ]
    return parts


def _stepped(places: list[tuple[float, float]]) -> str:
    first, *others = places
    return f"{first[0]:.1f} {first[1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in others)


def _title(note: str) -> str:
    return f"<title>{escape(note)}</title>" if note else ""


def _reference_lines(
    references: Sequence[Reference],
    across: _Scale,
    upward: _Scale,
    ends: Sequence[tuple[float, float]],
    size: tuple[int, int],
) -> list[str]:
    """Lines and their texts; `ends` are the heights, in pixels, of each curve at its left and right end."""
    width, height = size
    parts = []
    rights: list[float] = []  # right end of the text in each row of texts
    for line in sorted(references, key=lambda one: one.value):
        if line.axis == "x":
            at = across(line.value)
            length = 6.2 * len(line.text) + 8
            is_left = at + length > width - _RIGHT  # no room to the right of the line
            begin = at - length if is_left else at
            row = next((i for i, end in enumerate(rights) if end < begin), len(rights))
            rights[row : row + 1] = [begin + length]
            anchor, text_x = ("end", at - 5) if is_left else ("start", at + 5)
            text_y = float(height - _BOTTOM - 8 - 15 * row)  # where cumulative curves leave room
            parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        else:
            at = upward(line.value)
            # written at the end of the line that curves keep away from
            distance_left = min((abs(left - at) for left, _ in ends), default=1.0)
            distance_right = min((abs(right - at) for _, right in ends), default=0.0)
            is_left = distance_left >= distance_right
            anchor, text_x, text_y = ("start", _LEFT + 5, at - 5) if is_left else ("end", width - _RIGHT - 4, at - 5)
            parts.append(f'<line class="limit" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        place = f'x="{text_x:.1f}" y="{text_y:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="limit-text" {place}>{escape(line.text)}</text>')
    return parts


def _dashed(series: Series) -> str:
    return " dashed" if series.is_dashed else ""


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(
        f'<span><i class="key c{one.colour} {one.kind}{_dashed(one)}"></i>{escape(one.name)}</span>' for one in series
    )
    return f'<p class="legend">{entries}</p>'
