"""Which kernel multiplies what, by the processor, the kind of a weight and the number of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from c_library import needs_c
from packed_in_torch import PanelsInTorch
from paged_runner import PagedRunner
from tiny_models import random_token_ids, save_tiny_model

from octavo.kernels import linear_packed
from octavo.kernels.linear_dense import linear_dense_quick
from octavo.kernels.linear_deterministic import linear_deterministic
from octavo.kernels.linear_rounded import RoundedWeight
from octavo.kernels.weight_quantization import quantize
from octavo.models import layers
from octavo.models.layers import Linear, WeightKind, linear_for, weight_kinds
from octavo.models.registry import load_model

CPU = torch.device("cpu")
DENSE, OTHER, PACKED, QUANTIZED = WeightKind.DENSE, WeightKind.OTHER_DTYPE, WeightKind.PACKED, WeightKind.QUANTIZED
ROUNDED = WeightKind.ROUNDED


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """One that multiplies the dtypes of the test's parameter, and has AVX-512."""
    monkeypatch.setattr(layers, "cpu_multiplies_in", lambda dtype: dtype in request.param)
    monkeypatch.setattr(layers, "_torch_has_avx512", lambda: True)
    monkeypatch.setattr(layers, "_has_tiles", lambda: True)


@pytest.mark.parametrize("processor", [[torch.float32, torch.bfloat16]], indirect=True)
def test_a_processor_with_tiles_of_bfloat16_packs_that_and_widens_to_it(processor: None) -> None:
    linear = linear_for(torch.bfloat16, CPU)
    assert linear.dense is F.linear
    assert linear.packs
    assert linear.widens_from > 1
    assert not linear_for(torch.float32, CPU).packs
    assert not linear_for(torch.float32, CPU).widens_from, "its numbers have more bits than it would be rounded to"
    assert linear_for(torch.float16, CPU) == Linear(linear_dense_quick, quick=True)


@pytest.mark.parametrize("processor", [[torch.float32, torch.bfloat16]], indirect=True)
@pytest.mark.parametrize("in_whole_numbers", [True, False])
def test_bfloat16_without_tiles_is_multiplied_in_whole_numbers_if_the_processor_can(
    processor: None, in_whole_numbers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_has_tiles", lambda: False)
    monkeypatch.setattr(layers, "multiplies_whole_numbers", lambda: in_whole_numbers)
    linear = linear_for(torch.bfloat16, CPU)
    assert (linear == Linear(linear_dense_quick, quick=True)) == in_whole_numbers
    assert linear.packs == (not in_whole_numbers)
    assert linear_for(torch.float32, CPU).dense is F.linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_such_instructions_all_is_as_it_was(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "cpu_multiplies_in", lambda _: dtype is torch.float32)
    monkeypatch.setattr(layers, "_torch_has_avx512", lambda: False)
    monkeypatch.setattr(layers, "_has_tiles", lambda: False)
    assert linear_for(dtype, CPU) == Linear(linear_dense_quick, quick=True)


FAST = Linear(F.linear, quick=True, few_rows=4, widens_from=32, packs=True)


@pytest.mark.parametrize(
    ("linear", "num_rows", "in_c"),
    [
        (FAST, 1, {DENSE, OTHER, PACKED, QUANTIZED, ROUNDED}),
        (FAST, 4, {DENSE, OTHER, PACKED, QUANTIZED, ROUNDED}),
        (FAST, 5, {OTHER, QUANTIZED, ROUNDED}),
        (FAST, 31, {OTHER, QUANTIZED, ROUNDED}),
        (FAST, 32, {OTHER, ROUNDED}),
        (Linear(linear_dense_quick, quick=True), 500, {DENSE, OTHER, QUANTIZED, ROUNDED}),
        (Linear(linear_deterministic), 500, {DENSE, OTHER, QUANTIZED, ROUNDED}),
        (Linear(F.linear), 1, {QUANTIZED, ROUNDED}),
    ],
)
def test_rows_and_kinds_of_weights_decide_whether_a_step_is_in_c(
    linear: Linear, num_rows: int, in_c: set[WeightKind]
) -> None:
    for kind in WeightKind:
        assert linear.is_in_c(num_rows, [kind]) == (kind in in_c)
    assert linear.is_in_c(num_rows, in_c)
    assert linear.is_in_c(num_rows, WeightKind) == (in_c == set(WeightKind))


@needs_c
def test_kinds_are_told_apart_and_parts_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_packed, "_LEAST_BYTES", 0)
    dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    quantized = quantize(dense, bits=8, group_size=32)
    packed = linear_packed.Packer(PanelsInTorch()).pack(dense)
    assert packed is not None
    assert weight_kinds([dense], torch.bfloat16) == {DENSE}
    assert weight_kinds([dense, packed], torch.float32) == {OTHER, PACKED}
    rounded = RoundedWeight(torch.zeros(16 * 65, dtype=torch.int16), (16, 64))
    assert weight_kinds([dense, rounded], torch.bfloat16) == {DENSE, ROUNDED}
    assert weight_kinds([(dense, quantized)], torch.bfloat16) == {DENSE, QUANTIZED}
    assert weight_kinds([], torch.bfloat16) == set()


@needs_c
@pytest.mark.parametrize("processor", [[torch.float32]], indirect=True)
def test_weights_of_16_bits_beneath_float32_stay_one_call_for_any_number_of_rows(
    processor: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("qwen3", tmp_path).bfloat16().save_pretrained(tmp_path)
    model: Any = load_model(tmp_path, dtype="float32")
    assert model.layers[0].attention.qkv.dtype is torch.bfloat16
    rows: list[int] = []
    run = model.stack.run
    monkeypatch.setattr(model.stack, "run", lambda x, *others: rows.append(len(x)) or run(x, *others))
    prompt = random_token_ids(40, seed=1)
    in_one_call = PagedRunner(model).step({0: prompt})[0]
    assert rows == [40]
    model.stack = None
    assert torch.equal(PagedRunner(model).step({0: prompt})[0], in_one_call)
