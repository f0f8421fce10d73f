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
    "mixture in MXFP4": {
        **{"preset": "gpt-oss-20b", "num_layers": 1, "num_steps": 15, "in_mxfp4": True},
        **{"cuda_graph_sizes": [1, 64], "cuda_graph_tokens": [128], "max_num_seqs": 64},
    },
    "quantised mixture": {
        **{"preset": "gpt-oss-20b", "num_layers": 1, "num_steps": 15, "quantization": "int4"},
        **{"cuda_graph_sizes": [1, 64], "max_num_seqs": 64},
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


@pytest.mark.parametrize("name", SERVED)
def test_no_step_waits_for_the_gpu_and_nothing_is_written_or_read_before_its_copy_is_over(
    name: str, answers: dict[str, dict[str, Any]]
) -> None:
    answer = answers[name]
    assert answer["waits"] == []
    assert answer["races"] == []
    assert answer["num_failed"] == 0  # what is read too early is no token


# Each makes no difference to a GPU that is never late: memory used again at once, results read at once, memory that is
# not pinned, a number of the host's for a graph, an event that is waited for. What a dry run then says.
MISTAKES = """
import json, sys
from unittest.mock import patch

import gpu_dry_run as dry
import torch
from octavo.actors.executor.gpu.forward_pass import ForwardPass
from octavo.actors.executor.gpu.launched import Launched
from octavo.actors.executor.gpu.runner import GpuRunner

settle, sampled = Launched.settle, ForwardPass.sampled

def settle_after_reading(self):
    values = None if self.staging is None else self.staging.results_array[: self.plan.num_words].copy()
    staging = settle(self)
    self._values = self._values if values is None else values
    return staging

def sampled_in_time(self, count):
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    return sampled(self, count)

mistakes = {
    "memory": (
        patch.object(GpuRunner, "_take_staging", lambda self: self._staging[0]),
        patch.object(GpuRunner, "_settle", lambda self, launched: launched.settle()),
    ),
    "results": (patch.object(Launched, "settle", settle_after_reading),),
    "pinned": (patch.object(Launched, "words", property(lambda self: self._words.clone())),),
    "graph": (patch.object(ForwardPass, "edit", lambda self, x: x.mul_(torch.tensor([1.0], device=x.device))),),
    "event": (patch.object(ForwardPass, "sampled", sampled_in_time),),
    "none": (),
}
question = {"preset": "qwen3-0.6b", "num_layers": 1, "num_steps": 6, "cuda_graph_sizes": [8], "max_num_seqs": 8}
answers = dry.answers([dict(question) for _ in mistakes])
for name, changes in mistakes.items():
    for change in changes:
        change.start()
    answer = next(answers)
    print(json.dumps([name, answer["waits"], answer["races"], answer["num_failed"]]))
    for change in changes:
        change.stop()
"""


def test_mistakes_that_only_a_gpu_would_show_are_found() -> None:
    """Or the test above would prove nothing."""
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES], capture_output=True, text=True, timeout=300, check=False, cwd=SCRIPT.parent
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    found = {name: (waits, races, num_failed > 0) for name, waits, races, num_failed in map(json.loads, lines)}
    assert found["none"] == ([], [], False)
    assert found["memory"][1]
    assert found["results"] == ([], [], True)
    assert found["pinned"] == (["a copy from memory of the host that is not pinned"], [], False)
    assert found["graph"] == (["torch.tensor, of what the host has"], [], False)
    assert found["event"] == (["an event that is waited for"], [], False)


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
