from __future__ import annotations

import json
import subprocess
import sys

NUM_STREAMS = 400
NUM_TOKENS = 14
TICK_US = 10_000
"""The kernel counts user and system time so."""


def test_the_benchmark_loses_no_stream_and_prints_what_one_costs() -> None:
    # In a process of its own: what this one has freed before, streams would take without growing it.
    command = [sys.executable, "-m", "octavo.gateway.bench_streams", "--interval-ms", "0"]
    command += ["--streams", str(NUM_STREAMS), "--tokens", str(NUM_TOKENS)]
    printed = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    num_events = NUM_STREAMS * NUM_TOKENS
    received = {"streams": NUM_STREAMS, "lost": 0, "events": num_events, "cancelled": 0}
    assert {name: printed[name] for name in received} == received
    # A connection, its request and its response are kilobytes at the least; the bound is what is promised.
    assert 4 < printed["kib_per_stream"] <= 40
    # Two accounts of the same time; the second one is that of all threads, and knows whole ticks alone.
    coarse = 3 * TICK_US / (num_events - 2 * NUM_STREAMS)
    halves = printed["us_per_token_ours"] + printed["us_per_token_kernel"]
    assert 0.7 * printed["us_per_token"] - coarse < halves < 1.5 * printed["us_per_token"] + coarse
    # The least that could be done is a part of what is done, and no small one.
    assert 0.2 < printed["us_per_token_floor"] / printed["us_per_token"] < 1.5
    assert printed["tokens_per_s"] * printed["us_per_token"] < 1.1e6, "one thread has a second in a second"
    assert printed["ms_per_step_median"] * 1e3 > 0.3 * NUM_STREAMS * printed["us_per_token_floor"]
