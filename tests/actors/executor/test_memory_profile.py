"""The step whose memory is measured, and what the readings make."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_model

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.device import Device, resolve_device
from octavo.actors.executor.gpu.mixed_sizes import MOST_CHUNKS, MixedSizes
from octavo.actors.executor.gpu_memory import MeasuredMemory, graph_reserve, share_out
from octavo.actors.executor.memory_profile import (
    ExecutorMemory,
    GraphExtent,
    largest_step,
    measured_memory,
    sampler_bytes,
    small_caches,
)
from octavo.actors.executor.standing_batch import StepArrays
from octavo.kernels.logit_processing import memory_bytes
from octavo.messages.errors import InvalidConfigError
from octavo.models.interface import KVCacheSpec


@given(
    num_tokens=st.integers(1, 3000),
    max_num_seqs=st.integers(1, 40),
    max_model_len=st.integers(2, 600),
    block_size=st.integers(1, 64),
)
def test_the_largest_step_is_as_large_as_asked_and_within_all_bounds(
    num_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int
) -> None:
    arrays = largest_step(num_tokens, max_num_seqs, max_model_len, block_size)
    counts = np.diff(arrays.query_start)
    assert len(arrays.input_ids) == counts.sum() == min(num_tokens, max_num_seqs * max_model_len)
    assert len(counts) <= max_num_seqs
    assert counts.min() >= 1
    assert counts.max() <= max_model_len
    num_blocks = -(-arrays.max_context_len // block_size)
    assert arrays.block_tables.max() < num_blocks
    assert arrays.slot_mapping.max() < num_blocks * block_size
    blocks = arrays.block_tables[np.repeat(np.arange(len(counts)), counts), arrays.positions // block_size]
    assert np.array_equal(arrays.slot_mapping, blocks * block_size + arrays.positions % block_size)


def test_a_model_computes_the_largest_step_in_a_small_cache(tmp_path: Path) -> None:
    save_tiny_model("qwen3", tmp_path)
    config = ExecutorConfig(model_path=str(tmp_path), dtype="float32", num_blocks=8, device="cpu", num_threads=1)
    device = Device(config)
    assert device.memory_report() is None
    arrays = largest_step(300, 4, device.model.max_position, 16)
    device._kv_caches = small_caches(device.model, torch.float32, arrays.max_context_len, 16, torch.device("cpu"))
    hidden = device.forward(arrays)
    assert len(hidden) == 300
    assert torch.isfinite(device.logits(hidden[:4])).all()


GIB = 1024**3


def measured_with(
    vocab_size: int = 1000,
    *,
    num_layers: int = 0,
    activations: int = 0,
    of_graph: int = 0,
    kept: int = 0,
    **fields: Any,
) -> MeasuredMemory:
    """Of a GPU of 140 GiB, 2 of them others', a model of 15 in 16 that torch holds, and 1 that libraries hold.

    Args:
        kept: of the 16, what was allocated after the model was loaded, and stayed.
    """
    specs = tuple(KVCacheSpec(8, 128, 128) for _ in range(num_layers))
    return measured_memory(
        ExecutorConfig(model_path="unused", max_num_seqs=10, max_num_batched_tokens=100, **fields),
        model=SimpleNamespace(vocab_size=vocab_size, dtype=torch.bfloat16, kv_cache_specs=specs),  # type: ignore[arg-type]
        before=ExecutorMemory(free=138 * GIB, total=140 * GIB, allocated=0, reserved=0),
        loaded=ExecutorMemory(free=122 * GIB, total=140 * GIB, allocated=15 * GIB, reserved=16 * GIB),
        after=ExecutorMemory(free=121 * GIB, total=140 * GIB, allocated=15 * GIB + kept, reserved=16 * GIB),
        activations=activations,
        of_graph=of_graph,
        max_model_len=64,
    )


def test_readings_add_up_to_what_is_gone() -> None:
    measured = measured_with(activations=2 * GIB, num_layers=3)
    assert measured.foreign == 2 * GIB
    assert measured.weights == 16 * GIB  # what lies between them is nobody else's
    assert measured.activations == 2 * GIB
    assert measured.runtime == GIB
    assert measured.state >= memory_bytes(10 * 3, 1000) > 4 * 64 * 1000
    assert measured.graphs == 0
    assert measured.rounding == 2 * 3 * 2 * 1024**2
    kept_back = measured.state + measured.rounding
    assert share_out(measured, memory_utilization=0.9).kv_bytes == 126 * GIB - 21 * GIB - kept_back


def test_a_gpu_that_is_not_there_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    assert resolve_device("cpu", 1).type == "cpu"
    with pytest.raises(InvalidConfigError, match="--device cpu") as caught:
        resolve_device("cuda", 1)
    assert caught.value.field == "device"


def test_a_graph_keeps_what_its_step_took_and_what_is_chosen_with_and_the_states_of_chunks() -> None:
    pytest.importorskip("triton")
    from octavo.kernels.gpu.attention_config import MAX_CHUNK_BYTES
    from octavo.kernels.gpu.sampling import CAPACITY

    def graphs(vocab_size: int = 1000, **fields: Any) -> int:
        return measured_with(vocab_size, cuda_graph_sizes=(10,), **fields).graphs

    few = graphs(of_graph=GIB)
    assert few > GIB
    assert graphs(160_000, of_graph=GIB) - few > 10 * 159_000 // 8
    assert few - GIB >= 10 * CAPACITY * (4 + 4)
    assert graphs(of_graph=GIB, deterministic=True) - few >= MAX_CHUNK_BYTES
    assert graphs(of_graph=GIB, kept=GIB) - few == GIB  # libraries take workspaces for each stream
    assert measured_with(of_graph=GIB, kept=GIB).graphs == 0


def test_the_extent_of_graphs_is_that_of_the_largest() -> None:
    config = ExecutorConfig(
        model_path="unused", max_num_seqs=20, cuda_graph_sizes=(1, 24), cuda_graph_tokens=(64, 128, 64)
    )
    sizes = list(MixedSizes(20, (64, 128)))
    extent = GraphExtent.of(config)
    assert extent == GraphExtent(2 + len(sizes), 20 + 128, 20 + MOST_CHUNKS)
    assert max(size.num_tokens for size in sizes) == extent.most_tokens
    assert max(size.num_rows for size in sizes) == extent.most_samples
    assert GraphExtent.of(ExecutorConfig(model_path="unused")) == GraphExtent(0, 0, 0)


class CountedMemory:
    """torch.cuda's counts, of a GPU that is this CPU: every tensor of a step is said to be as large as its tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
        self.now = self.peak = 0
        self.steps: list[tuple[int, int]] = []
        forward, logits = device.forward, device.logits

        def counted_forward(arrays: StepArrays) -> torch.Tensor:
            self.peak = self.now + len(arrays.input_ids)
            self.steps.append((len(arrays.input_ids), 0))
            return forward(arrays)

        def counted_logits(hidden: torch.Tensor) -> torch.Tensor:
            self.peak += 1000 * len(hidden)
            self.steps[-1] = (self.steps[-1][0], len(hidden))
            self.now += 7  # a library's, for good
            return logits(hidden)

        monkeypatch.setattr(device, "forward", counted_forward)
        monkeypatch.setattr(device, "logits", counted_logits)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: setattr(self, "peak", self.now))
        monkeypatch.setattr(
            "octavo.actors.executor.device.memory_now",
            lambda _: ExecutorMemory(free=100 * GIB, total=140 * GIB, allocated=self.now, reserved=self.now),
        )


def test_the_largest_step_and_the_largest_graph_are_measured_each_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path)
    config = ExecutorConfig(
        **{"model_path": str(tmp_path), "dtype": "float32", "num_blocks": 8, "device": "cpu", "num_threads": 1},
        **{"max_num_seqs": 4, "max_num_batched_tokens": 300, "cuda_graph_sizes": (1, 4), "cuda_graph_tokens": (32,)},
    )
    device = Device(config)
    counted = CountedMemory(monkeypatch, device)
    before = ExecutorMemory(free=100 * GIB, total=140 * GIB, allocated=0, reserved=0)
    measured = device._share_out(config, before).measured
    assert counted.steps == [(300, 4), (4 + 32, 4 + MOST_CHUNKS)]
    samples = 4 + MOST_CHUNKS
    taken = 36 + 1000 * samples + samples * sampler_bytes(device.model.vocab_size)
    assert measured.graphs == graph_reserve(3, largest_bytes=taken, workspace_bytes=14)
    assert device._kv_caches == []
    counted.steps.clear()
    monkeypatch.setattr(device.model, "fits_graphs", False, raising=False)
    assert device._share_out(config, before).measured.graphs == 0
    assert counted.steps == [(300, 4)]
