"""Starts the parts of the benchmark, one after the other, and takes what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What a part said, and why it said no more; empty if it ended well."""

    name: str
    found: list[dict[str, Any]]
    failure: str = ""


OnLine = Callable[[str], None]
Start = Callable[[list[str], float, OnLine], tuple[str, int]]
"""Command, seconds, and who gets each line of standard output at once, to standard error and exit status; negative: it
ran out of time."""
OnRow = Callable[[dict[str, Any]], None]


def run_part(
    name: str,
    options: dict[str, Any],
    *,
    timeout_s: float,
    on_row: OnRow = lambda _row: None,
    start: Start | None = None,
) -> PartResult:
    """Run a part in a fresh process; never raises for what the part does.

    Args:
        on_row: gets each figure as soon as the part says it.
    """
    command = [sys.executable, "-m", f"{__package__}.part", name, json.dumps(options)]
    found: list[dict[str, Any]] = []

    def take(line: str) -> None:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return  # cut off in the middle
        if isinstance(row, dict) and "kernel" in row:
            found.append(row)
            on_row(row)

    errors, status = (start or run_process)(command, timeout_s, take)
    if status == 0:
        return PartResult(name=name, found=found)
    last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no word")
    why = f"no answer in {timeout_s:g} s" if status < 0 else last[:300]
    return PartResult(name=name, found=found, failure=why)


def run_process(command: list[str], timeout_s: float, on_line: OnLine) -> tuple[str, int]:
    """See `Start`. The process and all that it has begun are over when this returns."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - a list of our own making, no shell
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        ran_out = threading.Event()

        def end() -> None:
            ran_out.set()
            _end(process)

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    on_line(line.rstrip("\n"))
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped: its number is its own until then
        finally:
            timer.cancel()
            timer.join()
            _end(process)
            status = process.wait()
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return said, -1 if ran_out.is_set() else abs(status)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill it and what it has begun, which may hold its output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
