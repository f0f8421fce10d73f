"""The commands that BENCHMARKS.md names, each in its smallest form: they run to their end, whatever the figures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TRACE = "trace.csv"
SMALLEST = {
    "octavo.actors.executor.bench_ranks": ("--rows", "2", "--prompt", "4", "--decodes", "2", "--layouts", "2x1"),
    "octavo.actors.executor.bench_sampler": ("--shapes", "2x64"),
    "octavo.actors.executor.gpu.bench_host": ("--rows", "2", "--steps", "20", "--layers", "1", "--only", "stay"),
    "octavo.actors.runtime.bench_nursery": ("--num-forks", "1", "json"),
    "octavo.actors.runtime.bench_port": ("--rows", "4", "--hops", "20", "--steps", "20", "--step-ms", "1"),
    "octavo.gateway.bench_control_plane": ("--steps", "20"),
    "octavo.gateway.bench_json": ("--megabytes", "0.5", "--repeats", "1"),
    "octavo.gateway.bench_journal": (
        *("--at-once", "2", "--rounds", "1", "--input-len", "8"),
        *("--output-len", "4"),
    ),
    "octavo.gateway.bench_streams": ("--streams", "4", "--tokens", "5"),
    "octavo.kernels.bench_cpu": ("--kv", "--threads", "1", "--repeats", "1"),
    "octavo.sim.bench": ("--azure", TRACE, "--only", "1 replica"),
    "octavo.sim.core_bench": ("--num-running", "2", "--num-steps", "20", "--num-replays", "1"),
}
TRIED_ELSEWHERE = {
    "octavo.gateway.gpu_bench.device_check": "gateway/gpu_bench/test_device_check.py",  # which needs a GPU to run
    "octavo.gateway.soak": "gateway/test_soak.py",
    "octavo.models.make_checkpoint": "models/test_make_checkpoint.py",
}
MISSES_ITS_BAR = 1


def test_every_module_that_the_document_runs_is_run_by_a_test() -> None:
    named = set(re.findall(r"python -m (octavo[\w.]*)", (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")))
    assert len(named) > 5
    assert not named - {*SMALLEST, *TRIED_ELSEWHERE}, "say how each is run, here or elsewhere"
    for module, file in TRIED_ELSEWHERE.items():
        assert f"from {module} import" in (ROOT / "tests" / file).read_text(encoding="utf-8"), module


@pytest.mark.parametrize("module", SMALLEST)
def test_a_benchmark_runs_to_its_end(module: str, tmp_path: Path) -> None:
    (tmp_path / TRACE).write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.0319569,396,109\n"
    )
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
