"""Matrices as oneDNN packs them: in float32 by oneDNN itself, which does that everywhere, in bfloat16 by a stand-in."""

from __future__ import annotations

import logging

import pytest
import torch
from c_library import needs_c
from packed_in_torch import PanelsInTorch

from octavo.kernels import linear_packed as module
from octavo.kernels.linear_dense import linear_dense_ref
from octavo.kernels.linear_packed import FEW_ROWS, OneDNN, PackedWeight, Packer, linear_packed

pytestmark = needs_c

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_BYTES", 0)


def randn(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(weight: torch.Tensor, panel: int = 64) -> PackedWeight:
    made = Packer(PanelsInTorch(panel)).pack(weight)
    assert made is not None
    assert made.panel == panel
    return made


def by_onednn(weight: torch.Tensor) -> PackedWeight:
    made = Packer().pack(weight)
    if made is None:
        pytest.skip("oneDNN packs otherwise on this processor")
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel", [16, 32, 48, 64])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (1024, 100), (130, 7), (48, 200)])
def test_few_rows_are_as_exact_as_torchs_and_each_has_bits_of_its_own(
    in_features: int, out_features: int, panel: int, dtype: torch.dtype
) -> None:
    x = randn(FEW_ROWS, in_features, seed=1, dtype=dtype)
    weight = randn(out_features, in_features, seed=2, dtype=dtype)
    exact = linear_dense_ref(x.double(), weight.double())
    theirs = linear_dense_ref(x, weight)
    held = packed(weight, panel)
    ours = linear_packed(x, held)
    assert ours.dtype is dtype
    if dtype is torch.bfloat16:
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    else:  # products are added one after the other
        magnitude = x.double().abs() @ weight.double().abs().T
        assert ((ours - exact).abs() <= 2**-24 * in_features * magnitude).all()
        assert (ours - exact).square().mean().sqrt() <= 2**-24 * in_features**0.5 * magnitude.square().mean().sqrt()
    for count in range(1, FEW_ROWS + 1):
        assert torch.equal(linear_packed(x[-count:], held), ours[-count:])
    assert linear_packed(x[:0], held).shape == (0, out_features)


def test_threads_change_no_bit() -> None:
    held = packed(randn(1000, 520, seed=3, dtype=torch.bfloat16))
    x = randn(3, 520, seed=4, dtype=torch.bfloat16)
    ours, before = linear_packed(x, held), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear_packed(x, held), ours)
    finally:
        torch.set_num_threads(before)


def test_a_nan_stays_in_its_row() -> None:
    weight, x = randn(70, 128, seed=5, dtype=torch.bfloat16), randn(4, 128, seed=6, dtype=torch.bfloat16)
    held = packed(weight)
    clean = linear_packed(x, held)
    x[2, 100] = float("nan")
    dirty = linear_packed(x, held)
    assert dirty[2].isnan().all()
    assert torch.equal(dirty[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("shape", [(128, 64), (1000, 1024), (70, 96)])
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 16, 100, 513])
def test_what_onednn_packs_multiplies_any_number_of_rows(num_tokens: int, shape: tuple[int, int]) -> None:
    weight, x = randn(*shape, seed=7, dtype=torch.float32), randn(num_tokens, shape[1], seed=8, dtype=torch.float32)
    with torch.inference_mode():
        held = by_onednn(weight)
        ours = linear_packed(x, held)
    assert torch.equal(held.dequantize(), weight)
    assert held.shape == shape
    exact = linear_dense_ref(x.double(), weight.double())
    assert ((ours - exact).abs() <= 2**-24 * shape[1] * (x.double().abs() @ weight.double().abs().T)).all()


def test_only_more_than_a_few_rows_are_the_librarys() -> None:
    library = PanelsInTorch()
    held = Packer(library).pack(randn(128, 64, seed=9, dtype=torch.bfloat16))
    assert held is not None
    before = library.num_products
    linear_packed(randn(FEW_ROWS, 64, seed=10, dtype=torch.bfloat16), held)
    assert library.num_products == before
    x = randn(FEW_ROWS + 1, 64, seed=10, dtype=torch.bfloat16)
    assert torch.equal(linear_packed(x, held), library.multiply(x, held.packed))
    assert library.num_products == before + 2


def test_a_large_matrix_is_the_same_on_huge_pages() -> None:
    weight = randn(2048, 1024, seed=11, dtype=torch.float32)  # 8 MB: some of it fills whole ones
    assert torch.equal(by_onednn(weight).dequantize(), weight)


class PlainInTorch(PanelsInTorch):
    """Lays nothing out."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()


@pytest.mark.parametrize(
    ("library", "says"),
    [
        (PanelsInTorch(refuses=RuntimeError("needs another processor\nstack")), "needs another processor'"),
        (PanelsInTorch(refuses=AttributeError("no such operator")), "no such operator"),
        (PanelsInTorch(is_wrong=True), "products with the packed matrix are wrong"),
        (PanelsInTorch(panel=8), "a layout that is not known here"),
        (PlainInTorch(), "a layout that is not known here"),
    ],
)
def test_where_the_library_does_not_do_what_is_needed_matrices_stay_and_the_log_says_so_once(
    library: PanelsInTorch, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    packer = Packer(library)
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            assert packer.pack(randn(128, 64, seed=seed, dtype=torch.bfloat16)) is None
    assert len(caplog.messages) == 1
    assert says in caplog.messages[0]


def test_a_matrix_that_would_lie_alike_in_any_layout_tells_nothing() -> None:
    assert Packer(PanelsInTorch()).pack(torch.zeros(128, 64).bfloat16()) is None


def test_other_shapes_are_looked_at_for_themselves() -> None:
    packer = Packer(PanelsInTorch())
    assert packer.pack(torch.zeros(128, 64).bfloat16()) is None
    assert packer.pack(randn(64, 128, seed=12, dtype=torch.bfloat16)) is not None


def test_small_matrices_and_those_without_pairs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Packer(PanelsInTorch())
    assert packer.pack(randn(128, 65, seed=13, dtype=torch.bfloat16)) is None
    assert packer.pack(randn(128, 64, seed=13, dtype=torch.float16)) is None
    monkeypatch.setattr(module, "_LEAST_BYTES", 128 * 64 * 2 + 1)
    assert packer.pack(randn(128, 64, seed=13, dtype=torch.bfloat16)) is None


def test_without_the_c_library_they_stay_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernels", lambda: None)
    assert Packer(PanelsInTorch()).pack(randn(128, 64, seed=14, dtype=torch.bfloat16)) is None


def test_inputs_that_do_not_fit_are_refused() -> None:
    held = packed(randn(128, 64, seed=15, dtype=torch.bfloat16))
    for x in (torch.zeros(2, 63).bfloat16(), torch.zeros(64).bfloat16(), torch.zeros(2, 64)):
        with pytest.raises(ValueError, match="the weight takes"):
            linear_packed(x, held)


def test_onednn_either_packs_bfloat16_in_panels_or_says_why_not(caplog: pytest.LogCaptureFixture) -> None:
    weight = randn(256, 128, seed=16, dtype=torch.bfloat16)
    held = Packer(OneDNN()).pack(weight)
    if held is None:
        assert len(caplog.messages) == 1
    else:
        assert torch.equal(held.dequantize(), weight)
