"""What ranks read of a checkpoint, put together, is the checkpoint; no process is needed to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import Format, write_both
from tiny_gguf import convert_checkpoint
from tiny_models import save_tiny_model
from unconnected_ranks import floats, member

from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.models.errors import UnsupportedModelError
from octavo.models.parallel import ParallelGroup
from octavo.models.quantization.partition import part_of
from octavo.models.registry import load_model

WIDE = {"head_dim": 32, "intermediate_size": 256}
Q_WIDTH, KV_WIDTH = 128, 64


def load(path: Path, group: ParallelGroup | None = None, quantization: Any = "auto") -> Any:
    return load_model(path, dtype="float32", model_impl="native", quantization=quantization, group=group)


def write(kind: str, folder: Path) -> tuple[Path, str]:
    """A checkpoint of a kind, and the quantisation to ask for."""
    plain = folder / "plain"
    save_tiny_model("llama", plain, seed=1, tie_word_embeddings=kind.endswith("tied"), **WIDE)
    kind = kind.removesuffix("-tied")
    if kind in ("int8", "int4"):
        return plain, kind
    if kind.startswith("Q"):
        return convert_checkpoint(plain, folder / "m.gguf", kind=kind, tokenizer={}), "auto"
    formats = {
        "gptq": Format("gptq"),
        "awq": Format("awq"),
        "channel": Format("compressed-tensors", group_size=-1, symmetric=True),
    }
    if kind not in formats:
        return plain, "auto"
    write_both(plain, folder / "quantized", folder / "floating", formats[kind])
    return folder / "quantized", "auto"


KINDS = ("float", "float-tied", "int8", "int8-tied", "int4", "gptq", "awq", "channel", "Q8_0", "Q8_0-tied")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", [2, 4])
def test_the_ranks_parts_are_the_whole_to_the_last_bit(kind: str, tp: int, tmp_path: Path) -> None:
    path, quantization = write(kind, tmp_path)
    if quantization == "int8" and tp == 4:
        with pytest.raises(UnsupportedModelError, match=r"groups of 64 quantised weights; .* among 1, 2 ranks"):
            load(path, member(0, tp), quantization)
        return
    whole = load(path, quantization=quantization)
    ranks = [load(path, member(rank, tp), quantization) for rank in range(tp)]

    def together(of_rank: list[torch.Tensor], axis: int = 0) -> torch.Tensor:
        return torch.cat(of_rank, axis)

    for index, layer in enumerate(whole.layers):
        layers = [rank.layers[index] for rank in ranks]
        q, k, v = floats(layer.attention.qkv).split((Q_WIDTH, KV_WIDTH, KV_WIDTH))
        parts = [floats(one.attention.qkv).split(one.attention.widths) for one in layers]
        assert torch.equal(together([part[0] for part in parts]), q)
        copies = max(1, tp // 2)  # of each of the two KV heads
        assert torch.equal(together([part[1] for part in parts[::copies]]), k)
        assert torch.equal(together([part[2] for part in parts[::copies]]), v)
        assert torch.equal(together([floats(one.attention.o) for one in layers], 1), floats(layer.attention.o))
        gate, up = floats(layer.mlp.gate_up).chunk(2)
        halves = [floats(one.mlp.gate_up).chunk(2) for one in layers]
        assert torch.equal(together([half[0] for half in halves]), gate)
        assert torch.equal(together([half[1] for half in halves]), up)
        assert torch.equal(together([floats(one.mlp.down) for one in layers], 1), floats(layer.mlp.down))
    for name in ("embedding", "head"):
        parts = [floats(getattr(rank.vocabulary, name)) for rank in ranks]
        assert torch.equal(together(parts), floats(getattr(whole.vocabulary, name)))
    assert {rank.kv_cache_specs[0].num_kv_heads for rank in ranks} == {1}


@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_their_layers_and_the_ends_that_they_need(tied: bool, tmp_path: Path) -> None:
    save_tiny_model("gemma2", tmp_path, tie_word_embeddings=tied)  # of four layers
    whole = load(tmp_path)
    stages = [load(tmp_path, member(rank, 1, 3)) for rank in range(3)]
    assert [len(stage.layers) for stage in stages] == [1, 1, 2]
    assert [len(stage.kv_cache_specs) for stage in stages] == [1, 1, 2]
    held = [layer for stage in stages for layer in stage.layers]
    windows = [[layer.attention.kind.sliding_window for layer in layers] for layers in (held, whole.layers)]
    assert windows[0] == windows[1]
    for one, other in zip(held, whole.layers, strict=True):
        assert torch.equal(floats(one.attention.qkv), floats(other.attention.qkv))
    assert [stage.vocabulary.embedding is not None for stage in stages] == [True, False, False]
    assert [stage.vocabulary.head is not None for stage in stages] == [False, False, True]
    assert torch.equal(stages[-1].vocabulary.head, whole.vocabulary.head)


def test_experts_are_divided_whole_or_each_in_parts(tmp_path: Path) -> None:
    save_tiny_model("mixtral", tmp_path)
    by_expert = [load(tmp_path, member(rank, 2, expert_parallel=True)).layers[0].mlp for rank in range(2)]
    assert [list(mlp.experts) for mlp in by_expert] == [[0, 1], [2, 3]]
    assert by_expert[0].experts[0].down.shape == (64, 128)
    in_parts = load(tmp_path, member(1, 2)).layers[0].mlp
    assert list(in_parts.experts) == [0, 1, 2, 3] and in_parts.experts[0].down.shape == (64, 64)


def test_inputs_sorted_by_importance_cannot_be_divided(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "plain", seed=1, **WIDE)
    write_both(tmp_path / "plain", tmp_path / "q", tmp_path / "f", Format("gptq", desc_act=True))
    with pytest.raises(UnsupportedModelError, match=r"o_proj .* cannot be divided among ranks: .*desc_act"):
        load(tmp_path / "q", member(0, 2))


def test_groups_are_not_torn_apart() -> None:
    weight = QuantizedWeight.from_codes(torch.zeros(4, 100, dtype=torch.int8), torch.ones(4, 2), bits=8, group_size=64)
    assert part_of(weight) is weight
    assert part_of(weight, columns=slice(64, 100)).shape == (4, 36)
    assert part_of(weight, rows=slice(1, 3)).shape == (2, 100)
    for columns in (slice(0, 50), slice(50, 100)):
        with pytest.raises(ValueError, match="tear groups of 64 weights apart"):
            part_of(weight, columns=columns)
