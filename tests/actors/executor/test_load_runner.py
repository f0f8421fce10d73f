from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import save_tiny_model
from unconnected_ranks import member

from octavo.actors.executor import runner
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.device import Device


class Made:
    """Stands for a runner, and says what it was made with."""

    def __init__(self, device: Any, **fields: Any) -> None:
        self.device, self.fields, self.is_warm = device, fields, False

    def warm_up(self) -> None:
        self.is_warm = True


class MadeAhead(Made):
    pass


def load(monkeypatch: pytest.MonkeyPatch, where: str, *, pp_size: int = 1, **of_model: Any) -> Made:
    model = SimpleNamespace(device=torch.device(where), **of_model)
    device = SimpleNamespace(model=model, group=SimpleNamespace(pp_size=pp_size), memory_report=lambda: None)
    monkeypatch.setattr(runner, "Device", lambda config, group, on_placed, on_loaded: device)
    monkeypatch.setattr(runner, "StepRunner", Made)
    monkeypatch.setattr(runner, "GpuRunner", MadeAhead)
    config = ExecutorConfig(
        model_path="model", cuda_graph_sizes=(1, 8), cuda_graph_tokens=(7,), max_num_batched_tokens=99, pipeline_depth=3
    )
    made: Any = runner.load_runner(config)
    assert made.is_warm
    return made


def test_on_a_gpu_steps_are_launched_ahead_and_decodes_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = load(monkeypatch, "cuda:1")
    assert type(made) is MadeAhead
    assert (made.fields["graph_sizes"], made.fields["graph_tokens"]) == ((1, 8), (7,))
    assert (made.fields["max_num_batched_tokens"], made.fields["pipeline_depth"]) == (99, 3)


def test_a_model_that_looks_at_numbers_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    made = load(monkeypatch, "cuda", fits_graphs=False)
    assert type(made) is MadeAhead
    assert made.fields["graph_sizes"] == made.fields["graph_tokens"] == ()


@pytest.mark.parametrize(("where", "pp_size"), [("cpu", 1), ("cuda", 2)])
def test_on_a_cpu_and_in_a_pipeline_a_step_is_complete_before_the_next(
    monkeypatch: pytest.MonkeyPatch, where: str, pp_size: int
) -> None:
    assert type(load(monkeypatch, where, pp_size=pp_size)) is Made


def test_kernels_are_waited_for_once_the_weights_are_there_and_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_tiny_model("qwen3", tmp_path)
    config = ExecutorConfig(model_path=str(tmp_path), dtype="float32", num_blocks=8, device="cpu", num_threads=1)
    said: list[str] = []
    for name in ("_plan", "forward"):
        real = getattr(Device, name)
        monkeypatch.setattr(Device, name, lambda *args, _name=name, _real=real: (said.append(_name), _real(*args))[1])
    runner._load_runner(config, None, on_loaded=lambda: said.append("loaded"))
    assert said[:2] == ["loaded", "_plan"]
    assert said.count("loaded") == 1
    assert "forward" in said  # of the warm-up


class BegunError(Exception):
    """Kernels are being compiled, with these facts and arguments."""


@pytest.mark.parametrize(
    ("fields", "group", "expected"),
    [
        ({"gpu": 3}, None, (3, 0, 1)),
        ({"tensor_parallel_size": 4, "replica": 1, "num_replicas": 2}, (3, (1, 2)), (3, 3, 4)),
        ({"pipeline_parallel_size": 2}, (1, (0, 1)), (0, 1, 1)),
    ],
)
def test_kernels_are_compiled_for_each_rank_and_no_gpu_is_asked_but_its_own(
    fields: dict[str, Any],
    group: tuple[int, tuple[int, int]] | None,
    expected: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever asks a GPU takes half a GiB of it."""
    ahead = pytest.importorskip("octavo.actors.executor.gpu.compile_ahead")
    current = [0]

    def begin(_config: ExecutorConfig, facts: torch.device, *, rank: int, num_sharing: int) -> None:
        raise BegunError(facts, rank, num_sharing)

    monkeypatch.setattr("octavo.actors.executor.gpu.fake_cuda.GpuFacts.of", lambda device: device)
    monkeypatch.setattr(ahead.CompileAhead, "begin", begin)
    for name, does in {
        "is_available": lambda: True,
        "device_count": lambda: 4,
        "current_device": lambda: current[-1],
        "set_device": current.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, does)
    rank, place = group or (0, (0, 1))
    parallel = member(rank, fields.get("tensor_parallel_size", 1), fields.get("pipeline_parallel_size", 1))
    monkeypatch.setattr(parallel, "place_on_host", lambda: place)
    with pytest.raises(BegunError) as begun:
        runner.load_runner(ExecutorConfig(model_path="model", **fields), parallel if group else None)
    gpu, *others = expected
    assert begun.value.args == (torch.device("cuda", gpu), *others)
