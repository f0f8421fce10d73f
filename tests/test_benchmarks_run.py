"""The commands that BENCHMARKS.md names, each in its smallest form: they run to their end, whatever the figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALLEST = {
    "octavo.actors.executor.bench_ranks": ("--rows", "2", "--prompt", "4", "--decodes", "2", "--layouts", "2x1"),
    "octavo.actors.runtime.bench_nursery": ("--num-forks", "1", "json"),
    "octavo.actors.runtime.bench_port": ("--rows", "4", "--hops", "20", "--steps", "20", "--step-ms", "1"),
    "octavo.gateway.bench_control_plane": ("--steps", "20"),
    "octavo.gateway.bench_json": ("--megabytes", "0.5", "--repeats", "1"),
    "octavo.gateway.bench_journal": (
        *("--at-once", "2", "--rounds", "1", "--input-len", "8"),
        *("--output-len", "4"),
    ),
    "octavo.sim.core_bench": ("--num-running", "2", "--num-steps", "20", "--num-replays", "1"),
}
MISSES_ITS_BAR = 1


@pytest.mark.parametrize("module", SMALLEST)
def test_a_benchmark_runs_to_its_end(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *SMALLEST[module]],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in {0, MISSES_ITS_BAR}, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert any(character.isdigit() for character in done.stdout), done.stdout
