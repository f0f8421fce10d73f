"""The runner as it starts and serves on a GPU, down to the launches, on one that computes nothing (`fake_cuda`).

Each model in tensors without contents: a step that waited for the device, mixed it with the host, or launched what
cannot be launched would raise there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.actors.executor.gpu.mixed_sizes import MixedSizes

SCRIPT = Path(__file__).parents[3] / "gpu_dry_run.py"

SERVED: dict[str, dict[str, Any]] = {
    "dense, graphs": {
        **{"preset": "qwen3-0.6b", "cuda_graph_sizes": [1, 8, 256], "cuda_graph_tokens": [64, 512]},
        "max_num_batched_tokens": 4096,
    },
    "more rows, fp8 cache": {
        **{"preset": "llama-3.1-8b", "num_layers": 1, "num_steps": 15, "kv_cache_dtype": "fp8"},
        **{"max_num_seqs": 512, "max_num_batched_tokens": 8192, "cuda_graph_sizes": [512]},
    },
    "mixture, windows, sinks": {
        **{"preset": "gpt-oss-20b", "num_steps": 15, "cuda_graph_sizes": [1, 64], "cuda_graph_tokens": [128]},
        "max_num_seqs": 64,
    },
    "quantised": {
        **{"preset": "qwen3-0.6b", "num_layers": 1, "num_steps": 15, "quantization": "int4"},
        "cuda_graph_sizes": [1, 64],
    },
    "deterministic mixture": {"preset": "qwen3-30b-a3b", "num_layers": 1, "num_steps": 15, "deterministic": True},
}


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(list(SERVED.values()))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(SERVED, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", SERVED)
def test_no_kernel_is_compiled_and_no_graph_captured_once_it_is_ready(
    name: str, answers: dict[str, dict[str, Any]]
) -> None:
    answer, most_rows = answers[name], SERVED[name].get("max_num_seqs", 256)
    assert answer["num_compiled"] >= 8
    assert answer["num_launches"] > 500
    # The steps reached what is compiled for separately: as many rows as there can be, prompts among them.
    assert answer["most_rows"] == answer["most_rows_with_prompts"] == most_rows
    assert answer["late"] == []
    assert answer["num_late"] == 0


@pytest.mark.parametrize("name", SERVED)
def test_no_kernel_is_compiled_while_a_graph_is_captured(name: str, answers: dict[str, dict[str, Any]]) -> None:
    served = SERVED[name]
    mixed = list(MixedSizes(served.get("max_num_seqs", 256), served.get("cuda_graph_tokens", ())))
    assert answers[name]["num_captured"] == len(served.get("cuda_graph_sizes", [])) + len(mixed)
    assert (answers[name]["num_mixed_replays"] > 3) == bool(mixed)
    assert answers[name]["captured"] == []


def test_a_kernel_that_warm_up_leaves_out_is_found() -> None:
    """Or the tests above would prove nothing."""
    code = (
        "import gpu_dry_run as dry\n"
        "from octavo.actors.executor.gpu import runner\n"
        "runner.warm_up_steps = lambda **_: ()\n"
        f"print(next(dry.answers([{SERVED['dense, graphs'] | {'num_steps': 2}!r}]))['num_late'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, cwd=SCRIPT.parent
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.splitlines()[-1]) > 0
