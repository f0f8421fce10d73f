"""How likely tokens were: log-probabilities of sampled and of prompt tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...kernels import sampling
from ...messages.request import TokenLogprobs

MAX_LOGITS_ROWS = 512
"""Prompt tokens whose logits are there at a time."""


def prompt_logprobs(logits: torch.Tensor, target_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """Report how likely a prompt's tokens were, each after those before it.

    Args:
        logits: `[n, V]` float32; row i predicts `target_ids[i]`.
        target_ids: the prompt's next tokens.
        num_top: alternatives to report; -1 means the vocabulary.
    """
    if not target_ids:
        return ()
    vocab_size = logits.shape[1]
    count = vocab_size if num_top == -1 else min(num_top, vocab_size)
    targets = torch.tensor(target_ids, dtype=torch.int64, device=logits.device)
    return tuple(token_logprobs(logits, targets, [count] * len(target_ids)))


def prompt_logprobs_of(
    hidden: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    target_ids: Sequence[int],
    num_top: int,
    *,
    max_rows: int | None = None,
) -> tuple[TokenLogprobs, ...]:
    """The same from hidden states `[n, hidden_size]`, some rows at a time.

    The logits of a whole chunk would be larger than anything that memory is kept back for.

    Args:
        max_rows: at a time; None: `MAX_LOGITS_ROWS`, which are the most in any case.
    """
    entries: list[TokenLogprobs] = []
    at_once = min(max_rows or MAX_LOGITS_ROWS, MAX_LOGITS_ROWS)
    for begin in range(0, len(target_ids), at_once):
        rows = slice(begin, begin + at_once)
        entries += prompt_logprobs(logits_of(hidden[rows]), target_ids[rows], num_top)
    return tuple(entries)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_tops: list[int]) -> list[TokenLogprobs]:
    entries: list[TokenLogprobs] = []
    for block in sampling.row_blocks(*logits.shape):
        counts = num_tops[block]
        chosen, ranks, top_ids, top_logprobs = sampling.logprobs_of(logits[block], token_ids[block], max(counts))
        rows = zip(
            token_ids[block].tolist(),
            chosen.tolist(),
            ranks.tolist(),
            top_ids.tolist(),
            top_logprobs.tolist(),
            counts,
            strict=True,
        )
        for token_id, logprob, rank, ids, values, count in rows:
            top = tuple(zip(ids[:count], values[:count], strict=True))
            entries.append(TokenLogprobs(token_id=token_id, logprob=logprob, rank=rank, top=top))
    return entries
