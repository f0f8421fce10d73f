"""The parts of `octavo bench gpu` that can be asked for."""

from __future__ import annotations

import argparse

SECTIONS = ("ceilings", "kernels", "steps", "workload", "peers")


def sections(text: str) -> tuple[str, ...]:
    """`kernels,steps`."""
    chosen = tuple(word.strip() for word in text.split(",") if word.strip())
    wrong = [word for word in chosen if word not in SECTIONS]
    if wrong or not chosen:
        raise argparse.ArgumentTypeError(f"{text!r}: there are {', '.join(SECTIONS)}")
    return chosen
