from __future__ import annotations

import pytest
import torch
from c_library import needs_c

from octavo.kernels import rotary
from octavo.kernels.rotary import rotary_and_write, rotary_and_write_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cos_sin_table(max_position: int, rotary_dim: int) -> torch.Tensor:
    angles = torch.arange(max_position)[:, None] * 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def inputs(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of 6 tokens as views of one fused projection, 4 heads and 2 KV heads."""
    fused = torch.randn(6, 8 * head_dim, generator=torch.Generator().manual_seed(4)).to(dtype)
    q, k, v = fused.split([4 * head_dim, 2 * head_dim, 2 * head_dim], dim=-1)
    return q.view(6, 4, head_dim), k.view(6, 2, head_dim), v.view(6, 2, head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (24, 24), (80, 32), (10, 6), (128, 128)])
def test_it_is_as_exact_as_torch_and_writes_what_it_computed(
    head_dim: int, rotary_dim: int, norm: bool, dtype: torch.dtype
) -> None:
    table, positions = cos_sin_table(50, rotary_dim), torch.tensor([0, 3, 49, 7, 7, 20])
    weights = {
        name: (1 + 0.1 * torch.randn(head_dim, generator=torch.Generator().manual_seed(i))).to(dtype)
        for i, name in enumerate(("q_weight", "k_weight"))
    }
    weights = weights if norm else {}
    slots = torch.tensor([4, -1, 11, 0, 5, 6])
    results = []
    for op, run_dtype in (
        (rotary_and_write, dtype),
        (rotary_and_write_ref, dtype),
        (rotary_and_write_ref, torch.float64),
    ):
        q, k, v = (x.clone() if run_dtype == torch.float64 else x for x in inputs(head_dim, dtype))
        q, k, v = q.to(run_dtype), k.to(run_dtype), v.to(run_dtype)
        caches = torch.zeros(2, 3, 2, 4, head_dim, dtype=run_dtype)
        op(q, k, v, table, positions, caches[0], caches[1], slots, **{n: w.to(run_dtype) for n, w in weights.items()})
        results.append((q, k, caches))
    for ours, theirs, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    _, k, caches = results[0]
    v = inputs(head_dim, dtype)[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(caches[0, slot // 4, :, slot % 4], k[token])
            assert torch.equal(caches[1, slot // 4, :, slot % 4], v[token])
    assert int((caches[0].abs().sum(dim=(1, 3)) > 0).sum()) == 5  # slots written, of twelve


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_equals_that_token_in_a_batch(dtype: torch.dtype) -> None:
    table, positions = cos_sin_table(50, 64), torch.tensor([0, 3, 49, 7, 7, 20])
    q, k, v = inputs(64, dtype)
    rotary_and_write(q, k, v, table, positions, None, None, None)
    q1, k1, v1 = (x[4:5] for x in inputs(64, dtype))
    rotary_and_write(q1, k1, v1, table, positions[4:5], None, None, None)
    assert torch.equal(q1, q[4:5])
    assert torch.equal(k1, k[4:5])


def test_without_the_c_library_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    table, positions = cos_sin_table(50, 64), torch.arange(6)
    monkeypatch.setattr(rotary, "_kernels", lambda: None)
    q, k, v = inputs(64, torch.float32)
    rotary_and_write(q, k, v, table, positions, None, None, None)
    q2, k2, v2 = inputs(64, torch.float32)
    rotary_and_write_ref(q2, k2, v2, table, positions, None, None, None)
    assert torch.equal(q, q2)
    assert torch.equal(k, k2)


@needs_c
def test_a_position_outside_the_table_is_refused_and_nothing_written() -> None:
    q, k, v = inputs(64, torch.float32)
    with pytest.raises(IndexError, match="max_model_len"):
        rotary_and_write(q, k, v, cos_sin_table(5, 64), torch.arange(6), None, None, None)
    assert torch.equal(q, inputs(64, torch.float32)[0])


def test_half_a_cache_is_refused() -> None:
    q, k, v = inputs(64, torch.float32)
    with pytest.raises(ValueError, match="belong together"):
        rotary_and_write(q, k, v, cos_sin_table(9, 64), torch.arange(6), torch.zeros(1, 2, 8, 64), None, None)
