"""The 256 requests through engines, each alone on the GPU in a process of its own, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from ..peers.adapter import LoadOptions, Request
from ..peers.catalog import OURS
from ..peers.process import PeerFailedError, PeerProcess, Timed
from .requests_256 import MAX_MODEL_LEN, TEMPERATURE, GeneratedRequest
from .rows import Row

_FIRST_TOKEN = [Request([7, 8, 9, 10], 1)]
_WARM_UP = [Request([7, 8, 9, 10], 8)]
_MAX_NUM_SEQS = 256
_LEAST_S = 5.0
"""An engine is started with: probing alone takes as much."""


class Process(Protocol):
    """What is asked of `PeerProcess`."""

    def probe(self, options: LoadOptions) -> str: ...
    def load(self, options: LoadOptions) -> dict[str, Any]: ...
    def run(self, requests: Sequence[Request]) -> Timed: ...
    def log(self) -> str: ...
    def close(self) -> None: ...


class EngineRun(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's runs.

    Attributes:
        load_s: to ready, as the engine's process told it; 0 if it did not get there.
        first_token_s: from the start of that process to a first token, imports included; likewise.
        seconds: of each run.
        left_out: why there are none; empty if there are.
        facts, versions: as the engine told them.
    """

    engine: str
    load_s: float = 0.0
    first_token_s: float = 0.0
    seconds: tuple[float, ...] = ()
    left_out: str = ""
    facts: dict[str, Any] = {}
    versions: dict[str, str] = {}


def load_options(
    folder: str, load_format: str, requests: Sequence[GeneratedRequest], *, device: str = "cuda"
) -> LoadOptions:
    """What every engine is asked for: room for all requests at once, bfloat16, the published temperature.

    Args:
        load_format: `dummy`: the folder holds no weights.
    """
    fields: dict[str, Any] = {
        "model": folder,
        "load_format": load_format,
        "dtype": "bfloat16",
        "device": device,
        "performance_mode": "throughput",
        "max_num_seqs": _MAX_NUM_SEQS,
        "max_model_len": MAX_MODEL_LEN,
        "enable_prefix_caching": False,
    }
    return LoadOptions(
        folder=folder,
        dtype="bfloat16",
        num_threads=1,
        max_num_seqs=_MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        max_total_tokens=sum(len(request.token_ids) + request.num_output_tokens for request in requests),
        engine_fields=fields,
        device=device,
        temperature=TEMPERATURE,
        load_format=load_format,
    )


def run_engines(
    names: Sequence[str],
    options: LoadOptions,
    requests: Sequence[GeneratedRequest],
    *,
    repeats: int,
    timeout_s: float,
    all_within_s: float = math.inf,
    start: Callable[[str], Process] | None = None,
    say: Callable[[str], None] = print,
) -> list[EngineRun]:
    """Run each engine `repeats` times, one engine after the other, in the other order every second time.

    A GPU's memory holds one engine at a time, so each round starts each engine afresh.

    Args:
        timeout_s: for any answer of an engine.
        all_within_s: for everything; an engine that is still at it then has failed, or keeps the runs that it has.
        say: hears what is done, and of an engine that fails, behind a first line, the end of its log.
    """
    deadline = time.monotonic() + all_within_s
    asked = [Request(request.token_ids, request.num_output_tokens) for request in requests]
    runs = {name: EngineRun(engine=name) for name in names}
    for number in range(repeats):
        for name in names if number % 2 == 0 else reversed(names):
            if runs[name].left_out:
                continue
            left_s = deadline - time.monotonic()
            if left_s < _LEAST_S:
                if not runs[name].seconds:
                    runs[name] = msgspec.structs.replace(runs[name], left_out="no time left")
                continue
            say(f"workload: {name}, round {number + 1} of {repeats}")
            started = time.perf_counter()
            try:
                process = start(name) if start is not None else _process(name, min(timeout_s, left_s), deadline)
            except PeerFailedError as error:
                runs[name] = msgspec.structs.replace(runs[name], left_out=str(error))
                continue
            try:
                runs[name] = _run_once(process, runs[name], options, asked, started)
            except PeerFailedError as error:
                say(f"workload: {name}: {error}\n{process.log()}")
                if not runs[name].seconds or time.monotonic() < deadline:
                    runs[name] = msgspec.structs.replace(runs[name], left_out=str(error))
            finally:
                process.close()
    return list(runs.values())


def _process(name: str, timeout_s: float, deadline: float) -> PeerProcess:
    process = PeerProcess(name, timeout_s=timeout_s)
    process.deadline = deadline
    return process


def _run_once(
    process: Process, run: EngineRun, options: LoadOptions, asked: Sequence[Request], started: float
) -> EngineRun:
    why_not = process.probe(options)
    if why_not:
        return msgspec.structs.replace(run, left_out=why_not)
    loaded = process.load(options)
    process.run(_FIRST_TOKEN)
    first_token_s = time.perf_counter() - started
    process.run(_WARM_UP)
    timed = process.run(asked)
    return msgspec.structs.replace(
        run,
        load_s=loaded["load_s"],
        first_token_s=first_token_s,
        seconds=(*run.seconds, timed.elapsed_s),
        facts=loaded["facts"],
        versions=loaded["versions"],
    )


def workload_rows(
    runs: Sequence[EngineRun], *, what: str, shape: str, num_output_tokens: int, floor_s: float
) -> list[Row]:
    """A row for each engine: the median of its runs beside the floor."""
    rows = []
    for run in runs:
        note = f"ready in {run.load_s:.1f} s, first token {run.first_token_s:.1f} s after its start"
        if run.left_out:
            note = f"left out: {run.left_out}"
        if len(run.seconds) > 1:
            note += f"; runs {', '.join(f'{seconds:.2f}' for seconds in run.seconds)} s"
        seconds = statistics.median(run.seconds) if run.seconds else 0.0
        rows.append(
            Row(
                section="workload",
                what=what,
                shape=shape,
                engine=run.engine if run.engine != OURS else "octavo",
                ms=seconds * 1e3,
                floor_ms=floor_s * 1e3,
                figure=f"{num_output_tokens / seconds:,.0f} tok/s" if seconds else "",
                note=note,
                values=(
                    {"tokens_per_s": num_output_tokens / seconds, "first_token_s": run.first_token_s} if seconds else {}
                ),
            )
        )
    return rows
