"""Count what a decode step launches for each layer of a model, on a GPU that is not there; run by a test, or by hand:

    python tests/gpu_launch_counts.py '["qwen3-0.6b"]'

The answer is a line of JSON for each: Triton's kernels and torch's, by name, and how often.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fake_cuda import Kernels, fake_cuda
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu.runner import GpuRunner
from octavo.actors.executor.runner import load_runner
from octavo.models.shapes import write_config_folder

_FEW, _MANY = 2, 6  # layers; even, as kinds of layers may take turns


class _Operations(TorchDispatchMode):
    """Notes torch's operations, but for those that only make a tensor or look at it in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        makes_or_views = func.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach"))
        if not makes_or_views and func.namespace == "aten":
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def decode_launches(kernels: Kernels, preset: str, num_layers: int) -> Counter[str]:
    """Of a decode step of one row."""
    with tempfile.TemporaryDirectory() as folder:
        write_config_folder(preset, Path(folder), tokenizer=None, num_hidden_layers=num_layers)
        config = ExecutorConfig(model_path=folder, load_format="dummy", device="cuda", max_model_len=256)
        runner = load_runner(config)
    assert isinstance(runner, GpuRunner)
    kernels.launched.clear()
    with torch.inference_mode(), _Operations() as operations:
        runner._forward.decode(1)
    return Counter(kernels.launched) + operations.names


def launches_per_layer(kernels: Kernels, preset: str) -> dict[str, float]:
    """What each layer adds to a step."""
    few, many = (decode_launches(kernels, preset, count) for count in (_FEW, _MANY))
    return {name: (count - few[name]) / (_MANY - _FEW) for name, count in many.items() if count != few[name]}


def main(presets: Sequence[str]) -> None:
    with fake_cuda() as kernels:
        for preset in presets:
            print(json.dumps(launches_per_layer(kernels, preset)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
