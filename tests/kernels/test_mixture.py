"""What routing and mixing mean, against `transformers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from octavo.kernels.clamped_swiglu import ClampedSwiGLU
from octavo.kernels.expert_stack import ExpertStack
from octavo.kernels.gated_activation import silu_and_mul
from octavo.kernels.mixture import mixture, route

HIDDEN, INNER, EXPERTS, CHOSEN = 24, 20, 6, 3


def randomised(block: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return block.eval()


def tokens(num_tokens: int = 11) -> torch.Tensor:
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(2))


def gpt_oss() -> tuple[Any, ExpertStack]:
    config = AutoConfig.for_model(
        "gpt_oss",
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        swiglu_limit=0.7,
    )
    block = randomised(GptOssMLP(config))
    experts = block.experts
    gate_up, bias = experts.gate_up_proj.detach().transpose(1, 2), experts.gate_up_proj_bias.detach()
    return block, ExpertStack(
        w13=torch.cat((gate_up[:, 0::2], gate_up[:, 1::2]), dim=1),
        w2=experts.down_proj.detach().transpose(1, 2).contiguous(),
        b13=torch.cat((bias[:, 0::2], bias[:, 1::2]), dim=1),
        b2=experts.down_proj_bias.detach(),
        first=0,
        act=ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit),
    )


@torch.inference_mode()
def test_gpt_oss_s_mixture_is_a_softmax_over_the_chosen_and_a_sum_of_experts_with_biases() -> None:
    block, stack = gpt_oss()
    x = tokens()
    logits, _, expected_chosen = block.router(x)
    weights, chosen = route(logits, CHOSEN, of_chosen=True)
    assert torch.equal(chosen, expected_chosen)
    theirs, _ = block(x[None])
    torch.testing.assert_close(mixture(x, weights, chosen, stack), theirs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalizes", [False, True])
@torch.inference_mode()
def test_qwen3_moe_s_mixture_weighs_by_the_softmax_over_all(normalizes: bool) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=normalizes,
    )
    block = randomised(Qwen3MoeSparseMoeBlock(config))
    x = tokens()
    weights, chosen = route(x @ block.gate.weight.T, CHOSEN, normalizes=normalizes)
    stack = ExpertStack(
        block.experts.gate_up_proj.detach(), block.experts.down_proj.detach(), None, None, 0, silu_and_mul
    )
    theirs = block(x[None])
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    torch.testing.assert_close(mixture(x, weights, chosen, stack), theirs.view_as(x), rtol=1e-5, atol=1e-5)


def test_numbers_of_no_expert_of_the_stack_are_passed_over() -> None:
    _, whole = gpt_oss()
    assert whole.b13 is not None and whole.b2 is not None
    some = ExpertStack(whole.w13[2:4], whole.w2[2:4], whole.b13[2:4], whole.b2[2:4], 2, whole.act)
    x, weights = tokens(3), torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 1.0]])
    out = mixture(x, weights, torch.tensor([[2, 3], [5, 2], [-1, 0]]), some)
    torch.testing.assert_close(out[0], mixture(x[:1], weights[:1], torch.tensor([[2, 3]]), whole)[0])
    torch.testing.assert_close(out[1], mixture(x[1:2], torch.tensor([[0.75]]), torch.tensor([[2]]), whole)[0])
    assert not out[2].any()


def test_stacks_that_do_not_fit_together_are_refused() -> None:
    w13, w2 = torch.zeros(2, 8, 6), torch.zeros(2, 6, 4)
    with pytest.raises(ValueError, match="do not fit each other"):
        ExpertStack(w13, w2[:, :5], None, None, 0, silu_and_mul)
    with pytest.raises(ValueError, match=r"a bias is \[2, 4\] instead of \[2, 8\]"):
        ExpertStack(w13, w2, torch.zeros(2, 4), None, 0, silu_and_mul)
    with pytest.raises(ValueError, match="none of the activations"):
        ExpertStack(w13, w2, None, None, 0, torch.relu)
