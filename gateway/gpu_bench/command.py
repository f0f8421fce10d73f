"""`octavo bench gpu`: ceilings, kernels, steps and the 256-request workload, each beside others and its roofline."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from ...sim.step_time.config_shape import read_shape
from ...sim.step_time.model_shape import ModelShape
from ..latency import write_json
from ..peers.catalog import GPU_PEERS, OURS
from .ceilings import H200_NOTED, Ceilings
from .goals import goals_table, verdicts
from .gpu import GpuFacts, gpu_facts, why_no_gpu
from .part import CASE_PARTS, KERNEL_PARTS, PEER_PARTS
from .parts import run_cases, run_part
from .requests_256 import lengths_of, requests_256
from .roofline import mixed_floor_s, prefill_floor_s, step_floor_s, workload_floor
from .rows import Row, ceilings_of, kernel_row, ratios, table_of
from .sections import SECTIONS
from .workload import EngineRun, load_options, run_engines, workload_rows

_LEAST_S = 10.0


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was found out, for `--json`."""

    command: str
    date: str
    facts: GpuFacts
    ceilings: Ceilings
    rows: list[Row]
    engines: dict[str, list[EngineRun]]
    shares: dict[str, float]
    best_other_over_ours: dict[str, float]


def bench_gpu(arguments: argparse.Namespace) -> int:
    """Measure and print; 2 if there is no GPU, 1 if a part of ours failed."""
    why_not = why_no_gpu()
    if why_not:
        print(f"octavo bench gpu: {why_not}", file=sys.stderr)
        return 2
    started = time.monotonic()
    bench = _Bench(arguments)
    try:
        bench.run()
    finally:  # whatever ends it: what is known is told
        report = bench.report()
        print(table_of(report.rows, f"octavo bench gpu: {report.facts.gpu}, {report.date}, {report.ceilings.source}"))
        print(goals_table(verdicts(report.rows)))
        print(f"{time.monotonic() - started:.0f} s in all")
    write_json(report, arguments.json)
    return 1 if bench.has_failed else 0


class _Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._deadline = time.monotonic() + (arguments.seconds or math.inf)
        self._sections = tuple(arguments.only or SECTIONS)
        self._facts = gpu_facts()
        self._rows: list[Row] = []
        self._ceilings: Ceilings = H200_NOTED
        self._engines: dict[str, list[EngineRun]] = {}
        self.has_failed = False

    def run(self) -> None:
        """Everything that was asked for; after each figure what is known is in the file."""
        # Whatever else is asked for is a share of these.
        self._ceilings = ceilings_of(self._part("ceilings", "ceilings", {}, None), self._facts.gpu)
        with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
            for name in self._arguments.model_shape:
                self._model(name, Path(folder) / name)
        if "kernels" in self._sections:
            self._kernels()
        self._write()

    def report(self) -> GpuReport:
        """What is known by now."""
        return GpuReport(
            command=f"octavo {' '.join(sys.argv[1:])}",
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            facts=self._facts,
            ceilings=self._ceilings,
            rows=self._rows,
            engines=self._engines,
            shares={_key(row): row.share for row in self._rows if row.share is not None},
            best_other_over_ours={" | ".join(key): ratio for key, ratio in ratios(self._rows).items()},
        )

    def _kernels(self) -> None:
        self._part("octavo", "kernels", {}, self._ceilings)
        for part in PEER_PARTS[1:] if "peers" in self._sections else ():
            self._part(part, "kernels", {}, self._ceilings)
        for part in KERNEL_PARTS:
            # Its own others are measured above, each in a process of its own.
            self._part(part, "kernels", {"peers": []} if part == "attention" else {}, self._ceilings)

    def _model(self, name: str, folder: Path) -> None:
        # Not at the top: it imports what an executor needs.
        from ...actors.executor.locate import random_model_shapes, write_random_model

        if name in random_model_shapes():
            write_random_model(name, folder)
            load_format = "dummy"
        else:
            folder, load_format = Path(name), "auto"
        shape = read_shape(folder).with_dtype("bfloat16")
        if "steps" in self._sections:
            self._part("steps", "", {"model": str(folder)}, None, lambda found: self._step(found, shape, name))
        if "workload" in self._sections:
            self._workload(name, folder, load_format, shape)

    def _step(self, found: dict[str, Any], shape: ModelShape, name: str) -> Row:
        return step_row(found, shape, self._ceilings, name)

    def _workload(self, name: str, folder: Path, load_format: str, shape: ModelShape) -> None:
        arguments = self._arguments
        runs, rows = workload_of(
            name,
            folder,
            load_format,
            self._ceilings,
            engines=(OURS, *(GPU_PEERS if "peers" in self._sections else ())),
            repeats=arguments.repeats,
            timeout_s=arguments.timeout,
            all_within_s=min(arguments.timeout, self._deadline - time.monotonic()),
            say=_progress,
            shape=shape,
        )
        self._engines[name] = runs
        self.has_failed |= bool(runs[0].left_out)
        for row in rows:
            self._add(row)

    def _part(
        self,
        part: str,
        section: str,
        options: dict[str, Any],
        ceilings: Ceilings | None,
        row_of: Callable[[dict[str, Any]], Row] | None = None,
    ) -> list[dict[str, Any]]:
        """What a part found, whose rows are taken in as they come.

        Args:
            section: of its rows.
            row_of: makes one of what the part says; None: it is a kernel's.
        """
        left_s = self._deadline - time.monotonic()
        if left_s < _LEAST_S:
            self._add(Row(section=section or part, what=part, shape="", note="no time left"))
            return []
        _progress(part)

        def take(found: dict[str, Any]) -> None:
            self._add(row_of(found) if row_of else kernel_row(found, ceilings, section=section))

        run = run_cases if part in CASE_PARTS else run_part
        result = run(part, options, timeout_s=min(self._arguments.timeout, left_s), on_row=take)
        if result.failure:
            self.has_failed |= part not in PEER_PARTS[1:]
            self._add(Row(section=section or part, what=part, shape="", note=f"failed: {result.failure}"))
        return result.found

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        self._write()

    def _write(self) -> None:
        if self._arguments.out:
            folder = Path(self._arguments.out)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(self.report(), str(folder / "bench_gpu.json"))


