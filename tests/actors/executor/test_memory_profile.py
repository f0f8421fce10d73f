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
from octavo.actors.executor.gpu_memory import share_out
from octavo.actors.executor.memory_profile import ExecutorMemory, largest_step, measured_memory, small_caches
from octavo.kernels.logit_processing import memory_bytes
from octavo.messages.errors import InvalidConfigError


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


def test_readings_add_up_to_what_is_gone() -> None:
    gib = 1024**3
    model: Any = SimpleNamespace(vocab_size=1000, dtype=torch.bfloat16)
    config = ExecutorConfig(model_path="unused", max_num_seqs=10, max_num_batched_tokens=100)
    before = ExecutorMemory(free=138 * gib, total=140 * gib, allocated=0, reserved=0)
    loaded = ExecutorMemory(free=122 * gib, total=140 * gib, allocated=15 * gib, reserved=16 * gib)
    after = ExecutorMemory(free=121 * gib, total=140 * gib, allocated=15 * gib, reserved=16 * gib)
    measured = measured_memory(
        config,
        model=model,
        before=before,
        loaded=loaded,
        after=after,
        peak=18 * gib,
        cache_bytes=gib,
        num_tokens=100,
        max_model_len=64,
    )
    assert measured.foreign == 2 * gib
    assert measured.weights == 15 * gib
    assert measured.activations == 2 * gib
    assert measured.runtime == gib
    assert measured.state >= memory_bytes(10 * (config.pipeline_depth + 1), 1000) > 4 * 64 * 1000
    assert measured.graphs == 0
    assert share_out(measured, memory_utilization=0.9).kv_bytes == 126 * gib - 20 * gib - measured.state


def test_a_gpu_that_is_not_there_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    assert resolve_device("cpu", 1).type == "cpu"
    with pytest.raises(InvalidConfigError, match="--device cpu") as caught:
        resolve_device("cuda", 1)
    assert caught.value.field == "device"


def test_a_graph_keeps_logits_in_both_widths_what_is_chosen_from_them_with_and_the_states_of_chunks() -> None:
    pytest.importorskip("triton")
    from octavo.kernels.gpu.attention_config import MAX_CHUNK_BYTES
    from octavo.kernels.gpu.sampling import CAPACITY

    memory = ExecutorMemory(free=10, total=10, allocated=0, reserved=0)

    def graphs(vocab_size: int, **fields: Any) -> int:
        return measured_memory(
            ExecutorConfig(model_path="unused", max_num_seqs=10, cuda_graph_sizes=(10,), **fields),
            model=SimpleNamespace(vocab_size=vocab_size, dtype=torch.bfloat16),  # type: ignore[arg-type]
            **dict.fromkeys(("before", "loaded", "after"), memory),
            peak=0,
            cache_bytes=0,
            num_tokens=100,
            max_model_len=64,
        ).graphs

    assert graphs(160_000) - graphs(80_000) >= 10 * 80_000 * (4 + 2)
    assert graphs(160_000) >= 10 * (160_000 * (4 + 2) + CAPACITY * (4 + 4))
    assert graphs(1000, deterministic=True) - graphs(1000) == MAX_CHUNK_BYTES
