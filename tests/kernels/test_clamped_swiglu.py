from __future__ import annotations

import pytest
import torch

from octavo.kernels import clamped_swiglu
from octavo.kernels.clamped_swiglu import ClampedSwiGLU, clamped_swiglu_ref


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (7, 10), (33, 1000)])
def test_it_is_as_exact_as_torch_and_batch_invariant(shape: tuple[int, int], dtype: torch.dtype) -> None:
    act = ClampedSwiGLU(alpha=1.3, limit=3.0)
    x = (4 * torch.randn(shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(3))).to(dtype)
    exact = clamped_swiglu_ref(x.double(), act.alpha, act.limit)
    ours, theirs = act(x), clamped_swiglu_ref(x, act.alpha, act.limit)
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert torch.equal(act(x[-1:]), ours[-1:])


def test_it_is_what_transformers_computes() -> None:
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(num_local_experts=1, hidden_size=8, intermediate_size=8, swiglu_limit=2.0)
    gate, up = 4 * torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1))
    theirs = GptOssExperts(config)._apply_gate(torch.stack((gate, up), dim=-1).flatten(-2))
    ours = ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit)(torch.cat((gate, up), dim=-1))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_ends_of_the_range_saturate_and_nan_stays() -> None:
    gate = torch.tensor([-1e4, -100.0, -1e-30, 0.0, 6.9, 7.0, 7.1, 1e4])
    x = torch.cat((gate, gate.flip(0)))[None]
    torch.testing.assert_close(ClampedSwiGLU()(x), clamped_swiglu_ref(x, 1.702, 7.0), rtol=1e-6, atol=1e-30)
    assert ClampedSwiGLU()(torch.tensor([[float("nan"), 1.0, 1.0, float("nan")]])).isnan().all()


def test_without_the_c_library_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clamped_swiglu, "_kernels", lambda: None)
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ClampedSwiGLU()(x), clamped_swiglu_ref(x, 1.702, 7.0))
