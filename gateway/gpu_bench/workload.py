"""The 256 requests through engines, each alone on the GPU in a process of its own, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from ..peers.adapter import LoadOptions, Request
from ..peers.catalog import OURS
from ..peers.process import PeerFailedError, PeerProcess, Timed
from .requests_256 import GeneratedRequest
from .rows import Row

_WARM_UP = [Request([7, 8, 9, 10], 8)]


class Process(Protocol):
    """What is asked of `PeerProcess`."""

    def probe(self, options: LoadOptions) -> str: ...
    def load(self, options: LoadOptions) -> dict[str, Any]: ...
    def run(self, requests: Sequence[Request]) -> Timed: ...
    def close(self) -> None: ...


class EngineRun(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's runs.

    Attributes:
        load_s: to ready, as the engine's process told it; 0 if it did not get there.
        seconds: of each run.
        left_out: why there are none; empty if there are.
        facts, versions: as the engine told them.
    """

    engine: str
    load_s: float = 0.0
    seconds: tuple[float, ...] = ()
    left_out: str = ""
    facts: dict[str, Any] = {}
    versions: dict[str, str] = {}


def run_engines(
    names: Sequence[str],
    options: LoadOptions,
    requests: Sequence[GeneratedRequest],
    *,
    repeats: int,
    timeout_s: float,
    start: Callable[[str], Process] | None = None,
    say: Callable[[str], None] = print,
) -> list[EngineRun]:
    """Run each engine `repeats` times, one engine after the other, in the other order every second time.

    A GPU's memory holds one engine at a time, so each round starts each engine afresh.
    """
    asked = [Request(request.token_ids, request.num_output_tokens) for request in requests]
    runs = {name: EngineRun(engine=name) for name in names}
    for number in range(repeats):
        for name in names if number % 2 == 0 else reversed(names):
            if runs[name].left_out:
                continue
            say(f"workload: {name}, round {number + 1} of {repeats}")
            process = start(name) if start is not None else PeerProcess(name, timeout_s=timeout_s)
            try:
                runs[name] = _run_once(process, runs[name], options, asked)
            except PeerFailedError as error:
                runs[name] = msgspec.structs.replace(runs[name], left_out=str(error))
            finally:
                process.close()
    return list(runs.values())


def _run_once(process: Process, run: EngineRun, options: LoadOptions, asked: Sequence[Request]) -> EngineRun:
    why_not = process.probe(options)
    if why_not:
        return msgspec.structs.replace(run, left_out=why_not)
    loaded = process.load(options)
    process.run(_WARM_UP)
    timed = process.run(asked)
    return msgspec.structs.replace(
        run,
        load_s=loaded["load_s"],
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
        note = f"left out: {run.left_out}" if run.left_out else f"ready in {run.load_s:.1f} s"
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
            )
        )
    return rows
