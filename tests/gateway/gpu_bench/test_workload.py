"""Engines in turns, with processes that only pretend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from octavo.gateway.gpu_bench.requests_256 import requests_256
from octavo.gateway.gpu_bench.workload import EngineRun, load_options, run_engines, workload_rows
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

    def log(self) -> str:
        return f"the log of {self._name}"

    def close(self) -> None:
        self._journal.append(f"close {self._name}")


def test_each_round_starts_every_engine_afresh_and_turns_the_order_round() -> None:
    journal: list[str] = []
    said: list[str] = []
    runs = run_engines(
        ["octavo", "other", "absent", "broken"],
        OPTIONS,
        requests_256(count=3, shortest=2, longest=4),
        repeats=2,
        timeout_s=1,
        start=lambda name: Pretended(name, journal),
        say=said.append,
    )
    assert [what for what in said if "log" in what] == ["workload: broken: load: out of memory\nthe log of broken"]
    started = [line.removeprefix("start ") for line in journal if line.startswith("start")]
    assert started == ["octavo", "other", "absent", "broken", "other", "octavo"]  # who cannot is not asked again
    assert journal.count("run octavo 3") == 2
    assert journal.count("run octavo 1") == 4  # a first token and a warm-up before each
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
    assert "ready in 2.0 s, first token " in rows[0].note
    assert rows[0].values["tokens_per_s"] == pytest.approx(250)
    assert rows[0].values["first_token_s"] == by_name["octavo"].first_token_s > 0
    assert rows[2].note == "left out: not installed: absent"


def test_an_engine_for_which_no_time_is_left_is_not_started_and_one_that_has_run_keeps_its_runs() -> None:
    journal: list[str] = []

    class Late(Pretended):
        def run(self, requests: Sequence[Request]) -> Timed:
            if self._name == "octavo" and journal.count("start octavo") == 2:
                raise PeerFailedError("run: no answer in 0 s")
            return super().run(requests)

    def run(repeats: int, all_within_s: float) -> list[EngineRun]:
        return run_engines(
            ["octavo"],
            OPTIONS,
            requests_256(count=1, shortest=2, longest=4),
            repeats=repeats,
            timeout_s=1,
            all_within_s=all_within_s,
            start=lambda name: Late(name, journal),
            say=lambda what: None,
        )

    (none,) = run(1, 0.0)
    assert none.left_out == "no time left" and journal == []
    (failed,) = run(2, 100.0)
    assert failed.left_out == "run: no answer in 0 s" and failed.seconds == (4.0,)


def test_every_engine_is_given_what_the_published_workload_asks_for() -> None:
    options = load_options("f", "dummy", requests_256())
    assert (options.temperature, options.max_model_len, options.max_num_seqs) == (0.6, 4096, 256)
    assert options.max_total_tokens == 142_827 + 133_966
    assert options.engine_fields["performance_mode"] == "throughput"
    assert options.engine_fields["enable_prefix_caching"] is False
