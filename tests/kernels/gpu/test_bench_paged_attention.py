"""What the benchmark of paged attention counts, and that what it times is attention."""

from __future__ import annotations

import random

import pytest
import torch

from octavo.kernels.gpu import bench_paged_attention as bench
from octavo.kernels.gpu import paged_attention as paged_attention_module
from octavo.kernels.gpu.bench_paged_attention import Shape, decode, make_layers, offline_mix, relative_error, shapes
from octavo.kernels.gpu.device_time import Timed
from octavo.kernels.gpu.paged_attention import paged_attention
from octavo.kernels.paged_attention import paged_attention_ref


def test_bytes_are_those_of_keys_and_values() -> None:
    assert decode("", 64, 1024).num_bytes == 64 * 1024 * 8 * 128 * 2 * 2
    assert decode("", 64, 1024, cache_dtype=torch.float8_e4m3fn).num_bytes == 64 * 1024 * 8 * 132 * 2


def test_operations_are_those_of_visible_pairs() -> None:
    assert Shape("", (3,), (5,)).num_operations == 4 * (3 + 4 + 5) * 32 * 128


def test_the_offline_mix_is_ragged_and_half_through() -> None:
    lens = offline_mix("").context_lens
    assert 100 < len(lens) < 160
    assert min(lens) >= 612
    assert max(lens) <= 1536
    random.seed(0)  # as the workload's script draws them: a prompt's length, then its ids
    prompts = [[random.randint(0, 10_000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    assert lens == tuple(len(ids) + 512 for ids, output in zip(prompts, outputs, strict=True) if output > 512)


def test_every_goal_has_its_shapes() -> None:
    assert {shape.name for shape in shapes()} == {"K1", "K2", "K3", "K4", "K5"}


@pytest.mark.parametrize("shape", [decode("", 2, 20, num_heads=2, num_kv_heads=1, head_dim=16)])
def test_what_is_timed_is_attention(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_module, "num_processors", lambda _device: 1)
    layers = make_layers(shape, torch.device("cpu"), num_layers=2)
    for k, v in layers.caches:
        exact = paged_attention_ref(layers.q, k, v, layers.batch, layers.kind)
        out = paged_attention(layers.q, k, v, layers.batch, layers.kind)
        torch.testing.assert_close(out, exact, atol=2e-5, rtol=2e-5)
    first = paged_attention(layers.q, *layers.caches[0], layers.batch, layers.kind)
    assert relative_error(layers, first) < 1e-5
    assert relative_error(layers, 2 * first) > 0.9


def test_every_shape_is_a_case_and_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [decode("K1", 2, 20, num_heads=2, num_kv_heads=1, head_dim=16), Shape("K4", (5,), (5,), 2, 1, 16)]
    monkeypatch.setattr(bench, "shapes", lambda: few)
    monkeypatch.setattr(bench, "_L2_BYTES", 1)
    monkeypatch.setattr(paged_attention_module, "num_processors", lambda _device: 1)
    monkeypatch.setattr(bench, "device_time", lambda *calls: Timed(2.0))
    found = list(bench.rows(torch.device("cpu"), peers=()))
    assert [(row["name"], row["implementation"]) for row in found] == [
        *((name, engine) for name in ("K1", "K4") for engine in ("octavo", "octavo, batch-invariant"))
    ]
    assert found[0]["gbytes_per_s"] > 0 and found[2]["tflop_per_s"] > 0
    right = bench.paged_attention
    monkeypatch.setattr(bench, "paged_attention", lambda *given, **options: right(*given, **options) * 2)
    wrong = list(bench.rows(torch.device("cpu"), peers=(), first_case=1))
    assert [row["name"] for row in wrong] == ["K4"]
    assert wrong[0]["failed"].startswith("WRONG: off by 1.0e+00") and "us" not in wrong[0]
