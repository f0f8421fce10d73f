"""The benchmark measures the load that it says, whatever the times are."""

from __future__ import annotations

import json

import pytest

from octavo.sim.core_bench import main, measure


def test_it_counts_steps_of_nearly_as_many_rows_as_requests_run() -> None:
    times = measure(3, context_len=20, output_len=8, num_steps=30, num_replays=1)
    assert (times.num_running, times.context_len, times.num_steps) == (3, 20, 30)
    # Each request waits a lap or so for the place of the one before it.
    assert 2 <= times.rows_per_step <= 3
    assert times.scheduler_us > 0
    assert times.allocator_us > 0
    assert times.steps_per_s == pytest.approx(1e6 / (times.scheduler_us + times.allocator_us))


def test_it_prints_a_line_for_each_load(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num-running", "1", "2", "--context-len", "5", "--output-len", "4", "--num-steps", "5"]
    assert main([*arguments, "--num-replays", "1", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["num_running"] for line in lines] == [1, 2]
    assert main([*arguments, "--num-replays", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
