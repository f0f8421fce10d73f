"""Triton kernel of `octavo.kernels.logit_processing`: what it means, and where what lies, stands there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..step_layout import MAX_EDITS, StepLayout
from .sampling_stats import check_logits

_BLOCK = 1024  # tokens at a time, four to a thread
_NUM_WARPS = 8

_IS_PROMPTS = tl.constexpr(1 << 30)  # of a count: the token is in the prompt; the lower bits count it in the output


@triton.jit
def _edit(
    logits_ptr,  # of one sample, as all of these
    edits_ptr,  # [2, MAX_EDITS] int32: token ids, then the bits of what is added to the logits of the first ones
    num_biased,
    num_stops,
    MAX_EDITS: tl.constexpr,
):
    """Add bias, and exclude what stands behind the biased ones."""
    entry = tl.arange(0, MAX_EDITS)
    is_biased = entry < num_biased
    is_stop = (entry >= num_biased) & (entry < num_biased + num_stops)
    token_ids = tl.load(edits_ptr + entry, mask=is_biased | is_stop, other=0)
    bias = tl.load(edits_ptr + MAX_EDITS + entry, mask=is_biased, other=0).to(tl.float32, bitcast=True)
    # -inf is an exclusion, whatever the logit was.
    x = tl.load(logits_ptr + token_ids, mask=is_biased & (bias > float("-inf")), other=0.0)
    tl.store(logits_ptr + token_ids, x + bias, mask=is_biased)
    tl.debug_barrier()  # one of them may be biased as well
    tl.store(logits_ptr + token_ids, tl.full((MAX_EDITS,), float("-inf"), tl.float32), mask=is_stop)


@triton.jit
def _penalize(
    logits_ptr,  # of one sample
    token_ids_ptr,  # [num_tokens] int32, of its request
    counts_ptr,  # [vocab_size] int32, zeros before and after
    num_tokens,
    num_prompt_tokens,
    repetition,
    frequency,
    presence,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Count the tokens, then change the logit of each that there is, once."""
    begin = 0
    while begin < num_tokens:
        position = begin + tl.arange(0, BLOCK)
        token_ids = tl.load(token_ids_ptr + position, mask=position < num_tokens, other=-1)
        is_known = (token_ids >= 0) & (token_ids < vocab_size)
        is_output = position >= num_prompt_tokens
        places = counts_ptr + token_ids
        tl.atomic_or(places, tl.full((BLOCK,), _IS_PROMPTS, tl.int32), mask=is_known & (~is_output), sem="relaxed")
        tl.atomic_add(places, tl.full((BLOCK,), 1, tl.int32), mask=is_known & is_output, sem="relaxed")
        begin += BLOCK
    tl.debug_barrier()
    begin = 0
    while begin < num_tokens:
        position = begin + tl.arange(0, BLOCK)
        token_ids = tl.load(token_ids_ptr + position, mask=position < num_tokens, other=-1)
        is_known = (token_ids >= 0) & (token_ids < vocab_size)
        # Of a token's places in the request only the first that comes here finds what was counted.
        found = tl.atomic_xchg(counts_ptr + token_ids, tl.zeros((BLOCK,), tl.int32), mask=is_known, sem="relaxed")
        is_first = is_known & (found != 0)
        count = (found & (_IS_PROMPTS - 1)).to(tl.float32)
        x = tl.load(logits_ptr + token_ids, mask=is_first, other=0.0)
        x = tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition)
        x = x - frequency * count
        x = x - tl.where(count > 0.0, presence, 0.0)
        tl.store(logits_ptr + token_ids, x, mask=is_first)
        begin += BLOCK
    tl.debug_barrier()  # the next request is counted in the same place


@triton.jit(do_not_specialize=["num_samples"])
def _process_logits_kernel(
    logits_ptr,  # [num_samples, vocab_size] float32, rows stride apart
    state_ptr,  # [num_state_rows, ROW_WORDS] int32
    packed_ptr,  # int32
    counts_ptr,  # [num_programs, vocab_size] int32
    num_samples,
    stride,
    vocab_size,
    ROW_WORDS: tl.constexpr,
    SAMPLE_ROWS: tl.constexpr,  # offsets in the packed step, as the next
    SAMPLE_COLUMNS: tl.constexpr,
    TOKEN_IDS: tl.constexpr,  # offsets in a standing row, as the next
    EDITS: tl.constexpr,
    MAX_EDITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program
    while sample < num_samples:
        row = tl.load(packed_ptr + SAMPLE_ROWS + sample)
        row_ptr = state_ptr + tl.maximum(row, 0).to(tl.int64) * ROW_WORDS
        sample_ptr = logits_ptr + sample.to(tl.int64) * stride
        num_tokens = tl.load(packed_ptr + SAMPLE_COLUMNS + sample)
        num_prompt_tokens = tl.load(row_ptr + 6)
        num_biased = tl.load(row_ptr + 11)
        num_stops = tl.load(row_ptr + 12)
        num_stops = tl.where(num_tokens - num_prompt_tokens < tl.load(row_ptr + 7), num_stops, 0)
        if (row >= 0) & (num_biased + num_stops > 0):
            _edit(sample_ptr, row_ptr + EDITS, num_biased, num_stops, MAX_EDITS)
            tl.debug_barrier()
        repetition = tl.load(row_ptr + 8).to(tl.float32, bitcast=True)
        frequency = tl.load(row_ptr + 9).to(tl.float32, bitcast=True)
        presence = tl.load(row_ptr + 10).to(tl.float32, bitcast=True)
        if (row >= 0) & ((repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)):
            _penalize(
                *(sample_ptr, row_ptr + TOKEN_IDS, counts_ptr + program.to(tl.int64) * vocab_size),
                *(num_tokens, num_prompt_tokens, repetition, frequency, presence, vocab_size, BLOCK),
            )
        sample += tl.num_programs(0)


def process_logits(
    logits: torch.Tensor, state: torch.Tensor, packed: torch.Tensor, counts: torch.Tensor, layout: StepLayout
) -> None:
    """See `octavo.kernels.logit_processing.process_logits`."""
    check_logits(logits)
    num_samples, vocab_size = logits.shape
    if not num_samples:
        return
    _process_logits_kernel[(min(num_samples, counts.shape[0]),)](
        *(logits, state, packed, counts, num_samples, logits.stride(0), vocab_size),
        ROW_WORDS=layout.row_words,
        SAMPLE_ROWS=layout.sample_rows,
        SAMPLE_COLUMNS=layout.sample_columns,
        TOKEN_IDS=layout.token_ids,
        EDITS=layout.edits,
        MAX_EDITS=MAX_EDITS,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,  # products and sums are rounded one by one, as torch does: then the bits are the same
    )