def workload_of(
    name: str,
    folder: Path,
    load_format: str,
    ceilings: Ceilings,
    *,
    engines: Sequence[str],
    repeats: int,
    timeout_s: float,
    all_within_s: float = math.inf,
    say: Callable[[str], None],
    shape: ModelShape | None = None,
) -> tuple[list[EngineRun], list[Row]]:
    """The 256 requests through engines, and a row for each.

    Args:
        name: of the model, for the rows.
        folder, load_format: what the engines load.
        timeout_s, all_within_s: for any answer of an engine, and for everything.
        shape: for the floor; None reads it from the folder.
    """
    requests = requests_256()
    lengths = lengths_of(requests)
    runs = run_engines(
        engines,
        load_options(str(folder), load_format, requests),
        requests,
        repeats=repeats,
        timeout_s=timeout_s,
        all_within_s=all_within_s,
        say=say,
    )
    shape = shape or read_shape(folder).with_dtype("bfloat16")
    floor = workload_floor(shape, ceilings, lengths)
    rows = workload_rows(
        runs, what="256 requests", shape=name, num_output_tokens=floor.num_output_tokens, floor_s=floor.total_s
    )
    return runs, rows


def step_row(found: dict[str, Any], shape: ModelShape, ceilings: Ceilings, name: str) -> Row:
    """A row of what the benchmark of steps said, with the floor of that step."""
    floor_s, num_rows = 0.0, int(found.get("batch", 0))
    num_tokens = int(found.get("num_tokens", 0))
    if num_rows and num_tokens:
        floor_s = mixed_floor_s(shape, ceilings, context=int(found["context"]), batch=num_rows, num_tokens=num_tokens)
    elif num_rows:
        floor_s = step_floor_s(shape, ceilings, contexts=int(found["context"]), batch=num_rows)
    elif num_tokens:
        floor_s = prefill_floor_s(shape, ceilings, num_tokens=num_tokens)
    ms = float(found.get("ms", 0.0))
    return Row(
        section="steps",
        what=f"{name} {found['kernel']}",
        shape=str(found.get("shape", "")),
        ms=ms,
        low_ms=float(found.get("low_ms", 0.0)),
        high_ms=float(found.get("high_ms", 0.0)),
        floor_ms=floor_s * 1e3,
        figure=f"{(num_rows + num_tokens) / ms * 1e3:,.0f} tok/s" if ms and num_rows + num_tokens else "",
        note=str(found.get("note", "")),
        values={key: float(found[key]) for key in ("idle", "host_us") if key in found},
    )


def _key(row: Row) -> str:
    return " | ".join((row.section, row.what, row.shape, row.engine))


def _progress(what: str) -> None:
    print(f"bench gpu: {what}", file=sys.stderr, flush=True)
