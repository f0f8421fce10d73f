"""`octavo bench gpu`: ceilings, kernels, steps and the 256-request workload, each beside others and its roofline."""

from __future__ import annotations

import argparse
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
from ..peers.adapter import LoadOptions
from ..peers.catalog import GPU_PEERS, OURS
from .ceilings import H200_NOTED, Ceilings
from .gpu import GpuFacts, gpu_facts, why_no_gpu
from .part import KERNEL_PARTS, PEER_PARTS
from .parts import run_part
from .requests_256 import MAX_MODEL_LEN, TEMPERATURE, lengths_of, requests_256
from .roofline import prefill_floor_s, step_floor_s, workload_floor
from .rows import Row, ceilings_of, kernel_row, ratios, table_of
from .sections import SECTIONS
from .workload import EngineRun, run_engines, workload_rows


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
    report = bench.run()
    print(table_of(report.rows, f"octavo bench gpu: {report.facts.gpu}, {report.date}, {report.ceilings.source}"))
    print(f"{time.monotonic() - started:.0f} s in all")
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(report, str(folder / "bench_gpu.json"))
    write_json(report, arguments.json)
    return 1 if bench.has_failed else 0


class _Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._sections = tuple(arguments.only or SECTIONS)
        self._rows: list[Row] = []
        self._ceilings: Ceilings | None = None
        self._engines: dict[str, list[EngineRun]] = {}
        self.has_failed = False

    def run(self) -> GpuReport:
        facts = gpu_facts()
        # Whatever else is asked for is a share of these.
        self._measure_ceilings(facts.gpu)
        if "kernels" in self._sections:
            self._kernels()
        with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
            for name in self._arguments.model_shape:
                self._model(name, Path(folder) / name)
        ceilings = self._ceilings or H200_NOTED
        return GpuReport(
            command=f"octavo {' '.join(sys.argv[1:])}",
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            facts=facts,
            ceilings=ceilings,
            rows=self._rows,
            engines=self._engines,
            shares={_key(row): row.share for row in self._rows if row.share is not None},
            best_other_over_ours={" | ".join(key): ratio for key, ratio in ratios(self._rows).items()},
        )

    def _measure_ceilings(self, gpu: str) -> None:
        found = self._part("ceilings", "ceilings", {}, None)
        try:
            self._ceilings = ceilings_of(found, gpu)
        except ValueError as error:
            self.has_failed = True
            self._ceilings = H200_NOTED
            self._add(Row(section="ceilings", what="ceilings", shape="", note=f"{error}; {H200_NOTED.source}"))

    def _kernels(self) -> None:
        for part in KERNEL_PARTS:
            # Its own others are measured below, each in a process of its own.
            self._part(part, "kernels", {"peers": []} if part == "attention" else {}, self._ceilings)
        peers = PEER_PARTS if "peers" in self._sections else PEER_PARTS[:1]
        for part in peers:
            self._part(part, "kernels", {}, self._ceilings)

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
            found = self._part("steps", "", {"model": str(folder)}, self._ceilings)
            for row in found:
                self._add(step_row(row, shape, self._ceilings or H200_NOTED, name))
        if "workload" in self._sections:
            self._workload(name, folder, load_format, shape)

    def _workload(self, name: str, folder: Path, load_format: str, shape: ModelShape) -> None:
        arguments = self._arguments
        runs, rows = workload_of(
            name,
            folder,
            load_format,
            self._ceilings or H200_NOTED,
            engines=(OURS, *(GPU_PEERS if "peers" in self._sections else ())),
            repeats=arguments.repeats,
            timeout_s=arguments.timeout,
            say=_progress,
            shape=shape,
        )
        self._engines[name] = runs
        self.has_failed |= bool(runs[0].left_out)
        for row in rows:
            self._add(row)

    def _part(
        self, part: str, section: str, options: dict[str, Any], ceilings: Ceilings | None
    ) -> list[dict[str, Any]]:
        """What a part found; it is shown at once where `section` says where."""
        _progress(part)
        result = run_part(part, options, timeout_s=self._arguments.timeout)
        if section:
            for found in result.found:
                self._add(kernel_row(found, ceilings, section=section))
        if result.failure:
            self.has_failed |= part not in PEER_PARTS[1:]
            self._add(Row(section=section or part, what=part, shape="", note=f"failed: {result.failure}"))
        return result.found

    def _add(self, row: Row) -> None:
        self._rows.append(row)


def workload_of(
    name: str,
    folder: Path,
    load_format: str,
    ceilings: Ceilings,
    *,
    engines: Sequence[str],
    repeats: int,
    timeout_s: float,
    say: Callable[[str], None],
    shape: ModelShape | None = None,
) -> tuple[list[EngineRun], list[Row]]:
    """The 256 requests through engines, and a row for each.

    Args:
        name: of the model, for the rows.
        folder, load_format: what the engines load.
        shape: for the floor; None reads it from the folder.
    """
    requests = requests_256()
    lengths = lengths_of(requests)
    fields: dict[str, Any] = {
        "model": str(folder),
        "load_format": load_format,
        "dtype": "bfloat16",
        "device": "cuda",
        "performance_mode": "throughput",
        "max_num_seqs": len(requests),
        "max_model_len": MAX_MODEL_LEN,
        "enable_prefix_caching": False,
    }
    options = LoadOptions(
        folder=str(folder),
        dtype="bfloat16",
        num_threads=1,
        max_num_seqs=len(requests),
        max_model_len=MAX_MODEL_LEN,
        max_total_tokens=sum(prompt + output for prompt, output in lengths),
        engine_fields=fields,
        device="cuda",
        temperature=TEMPERATURE,
        load_format=load_format,
    )
    runs = run_engines(engines, options, requests, repeats=repeats, timeout_s=timeout_s, say=say)
    shape = shape or read_shape(folder).with_dtype("bfloat16")
    floor = workload_floor(shape, ceilings, lengths)
    rows = workload_rows(
        runs, what="256 requests", shape=name, num_output_tokens=floor.num_output_tokens, floor_s=floor.total_s
    )
    return runs, rows


def step_row(found: dict[str, Any], shape: ModelShape, ceilings: Ceilings, name: str) -> Row:
    """A row of what the benchmark of steps said, with the floor of that step."""
    floor_s = 0.0
    if "batch" in found:
        floor_s = step_floor_s(shape, ceilings, contexts=int(found["context"]), batch=int(found["batch"]))
    elif "num_tokens" in found:
        floor_s = prefill_floor_s(shape, ceilings, num_tokens=int(found["num_tokens"]))
    ms = float(found.get("ms", 0.0))
    figure = f"{found['batch'] / ms * 1e3:,.0f} tok/s" if ms and "batch" in found else ""
    return Row(
        section="steps",
        what=f"{name} {found['kernel']}",
        shape=str(found.get("shape", "")),
        ms=ms,
        floor_ms=floor_s * 1e3,
        figure=figure,
        note=str(found.get("note", "")),
    )


def _key(row: Row) -> str:
    return " | ".join((row.section, row.what, row.shape, row.engine))


def _progress(what: str) -> None:
    print(f"bench gpu: {what}", file=sys.stderr, flush=True)
