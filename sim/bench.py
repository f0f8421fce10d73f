"""How fast the simulator is: `python -m octavo.sim.bench --azure FILE --mooncake FILE`.

Each case is a fresh process, so start-up counts; its CPU time is what the system charges it. A fixed loop of plain
Python is timed between the cases, since machines differ and are shared: the ratio to it travels, the seconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

_LOOP = 3_000_000


class Case(msgspec.Struct, frozen=True):
    """One run of `octavo sim run`.

    Attributes:
        must_s: CPU seconds it may take; 0: no bound (steps a second are what is asked).
    """

    name: str
    arguments: tuple[str, ...]
    must_s: float


class Figure(msgspec.Struct, frozen=True):
    """What a case took.

    Attributes:
        loops: CPU time in units of the calibration loop.
    """

    name: str
    cpu_s: float
    loops: float
    must_s: float
    peak_mb: int
    num_requests: int
    num_steps: int
    num_steps_skipped: int
    event_log_sha256: str


def calibration_loop() -> float:
    """CPU seconds of a fixed loop: integer sums, a dict, a list."""
    begin = time.process_time()
    counts: dict[int, int] = {}
    total = 0
    for i in range(_LOOP):
        key = i & 1023
        counts[key] = counts.get(key, 0) + i
        total += counts[key] & 7
    return time.process_time() - begin


def cases(azure: Path, mooncake: Path | None) -> list[Case]:
    """The cases of the speed table."""
    conversation = ("--trace", str(azure))
    found = [
        Case("azure hour, 1 replica", (*conversation, "--replicas", "1"), 15),
        Case("azure hour, 4 replicas", (*conversation, "--replicas", "4"), 20),
        Case("azure hour, 64 replicas", (*conversation, "--replicas", "64"), 30),
    ]
    if mooncake is not None:
        arguments = ("--trace", str(mooncake), "--replicas", "8", "--routing", "prefix_aware")
        found.append(Case("mooncake hour, 8 replicas, prefix aware", arguments, 60))
    closed = "synthetic:closed,concurrency=64,n=2000,prompt=uniform:64:512,output=uniform:64:512,seed=1"
    found.append(Case("64 running, every step taken", ("--trace", closed, "--no-fast-forward"), 0))
    scaled = (*conversation, "--rate-scale", "5.17", "--limit", "100000", "--replicas", "1000")
    found.append(Case("100,000 requests, 1,000 replicas", scaled, 300))
    return found


def run_case(case: Case, loop_s: float) -> Figure:
    """Run `octavo sim run` in a process of its own."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 (our own command)
            [sys.executable, "-m", "octavo", "sim", "run", *case.arguments, "--json"],
            stdout=output,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise SystemExit(f"octavo sim run {' '.join(case.arguments)} ended with status {process.returncode}")
    result = json.loads(text)
    cpu_s = usage.ru_utime + usage.ru_stime
    return Figure(
        name=case.name,
        cpu_s=cpu_s,
        loops=cpu_s / loop_s,
        must_s=case.must_s,
        peak_mb=usage.ru_maxrss // 1024,
        num_requests=result["num_requests"],
        num_steps=result["num_steps"],
        num_steps_skipped=result["num_steps_skipped"],
        event_log_sha256=result["event_log_sha256"],
    )


def main(argv: list[str] | None = None) -> int:
    """Print the speed table."""
    parser = argparse.ArgumentParser(prog="python -m octavo.sim.bench", description=__doc__)
    parser.add_argument("--azure", type=Path, required=True, help="AzureLLMInferenceTrace_conv.csv")
    parser.add_argument("--mooncake", type=Path, help="mooncake conversation_trace.jsonl")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args(argv)
    calibration_loop()
    if not args.json:
        print(
            f"{'case':42} {'CPU s':>7} {'must':>5} {'loops':>6} {'MB':>5} {'requests':>9} {'steps':>10} {'skipped':>8}"
        )
    for case in cases(args.azure, args.mooncake):
        if args.only and args.only not in case.name:
            continue
        figures = [run_case(case, statistics.median(calibration_loop() for _ in range(3))) for _ in range(args.repeats)]
        figure = sorted(figures, key=lambda each: each.loops)[len(figures) // 2]
        if args.json:
            print(msgspec.json.encode(figure).decode(), flush=True)
        else:
            skipped = figure.num_steps_skipped / max(1, figure.num_steps)
            print(
                f"{figure.name:42} {figure.cpu_s:7.2f} {figure.must_s:5.0f} {figure.loops:6.1f} {figure.peak_mb:5d}"
                f" {figure.num_requests:9,d} {figure.num_steps:10,d} {skipped:8.1%}"
                f" {figure.num_steps / figure.cpu_s:12,.0f}",
                flush=True,
            )
    loop_s = statistics.median(calibration_loop() for _ in range(3))
    print(
        f"calibration loop: {loop_s:.3f} CPU s; this process: {resource.getrusage(resource.RUSAGE_SELF).ru_utime:.1f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
