"""Starts the parts of the benchmark, one after the other, and takes what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What a part said, and why it said no more; empty if it ended well."""

    name: str
    found: list[dict[str, Any]]
    failure: str = ""


Start = Callable[[list[str], float], tuple[str, str, int]]
"""Command and seconds to standard output, standard error and exit status; negative: it ran out of time."""


def run_part(name: str, options: dict[str, Any], *, timeout_s: float, start: Start | None = None) -> PartResult:
    """Run a part in a fresh process; never raises for what the part does."""
    command = [sys.executable, "-m", f"{__package__}.part", name, json.dumps(options)]
    output, errors, status = (start or run_process)(command, timeout_s)
    found = []
    for line in output.splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off in the middle
        if isinstance(row, dict) and "kernel" in row:
            found.append(row)
    if status == 0:
        return PartResult(name=name, found=found)
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no word")
    why = f"no answer in {timeout_s:g} s" if status < 0 else last[:300]
    return PartResult(name=name, found=found, failure=why)


def run_process(command: list[str], timeout_s: float) -> tuple[str, str, int]:
    """See `Start`."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(  # noqa: S603 - a list of our own making, no shell
            command, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        return _text(error.stdout), _text(error.stderr), -1
    return done.stdout, done.stderr, abs(done.returncode)


def _text(held: bytes | str | None) -> str:
    return held.decode(errors="replace") if isinstance(held, bytes) else held or ""
