"""Durations as people write them on a command line."""

from __future__ import annotations

import argparse
import re

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(ms|s|m|h)?$")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """Seconds of `90`, `90s`, `10m`, `1.5h` or `500ms`; more than nothing."""
    match = _DURATION.match(text.strip())
    value = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration: 90, 90s, 10m, 1.5h")
    return value


def pause(text: str) -> float:
    """A `duration` that may be nothing."""
    return 0.0 if text.strip() in ("0", "0s", "0ms") else duration(text)
