"""How many launches a layer is on a GPU: no addition to the residual stream is one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runner import PagedRunner
from tiny_models import save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.models.registry import load_model

SCRIPT = Path(__file__).parents[1] / "gpu_launch_counts.py"
ATTENTION = {"_rms_norm_kernel": 2, "_rotary_kernel": 1, "share_kernel": 1, "reduce_shares_kernel": 1}
EXPECTED = {
    "qwen3-0.6b": {**ATTENTION, "_skinny_kernel": 4, "_gated_activation_kernel": 1},
    "gpt-oss-20b": {
        **{**ATTENTION, "_skinny_kernel": 3},  # queries, keys and values; output; router
        **{"_route_kernel": 1, "_up_kernel": 1, "_down_kernel": 1, "_combine_kernel": 1},
    },
}


def test_a_layers_launches_are_its_kernels_and_nothing_beside_them() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(list(EXPECTED))],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for preset, each in zip(EXPECTED, counts, strict=True):
        # A matrix that is cut along its inputs has its parts summed up: how products are computed is told elsewhere.
        each.pop("_sum_parts_kernel", None)
        assert each == EXPECTED[preset]


class Operations(TorchDispatchMode):
    """Counts torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "gemma2", "gemma3_text"])
def test_in_every_family_the_residual_is_added_by_the_norm_behind_it(model_type: str, tmp_path: Path) -> None:
    save_tiny_model(model_type, tmp_path, seed=5)
    model: Any = load_model(tmp_path, dtype="float32")
    model.stack = None  # one by one, as on a GPU
    runner = PagedRunner(model, num_rows=1, max_len=32, block_size=4)
    with torch.inference_mode(), Operations() as operations:
        runner.step({0: [5, 6, 7]})
    assert operations.names["embedding"] == 1, "otherwise nothing is counted"
    assert operations.names["add_"] == operations.names["add"] == 0
