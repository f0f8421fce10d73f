"""A mixture of experts: which tokens go to which experts, what those say, and the weighted sum of it.

Sources: Fedus et al. 2021 (Switch Transformer), Jiang et al. 2024 (Mixtral of Experts); Gale et al. 2023 (MegaBlocks)
for products over tokens that are grouped by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .expert_stack import AnyExpertStack


def route(
    logits: torch.Tensor, num_chosen: int, *, of_chosen: bool = False, normalizes: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts.

    Args:
        logits: `[num_tokens, num_experts]`, any float dtype; what follows is done in float32.
        of_chosen: the weights are the softmax over the chosen experts; else over all.
        normalizes: weights that are parts of all are made to add up to one.

    Returns:
        Weights, float32, and experts, int32 on a GPU and int64 on a CPU, `[num_tokens, num_chosen]` both, the best
        first. Of equal ones the GPU takes the one with the lower number; torch promises nothing.
    """
    if logits.is_cuda:
        from .gpu.expert_groups import route as on_gpu

        return on_gpu(logits, num_chosen, of_chosen=of_chosen, normalizes=normalizes)
    return route_ref(logits, num_chosen, of_chosen=of_chosen, normalizes=normalizes)


def route_ref(
    logits: torch.Tensor, num_chosen: int, *, of_chosen: bool = False, normalizes: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `route` means."""
    if of_chosen:
        best, chosen = logits.float().topk(num_chosen, dim=-1)
        return torch.softmax(best, dim=-1), chosen
    weights, chosen = torch.softmax(logits.float(), dim=-1).topk(num_chosen, dim=-1)
    return (weights / weights.sum(dim=-1, keepdim=True) if normalizes else weights), chosen


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    stack: AnyExpertStack,
    *,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """Send each token to its experts and add up what they say.

    On a GPU nothing waits for the host: what has to be launched follows from the number of tokens alone.

    Args:
        x: `[num_tokens, hidden_size]`, the dtype of the stack; float32, bfloat16 or float16 where that is codes.
        weights: `[num_tokens, num_chosen]`, float32 or the dtype of `x`.
        chosen: int, the same shape; a number that is none of the stack's is passed over, as -1 is.
        batch_invariant: each token's bits are the same, whatever else is in the batch; slower for few tokens.

    Returns:
        `[num_tokens, hidden_size]` like `x`. Each expert's word is rounded to the dtype of `x`; the sum over experts is
        done in float32, in the order of `chosen`, and rounded once.
    """
    if x.is_cuda:
        from .gpu.mixture import mixture as on_gpu

        return on_gpu(x, weights, chosen, stack, batch_invariant=batch_invariant)
    return mixture_ref(x, weights, chosen, stack)


def mixture_ref(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: AnyExpertStack) -> torch.Tensor:
    """What `mixture` means, but for sums in float32 that torch may do in another order; float64 for float64."""
    num_tokens, num_chosen = chosen.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    said = x.new_zeros((num_tokens, num_chosen, x.shape[1]))
    for expert in range(stack.w2.shape[0]):
        token, place = torch.where(chosen == stack.first + expert)
        if len(token):
            b13 = None if stack.b13 is None else stack.b13[expert].to(wide)
            b2 = None if stack.b2 is None else stack.b2[expert].to(wide)
            w13, w2 = stack.matrices(expert, wide)
            inner = stack.act(F.linear(x[token].to(wide), w13, b13)).to(x.dtype)
            said[token, place] = F.linear(inner.to(wide), w2, b2).to(x.dtype)
    return torch.einsum("tkh,tk->th", said.to(wide), weights.to(wide)).to(x.dtype)
