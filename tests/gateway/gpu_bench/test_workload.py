"""Engines in turns, with processes that only pretend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from octavo.gateway.gpu_bench.requests_256 import requests_256
from octavo.gateway.gpu_bench.workload import run_engines, workload_rows
from octavo.gateway.peers.adapter import LoadOptions, Request
from octavo.gateway.peers.process import PeerFailedError, Timed

OPTIONS = LoadOptions(folder="f", dtype="bfloat16", num_threads=1, device="cuda", temperature=0.6)


class Pretended:
    def __init__(self, name: str, journal: list[str]) -> None:
        self._name, self._journal = name, journal
        journal.append(f"start {name}")

    def probe(self, options: LoadOptions) -> str:
        assert options.temperature == 0.6
        return "not installed: absent" if self._name == "absent" else ""

    def load(self, options: LoadOptions) -> dict[str, Any]:
        if self._name == "broken":
            raise PeerFailedError("load: out of memory")
        return {"load_s": 2.0, "facts": {}, "versions": {self._name: "1"}}

    def run(self, requests: Sequence[Request]) -> Timed:
        self._journal.append(f"run {self._name} {len(requests)}")
        seconds = {"octavo": 4.0, "other": 5.0}[self._name]
        return Timed(elapsed_s=seconds, outputs=[], cpu_s=0.0, foreign_cores=0.0)

    def close(self) -> None:
        self._journal.append(f"close {self._name}")


def test_each_round_starts_every_engine_afresh_and_turns_the_order_round() -> None:
    journal: list[str] = []
    runs = run_engines(
        ["octavo", "other", "absent", "broken"],
        OPTIONS,
        requests_256(count=3, shortest=2, longest=4),
        repeats=2,
        timeout_s=1,
        start=lambda name: Pretended(name, journal),
        say=lambda what: None,
    )
    started = [line.removeprefix("start ") for line in journal if line.startswith("start")]
    assert started == ["octavo", "other", "absent", "broken", "other", "octavo"]  # who cannot is not asked again
    assert journal.count("run octavo 1") == journal.count("run octavo 3") == 2  # a warm-up before each
    open_engines = 0
    for line in journal:
        open_engines += line.startswith("start") - line.startswith("close")
        assert open_engines <= 1
    by_name = {run.engine: run for run in runs}
    assert by_name["octavo"].seconds == (4.0, 4.0)
    assert by_name["octavo"].versions == {"octavo": "1"}
    assert by_name["absent"].left_out == "not installed: absent"
    assert by_name["broken"].left_out == "load: out of memory"
    rows = workload_rows(runs, what="w", shape="s", num_output_tokens=1000, floor_s=3.0)
    assert [row.engine for row in rows] == ["octavo", "other", "absent", "broken"]
    assert rows[0].share == pytest.approx(0.75)
    assert rows[0].figure == "250 tok/s"
    assert "ready in 2.0 s" in rows[0].note
    assert rows[2].note == "left out: not installed: absent"
