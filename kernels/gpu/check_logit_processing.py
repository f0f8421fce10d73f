"""The kernel of `kernels.logit_processing` against its meaning, as `device_checks` has it."""

from __future__ import annotations

import torch

from ..logit_processing import count_buffer, process_logits_ref
from ..step_layout import MAX_EDITS, StepLayout
from . import logit_processing as gpu
from .check_setting import Found, Random, Setting, differs

_PENALTIES = (1.1, 0.25, -0.5)  # repetition, frequency, presence


def standing_rows(random: Random, layout: StepLayout, num_rows: int, vocab_size: int) -> tuple[torch.Tensor, ...]:
    """A standing batch whose every other row has penalties, every third bias and end tokens, and a step that samples
    from all of them."""
    row = torch.arange(num_rows, dtype=torch.int32)
    state = torch.zeros((num_rows, layout.row_words), dtype=torch.int32)
    state[:, layout.token_ids : layout.edits] = random.randint(
        -1, max(2, vocab_size // 50), num_rows, layout.edits - layout.token_ids
    ).cpu()
    num_tokens = (random.randint(1, layout.max_model_len + 1, num_rows).cpu()).to(torch.int32)
    state[:, 6] = num_tokens // 2
    state[:, 7] = num_tokens // (2 + row % 2)  # min_tokens is reached by some
    penalties = torch.tensor([1.0, 0.0, 0.0]).repeat(num_rows, 1)
    penalties[::2] = torch.tensor(_PENALTIES)
    state[:, 8:11] = penalties.view(torch.int32)
    state[::3, 11], state[::3, 12] = 5, 3
    bias = torch.tensor([1.0, -2.0, -torch.inf, 0.5, 3.0]).view(torch.int32)
    state[:, layout.edits : layout.edits + 8] = torch.arange(8, dtype=torch.int32) * (vocab_size // 8)
    state[:, layout.edits + MAX_EDITS : layout.edits + MAX_EDITS + 5] = bias
    packed = torch.full((layout.diff,), -1, dtype=torch.int32)
    packed[layout.sample_rows : layout.sample_rows + num_rows] = row.flip(0)
    packed[layout.sample_columns : layout.sample_columns + num_rows] = num_tokens.flip(0)
    return state, packed


def check_logit_processing(s: Setting) -> Found:
    random = Random(s)
    num_rows, vocab_size, max_len = (5, 300, 40) if s.small else (256, 151936, 4096)
    layout = StepLayout(num_rows, max_len, 16)
    state, packed = (each.to(s.device) for each in standing_rows(random, layout, num_rows, vocab_size))
    counts = count_buffer(layout, vocab_size, s.device)
    if not len(counts):  # in the interpreter
        counts = torch.zeros((2, vocab_size), dtype=torch.int32)
    logits = random.floats(num_rows, vocab_size) * 3.0
    out = logits.clone()
    gpu.process_logits(out, state, packed, counts, layout)
    expected = out
    if s.computes:
        expected = logits.cpu()
        process_logits_ref(expected, state.cpu(), packed.cpu(), layout)
        expected = expected.to(s.device)
    yield f"{num_rows} x {vocab_size}, bits", differs(out, expected), 0.5
    yield "counts are zeros again", differs(counts, torch.zeros_like(counts)), 0.5
