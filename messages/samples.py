"""Metrics as plain values."""

from __future__ import annotations

from typing import NamedTuple

Labels = tuple[tuple[str, str], ...]
"""Names and values of a sample's labels, in order of the names."""

SampleKey = tuple[str, Labels]
"""Which sample of a family: its name and labels."""


class SampleFamily(NamedTuple):
    """Samples of one metric.

    Attributes:
        name: of the metric.
        samples: `(name, labels, value)` of each.
        only_grows: its values are counts since a process began; else they are of this moment.
    """

    name: str
    samples: tuple[tuple[str, Labels, float], ...]
    only_grows: bool = True
