"""Tokens and log-probabilities where the logits are: one call for any mix of rows, without a look at any number.

On a CPU this is what it means, by the functions of `sampling`; on a GPU the kernels of `gpu.sampling` do it in a fixed
number of launches, which a CUDA graph can hold.
"""

from __future__ import annotations

import torch

from . import philox, sampling


def sample_on_device_ref(  # noqa: PLR0917 - one tensor for each parameter of sampling
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """What `sample_on_device` means."""
    vocab_size = logits.shape[1]
    out = torch.full((len(logits),), sampling.NO_TOKEN, dtype=torch.int64, device=logits.device)
    uniforms = philox.uniform(seeds, positions)
    log_min_p = torch.where(min_p > 0, min_p.double().log(), -torch.inf)
    filters = sampling.Filters(temperature, top_k.long(), top_p.double(), log_min_p)
    is_greedy = temperature < sampling.GREEDY_EPS
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    has_filter = has_top_k | (top_p < 1) | (min_p > 0)
    is_narrow = has_top_k & (top_k <= sampling.MAX_NARROW_TOP_K)
    for mask, narrow in (
        (~is_greedy & ~has_filter, None),
        (~is_greedy & has_filter & is_narrow, True),
        (~is_greedy & has_filter & ~is_narrow, False),
    ):
        rows = mask.nonzero().squeeze(1)
        if not len(rows):
            continue
        if narrow is None:
            out[rows] = sampling.sample(logits[rows], temperature[rows], uniforms[rows])
        else:
            chosen = sampling.Filters(*(values[rows] for values in filters))
            out[rows] = sampling.sample_filtered(logits[rows], chosen, uniforms[rows], narrow=narrow)
    rows = is_greedy.nonzero().squeeze(1)
    if len(rows):
        out[rows] = sampling.greedy(logits[rows])
    return out


def sample_on_device(  # noqa: PLR0917 - one tensor for each parameter of sampling
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    filtered: bool = True,
) -> torch.Tensor:
    """Choose a token of each row: the likeliest, or a draw after temperature, min-p, top-k and top-p, in this order.

    Args:
        logits: `[n, vocab_size]` float32; excluded tokens are -inf.
        temperature: `[n]` float32; below `sampling.GREEDY_EPS`: the largest logit, the lowest id among equals.
        top_k: `[n]` int32; <= 0 or >= vocab_size: off.
        top_p: `[n]` float32 in (0, 1]; 1: off.
        min_p: `[n]` float32 in [0, 1]; 0: off.
        seeds: `[n]` int64, the bits of an unsigned seed.
        positions: `[n]` int64, of the token that is drawn; (seed, position) determines the draw.
        out: `[n]` int64, where to write; None for a new tensor.
        filtered: False promises that no row has a top-k, top-p or min-p, which saves two launches on a GPU; a row's
            token is the same either way.

    Returns:
        `[n]` int64; `sampling.NO_TOKEN` where nothing is left, or a logit is NaN or +inf.

    Raises:
        ValueError: on a GPU, logits that its kernels cannot read.
    """
    if logits.device.type == "cuda":
        from .gpu import sampling as gpu

        return gpu.sample_on_device(
            logits, temperature, top_k, top_p, min_p, seeds, positions, out=out, filtered=filtered
        )
    tokens = sample_on_device_ref(logits, temperature, top_k, top_p, min_p, seeds, positions)
    return tokens if out is None else out.copy_(tokens)


def logprobs_on_device(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Report how likely given tokens are, and which are likeliest: see `sampling.logprobs_of`.

    On a GPU `num_top` is meant to be small (20); a token id outside the vocabulary gives an undefined number there.
    """
    if logits.device.type == "cuda":
        from .gpu import logprobs as gpu

        return gpu.logprobs_on_device(logits, token_ids, num_top)
    return sampling.logprobs_of(logits, token_ids, num_top)
