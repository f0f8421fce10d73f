"""MXFP4 against the decoding in `transformers`."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from octavo.models.errors import QuantizedModelError
from octavo.models.quantization.mxfp4 import dequantize
from octavo.models.registry import load_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_code_at_every_exponent_is_what_transformers_decodes(dtype: torch.dtype) -> None:
    exponents = torch.arange(0, 252, dtype=torch.uint8)  # 6 times the next power of two is infinite
    codes = torch.arange(16, dtype=torch.uint8)
    pairs = (codes[:, None] | codes[None, :] << 4).flatten().view(1, 1, 16, 16)
    blocks = pairs.expand(1, len(exponents), 16, 16).contiguous()
    scales = exponents.view(1, -1, 1).expand(1, len(exponents), 16).contiguous()
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    ours = dequantize(blocks, scales).to(dtype)
    assert ours.shape == (1, len(exponents), 512)
    assert torch.equal(ours.transpose(1, 2), theirs)
    assert torch.equal(ours.signbit().transpose(1, 2), theirs.signbit())


def test_the_values_are_those_of_the_specification() -> None:
    blocks = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2], dtype=torch.uint8)
    weights = dequantize(blocks, torch.tensor([128], dtype=torch.uint8))
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert weights.tolist() == [[2 * value for value in [*positive, *(-value for value in positive)]] * 2][0]


def test_an_exponent_of_all_ones_is_no_number() -> None:
    blocks = torch.zeros(2, 16, dtype=torch.uint8)
    weights = dequantize(blocks, torch.tensor([255, 127], dtype=torch.uint8))
    assert weights[:32].isnan().all() and not weights[32:].isnan().any()


def test_other_families_are_not_read_from_it(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(
        QuantizedModelError, match=r"quantised \(mxfp4\), which is not supported; .* \(GPT-OSS's expert"
    ):
        load_model(tmp_path)
