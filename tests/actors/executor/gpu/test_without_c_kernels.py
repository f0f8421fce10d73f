"""A start on a GPU neither builds nor loads the CPU's C kernels: that would take a minute of each first one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[3]

# A thread of an executor and a process's rank, each from its load to steps, on the GPU that computes nothing.
STARTED = """
import json, os, sys, tempfile, traceback
from pathlib import Path
from fake_cuda import fake_cuda
import gpu_dry_run as dry
from octavo.actors.executor.actor import ExecutorThread
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.rank import RankExecutor
from octavo.kernels import cpu_build

asked = []
cpu_build.load = lambda environ: asked.append("".join(traceback.format_stack()))
preset, fields, options = json.loads(sys.argv[1])
core = min(os.sched_getaffinity(0))
with tempfile.TemporaryDirectory() as folder, fake_cuda() as kernels:
    dry.write_config_folder(preset, Path(folder), tokenizer=None, num_hidden_layers=1, **fields)
    config = ExecutorConfig(
        model_path=folder, load_format="dummy", device="cuda", max_model_len=2048, cpu_affinity=str(core), **options
    )
    thread = ExecutorThread(config, send=lambda message: None)
    assert thread.load().model.device.type == "cuda"
    thread.post(None)
    thread._run()
    assert os.sched_getaffinity(0) == {core}, "the thread that steps stays where it was asked to"
    rank = RankExecutor(config, 0)
    rank.load()
    requests = dry.Requests(dry.random.Random(0), max_rows=8, max_tokens=64, max_len=2048, block_size=16)
    for index in range(3):
        rank.launched.launch(requests.step(index))
        rank.launched.collect()
    assert kernels.num_launches > 100
assert not asked, asked[0]
print("done")
"""


@pytest.mark.parametrize(
    ("preset", "fields", "options"),
    [
        ("qwen3-0.6b", {}, {}),
        ("qwen3-0.6b", {}, {"quantization": "int8"}),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4"}}, {}),
        ("qwen3-0.6b", {}, {"deterministic": True}),
    ],
)
def test_a_start_on_a_gpu_builds_no_c_kernels(
    preset: str, fields: dict[str, object], options: dict[str, object]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED, json.dumps([preset, fields, options])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=TESTS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "done"
