from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import save_tiny_model

from octavo.gateway import ceilings as module
from octavo.gateway.ceilings import Ceilings, ModelTraffic, measure_ceilings, model_traffic

LIMITS = Ceilings(
    num_threads=1, read_gb_per_s=10.0, read_one_stream_gb_per_s=8.0, f32_tflop_per_s=0.05, bf16_tflop_per_s=0.02
)


def test_every_figure_is_measured_and_torchs_threads_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PRODUCT", (32, 64, 64))
    before = torch.get_num_threads()
    found = measure_ceilings(before + 1, num_bytes=1 << 20, repeats=2)
    assert torch.get_num_threads() == before and found.num_threads == before + 1
    assert found.read_gb_per_s >= found.read_one_stream_gb_per_s > 0
    assert found.f32_tflop_per_s > 0 and found.bf16_tflop_per_s > 0


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_all_weights_but_an_embedding_that_is_only_looked_up(tied: bool, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path, tie_word_embeddings=tied)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    layers = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name)
    traffic = model_traffic(tmp_path, itemsize=2, kv_bytes_per_token=128)
    assert traffic is not None
    assert traffic.weight_bytes == 2 * (total if tied else total - embedding)
    assert traffic.layer_weights == layers


def test_packed_codes_count_as_they_are_stored(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": torch.zeros((4, 8), dtype=torch.int32),
        "model.layers.0.mlp.up_proj.scales": torch.zeros((1, 8), dtype=torch.float16),
        "model.layers.0.mlp.down_proj.weight": torch.zeros((8, 4)).to(torch.float8_e4m3fn),
        "lm_head.weight": torch.zeros((3, 5), dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    traffic = model_traffic(tmp_path, itemsize=2, kv_bytes_per_token=1)
    assert traffic is not None
    assert traffic.weight_bytes == 4 * 8 * 4 + 8 * 2 + 2 * 8 * 4 + 3 * 5  # fp8 is widened on a CPU


def test_quantising_at_load_leaves_less_to_read() -> None:
    floating = ModelTraffic(weight_bytes=2 * (1000 + 200), layer_weights=1000, kv_bytes_per_token=3)
    quantized = floating.quantized(4.5, 8.25, itemsize=2)
    assert quantized.weight_bytes == pytest.approx(1000 * 4.5 / 8 + 200 * 8.25 / 8)
    assert (quantized.layer_weights, quantized.kv_bytes_per_token) == (1000, 3)


def test_without_safetensors_there_is_no_ceiling(tmp_path: Path) -> None:
    assert model_traffic(tmp_path, itemsize=2, kv_bytes_per_token=1) is None


def test_decoding_is_bound_by_weights_once_and_kv_for_each_request_and_prefill_by_products() -> None:
    traffic = ModelTraffic(weight_bytes=1e9, layer_weights=5e8, kv_bytes_per_token=1e5)
    assert traffic.decode_ceiling(LIMITS, 1, 0) == pytest.approx(10)
    assert traffic.decode_ceiling(LIMITS, 10, 1000) == pytest.approx(10 * 10e9 / (1e9 + 10 * 1000 * 1e5))
    assert traffic.prefill_ceiling(LIMITS) == pytest.approx(0.05e12 / 1e9)
