"""What a request changes in its logits before a token is chosen: bias, exclusions, and penalties on its tokens.

All of it lies in the request's row of the standing batch, its tokens among it (`step_layout.StepLayout`), so that a
step with such requests needs no more words from the host than any other, and a CUDA graph can hold it.

On a GPU a few programs take a request each: its tokens are counted in a buffer with a place for every token id, then
whoever takes a count out of it changes that token's logit. So each is changed once, and the buffer is empty again.
"""

from __future__ import annotations

import torch

from . import sampling
from .step_layout import MAX_EDITS, PARAM_WORDS, StepLayout

MAX_PROGRAMS = 64
"""Most requests that are taken at a time; a count buffer has a row for each."""


def count_buffer(layout: StepLayout, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Zeros, `[programs, vocab_size]` int32, for `process_logits`; without rows where it needs none."""
    num_programs = min(MAX_PROGRAMS, layout.section) if device.type == "cuda" else 0
    return torch.zeros((num_programs, vocab_size), dtype=torch.int32, device=device)


def memory_bytes(num_state_rows: int, vocab_size: int) -> int:
    """Memory of a GPU that the count buffer and the edits of requests take at most."""
    return 4 * (MAX_PROGRAMS * vocab_size + num_state_rows * (PARAM_WORDS + 2 * MAX_EDITS))


def process_logits_ref(logits: torch.Tensor, state: torch.Tensor, packed: torch.Tensor, layout: StepLayout) -> None:
    """What `process_logits` means: what `sampling` does to the logits, in the same order and with the same bits."""
    rows = packed[layout.sample_rows :][: len(logits)].tolist()
    columns = packed[layout.sample_columns :][: len(logits)].tolist()
    for index, (row, num_tokens) in enumerate(zip(rows, columns, strict=True)):
        if row >= 0:
            _process_row(logits[index : index + 1], state[row], num_tokens, layout)


def _process_row(logits: torch.Tensor, row: torch.Tensor, num_tokens: int, layout: StepLayout) -> None:
    """Of one request: `logits` is `[1, vocab_size]`, and `num_tokens` are its tokens so far."""
    _, num_prompt_tokens, min_tokens, *_, num_biased, num_stops = row[5:13].tolist()
    penalties = row[8:11].view(torch.float32)
    repetition, frequency, presence = penalties.view(3, 1, 1)
    ids = row[layout.edits : layout.edits + num_biased + num_stops].long()
    bias = row[layout.edits + MAX_EDITS :][:num_biased].view(torch.float32)
    biased, stops = ids[:num_biased], ids[num_biased:]
    sampling.add_bias(logits, torch.zeros_like(biased), biased, bias)
    if num_tokens - num_prompt_tokens >= min_tokens:
        stops = stops[:0]
    excluded = torch.cat((biased[bias == -torch.inf], stops))
    sampling.exclude(logits, torch.zeros_like(excluded), excluded)
    if penalties.tolist() == [1.0, 0.0, 0.0]:
        return
    vocab_size = logits.shape[1]
    tokens = row[layout.token_ids : layout.token_ids + num_tokens].long()
    is_known = (tokens >= 0) & (tokens < vocab_size)  # a token that could not be sampled is none
    seen = torch.bincount(tokens[is_known], minlength=vocab_size) > 0
    outputs = tokens[num_prompt_tokens:][is_known[num_prompt_tokens:]]
    counts = torch.bincount(outputs, minlength=vocab_size).float()
    sampling.penalize_repetition(logits, seen.unsqueeze(0), repetition)
    sampling.penalize_counts(logits, counts.unsqueeze(0), frequency, presence)


def process_logits(
    logits: torch.Tensor, state: torch.Tensor, packed: torch.Tensor, counts: torch.Tensor, layout: StepLayout
) -> None:
    """Change the logits of the step's samples as their requests want it; those of row -1 stay as they are.

    Bias is added first, where it is -inf the token is excluded; then below `min_tokens` the tokens that would end the
    request are; then come the penalties: repetition, frequency, presence.

    Args:
        logits: `[num_samples, vocab_size]` float32, in the order of `sample_rows`; changed in place.
        state: the standing batch, `[num_state_rows, layout.row_words]` int32.
        packed: a packed step, int32.
        counts: of `count_buffer`.
    """
    if logits.device.type == "cuda":
        from .gpu import logit_processing as gpu

        gpu.process_logits(logits, state, packed, counts, layout)
    else:
        process_logits_ref(logits, state, packed, layout)


assert PARAM_WORDS >= 13  # words that are read of them
