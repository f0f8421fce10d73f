"""Numbers as a person reads them."""

from __future__ import annotations

import math


def seconds(value: float) -> str:
    """A length of time with its unit, three significant digits: `850 µs`, `42.1 ms`, `4.20 min`; `–` for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    size = abs(value)
    if size == 0:
        return "0 s"
    if size < 0.9995e-3:
        return f"{_three(value * 1e6)} µs"
    if size < 0.9995:
        return f"{_three(value * 1e3)} ms"
    if size < 120:
        return f"{_three(value)} s"
    if size < 7200:
        return f"{_three(value / 60)} min"
    return f"{_three(value / 3600)} h"


def share(value: float) -> str:
    """0 to 1 as a percentage: whole numbers lose their decimals, tiny shares are not shown as none."""
    if math.isnan(value):
        return "–"
    if 0 < value < 0.0005:
        return "<0.1 %"
    if 0.9995 <= value < 1:
        return ">99.9 %"
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def quantity(value: float) -> str:
    """A count or rate: three significant digits, thousands set apart."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return _three(value)


def money(value: float) -> str:
    """Dollars; cents while they matter."""
    if math.isnan(value) or math.isinf(value):
        return "–"
    if 0 < abs(value) < 1:
        return f"${_three(value)}"
    return f"${value:,.2f}"


def _three(value: float) -> str:
    size = abs(value)
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:.{decimals}f}"
