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
    "fp8, blocks": {
        **{"preset": "qwen3-0.6b", "num_layers": 1, "num_steps": 15, "in_fp8": "blocks"},
        **{"cuda_graph_sizes": [1, 64, 256], "cuda_graph_tokens": [64, 512], "max_num_batched_tokens": 4096},
    },
    "fp8, static inputs": {
        **{"preset": "qwen3-0.6b", "num_layers": 1, "num_steps": 15, "in_fp8": "static"},
        "cuda_graph_sizes": [1, 64],
    },
    "fp8, deterministic": {
        **{"preset": "llama-3.1-8b", "num_layers": 1, "num_steps": 15, "in_fp8": "channel", "deterministic": True},
        **{"cuda_graph_sizes": [1, 64], "kv_cache_dtype": "int8"},
    },
    "mixture in fp8": {"preset": "qwen3-30b-a3b", "num_layers": 1, "num_steps": 15, "in_fp8": "blocks"},
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
    assert answer["num_compiled"] >= 4  # of its own: what those before it launch too is known already
    assert answer["num_launches"] > 500
    # The steps reached what is compiled for separately: as many rows as there can be, prompts among them.
    assert answer["most_rows"] == answer["most_rows_with_prompts"] == most_rows
    assert answer["late"] == []
    assert answer["num_late"] == 0


def test_weights_in_fp8_are_multiplied_as_they_are_where_they_are_no_experts(
    answers: dict[str, dict[str, Any]],
) -> None:
    rounding, tiles, skinny = "_round_groups_kernel", "_tiles_kernel", "_fp8_skinny_kernel"
    assert {rounding, tiles, skinny} <= set(answers["fp8, blocks"]["launched"])
    assert {rounding, tiles, skinny} <= set(answers["fp8, static inputs"]["launched"])
    deterministic = answers["fp8, deterministic"]["launched"]
    assert {"_round_rows_kernel", tiles} <= set(deterministic) and skinny not in deterministic
    assert {"_up_kernel", tiles} <= set(answers["mixture in fp8"]["launched"])


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


# A prompt, then decodes that are told of blocks: what is launched for each, and how many pieces its diff has.
REPLAYED = """
import json
import gpu_dry_run as dry
from fake_cuda import fake_cuda
from octavo.actors.executor.gpu.graphs import Graphs
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest

run, replayed = Graphs.run, []
Graphs.run = lambda self, size: (replayed.append(size), run(self, size))
with fake_cuda() as kernels:
    _, runner = dry.load("qwen3-0.6b", num_layers=1, cuda_graph_sizes=[8], max_num_seqs=8)
    replayed.clear()
    start = StartRequest(1, bytes(60), 15, 0, SamplingParams(temperature=0.0))
    for index in range(3):
        rows = {"start": (start,), "block_tables": ((),)} if index == 0 else {}
        step = ExecuteStep(0, index, (1,), (1 if index else 15,), append_blocks=((1, (index, index + 7)),), **rows)
        before = kernels.num_launches
        launched = runner.launch(step)
        runner.collect(launched)
        print(json.dumps([kernels.num_launches - before, launched.packed.num_pieces, replayed]))
"""


def test_a_step_that_a_graph_computes_launches_nothing_beside_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REPLAYED], capture_output=True, text=True, timeout=120, check=False, cwd=SCRIPT.parent
    )
    assert done.returncode == 0, done.stderr[-4000:]
    prompt, *decodes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert prompt[0] > 10 and prompt[1:] == [3, []]
    assert decodes == [[0, 1, [8]], [0, 1, [8, 8]]]


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
