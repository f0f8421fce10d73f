"""Starts the parts of the benchmark, one after the other, and takes what they say."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

_PATIENCE_S = 10.0
"""How long a process is waited for that was killed: one that waits for a device that hangs may never end."""
_MOST_RESTARTS = 3
_LEAST_S = 10.0
"""That a part is begun with: it takes as much before its first figure."""
_IMPORTS_S = 60.0
"""Without a word at the start, where libraries may have to come from a disk that was never read."""
_POLL_S = 0.02
_LOG_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What a part said, and why it said no more.

    Attributes:
        failure: empty if it ended well.
        case, num_cases: the last case that it began, and how many there are; -1 and 0 where it has none.
        what: that case, as its rows would name it.
        ran_out: no time was left for it.
        log: the end of what it wrote to standard error.
    """

    name: str
    found: list[dict[str, Any]]
    failure: str = ""
    case: int = -1
    num_cases: int = 0
    what: dict[str, Any] = field(default_factory=dict)
    ran_out: bool = False
    log: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended.

    Attributes:
        errors: its standard error.
        status: its exit status; 128 and more: by a signal, of the number above that.
        stopped: why it was stopped, if it was.
        ran_out: that was for want of time.
    """

    errors: str
    status: int
    stopped: str = ""
    ran_out: bool = False


OnLine = Callable[[str], None]
Start = Callable[[list[str], float, float, OnLine], Ended]
"""Command, seconds, seconds from one line to the next, and who gets each line of standard output at once."""
OnRow = Callable[[dict[str, Any]], None]


def run_part(
    name: str,
    options: dict[str, Any],
    *,
    timeout_s: float,
    stall_s: float = math.inf,
    on_row: OnRow = lambda _row: None,
    start: Start | None = None,
) -> PartResult:
    """Run a part in a fresh process; never raises for what the part does.

    Args:
        stall_s: longest time without a word, which is what a kernel that hangs looks like.
        on_row: gets each figure as soon as the part says it.
    """
    command = [sys.executable, "-m", f"{__package__}.part", name, json.dumps(options)]
    found: list[dict[str, Any]] = []
    mark: dict[str, Any] = {}

    def take(line: str) -> None:
        nonlocal mark
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            return  # cut off in the middle
        if isinstance(row, dict) and "kernel" in row:
            found.append(row)
            on_row(row)
        elif isinstance(row, dict) and "case" in row:
            mark = row

    ended = (start or run_process)(command, timeout_s, stall_s, take)
    return PartResult(
        name=name,
        found=found,
        failure=_why(ended),
        case=mark.get("case", -1),
        num_cases=mark.get("of", 0),
        what=mark.get("what", {}),
        ran_out=ended.ran_out,
        log=ended.errors[-_LOG_CHARACTERS:],
    )


def _why(ended: Ended) -> str:
    if ended.stopped or not ended.status:
        return ended.stopped
    last = next((line.strip() for line in reversed(ended.errors.splitlines()) if line.strip()), "no word")[:300]
    if ended.status <= 128:
        return last
    try:
        return f"{signal.Signals(ended.status - 128).name}: {last}"
    except ValueError:
        return last


def run_cases(
    name: str,
    options: dict[str, Any],
    *,
    timeout_s: float,
    stall_s: float = math.inf,
    on_row: OnRow = lambda _row: None,
    run: Callable[..., PartResult] = run_part,
) -> PartResult:
    """Run a part to the end of its cases: where one of them ends its process, or hangs, another goes on behind it.

    A case that gave no row before that gets one, whose note says what happened.
    """
    deadline = time.monotonic() + timeout_s
    found: list[dict[str, Any]] = []
    for attempt in range(_MOST_RESTARTS + 1):
        num_before = len(found)
        result = run(name, options, timeout_s=deadline - time.monotonic(), stall_s=stall_s, on_row=on_row)
        found += result.found
        if not result.failure or result.case < 0 or result.ran_out:
            break
        said = any("failed" in str(row.get("note", "")) for row in found[num_before:][-1:])
        if not said:
            row = {**result.what, "note": f"failed: {result.failure}"}
            found.append(row)
            on_row(row)
        if result.case + 1 >= result.num_cases:
            return replace_found(result, found, failure="")
        if attempt == _MOST_RESTARTS or deadline - time.monotonic() < _LEAST_S:
            break
        options = {**options, "first_case": result.case + 1}
    return replace_found(result, found, failure=result.failure)


def replace_found(result: PartResult, found: list[dict[str, Any]], *, failure: str) -> PartResult:
    """The result of several processes: what all of them found, and how the last one ended."""
    return PartResult(name=result.name, found=found, failure=failure, ran_out=result.ran_out, log=result.log)


def run_process(command: list[str], timeout_s: float, stall_s: float, on_line: OnLine) -> Ended:
    """See `Start`. The process and all that it has begun are over when this returns, or have been told to be."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603 - a list of our own making, no shell
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        deadline = time.monotonic() + timeout_s
        stopped, ran_out = "", False
        longest_s = max(stall_s, _IMPORTS_S)
        try:
            while True:
                left_s = deadline - time.monotonic()
                try:
                    line = lines.get(timeout=max(0.0, min(left_s, longest_s, threading.TIMEOUT_MAX)))
                except queue.Empty:
                    ran_out = left_s <= longest_s
                    stopped = f"no answer in {timeout_s:.0f} s" if ran_out else f"nothing new in {longest_s:g} s"
                    break
                if line is None:
                    break
                longest_s = stall_s
                on_line(line.rstrip("\n"))
            while not stopped and not _has_ended(process.pid):
                if time.monotonic() > deadline:
                    stopped, ran_out = f"no answer in {timeout_s:.0f} s", True
                time.sleep(_POLL_S)
        finally:
            _end(process)
            try:
                status = process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                status, stopped = 1, f"{stopped or 'it was killed'}, and it would not end"
            reader.join(_PATIENCE_S)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return Ended(said, status if status >= 0 else 128 - status, stopped, ran_out)


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _has_ended(pid: int) -> bool:
    """Not reaped by this: its number is its own until then."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _end(process: subprocess.Popen[str]) -> None:
    """Kill it and what it has begun, which may hold its output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
