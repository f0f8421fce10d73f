"""From a group's logits to a token for each of its rows."""

from __future__ import annotations

import math

import torch

from ...kernels import sampling
from .sampling_batch import Group, Processing
from .sampling_state import SamplingState


def choose(logits: torch.Tensor, group: Group) -> torch.Tensor:
    """Choose a token for each row of a group: `[M]` int64, -1 where there is none."""
    if group.processing is not None:
        if group.rows is None:
            logits = logits.clone()  # the caller's; a selection of rows is a copy already
        _process(logits, group.processing)
    if group.is_greedy:
        return sampling.greedy(logits)
    uniforms = torch.tensor(
        [r.draws[r.num_output_tokens - r.first_draw] for r in group.requests],
        dtype=torch.float64,
        device=logits.device,
    )
    if group.filtering != "none":
        return sampling.sample_filtered(logits, group.filters, uniforms, narrow=group.filtering == "narrow")
    return sampling.sample(logits, group.filters.temperature, uniforms)


def _process(logits: torch.Tensor, processing: Processing) -> None:
    """Apply masks, bias and penalties in place."""
    if (allowed := processing.allowed) is not None:
        sampling.keep_allowed(logits, allowed.rows, allowed.token_ids)
    if processing.bad_words:
        rows: list[int] = []
        token_ids: list[int] = []
        for row, bad_words in processing.bad_words:
            forbidden = bad_words.forbidden()
            rows.extend([row] * len(forbidden))
            token_ids.extend(forbidden)
        if rows:
            sampling.exclude(
                logits, torch.tensor(rows, device=logits.device), torch.tensor(token_ids, device=logits.device)
            )
    if (below := processing.below_min_tokens) is not None:
        sampling.exclude(logits, below.rows, below.token_ids)
    if (bias := processing.bias) is not None:
        sampling.add_bias(logits, bias.rows, bias.token_ids, processing.bias_values)
    whole = logits.shape[0]
    if processing.seen is not None:
        part = logits if len(processing.seen) == whole else logits[processing.repetition_rows]
        sampling.penalize_repetition(part, processing.seen, processing.repetition)
        if part is not logits:
            logits[processing.repetition_rows] = part
    if processing.counts is not None:
        part = logits if len(processing.counts) == whole else logits[processing.count_rows]
        sampling.penalize_counts(part, processing.counts, processing.frequency, processing.presence)
        if part is not logits:
            logits[processing.count_rows] = part


def count(processing: Processing, chosen: torch.Tensor) -> None:
    """Enter the chosen tokens into the penalties' tables; a failed row enters nothing."""
    for table, rows in ((processing.seen, processing.repetition_rows), (processing.counts, processing.count_rows)):
        if table is None:
            continue
        tokens = chosen[rows]
        places = (tokens >= 0).nonzero().squeeze(1)
        if table.dtype == torch.bool:
            table[places, tokens[places]] = True
        else:
            table[places, tokens[places]] += 1.0


def why_no_numbers(row: torch.Tensor) -> str:
    """Say what makes a row of raw logits useless, whatever is asked of it; empty if nothing does."""
    if bool(row.isnan().any()):
        return "the model computed NaN logits for this request"
    if bool((row == math.inf).any()):
        return "the model computed infinite logits for this request"
    if not bool(row.isfinite().any()):
        return "the model computed no finite logit for this request"
    return ""


def why_failed(row: torch.Tensor, request: SamplingState) -> str:
    """Say why no token could be chosen from a row of raw logits."""
    return why_no_numbers(row) or (
        f"allowed_token_ids, bad_words and min_tokens together exclude every token at output position "
        f"{request.num_output_tokens}: relax one of them"
    )
