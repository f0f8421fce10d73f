"""Log-probabilities on a GPU: of given tokens, their ranks, and the likeliest tokens, in one pass over the logits.

The pass (`sampling_stats.stats_kernel`) leaves the largest logit of each group of 64 columns. The likeliest tokens are
then taken one after another: the best group, its best element that has not been taken, what is left in that group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .order import KEYS_OF_VALUE, LAST_COLUMN, column_of, order_keys, value_of
from .sampling_stats import GROUP_SIZE, check_logits, chunk_size_of, row_stats, stats_kernel

_LOWEST = tl.constexpr(-(1 << 62))


@triton.jit(do_not_specialize=["num_top"])
def _logprobs_kernel(
    logits_ptr,  # [n, vocab_size] float32, rows stride apart
    token_ids_ptr,  # [n] int64
    chunk_max_ptr,  # [n, num_chunks], as the next two
    chunk_sum_ptr,
    chunk_larger_ptr,
    group_max_ptr,  # [n, num_groups]
    logprob_ptr,  # [n] float32
    rank_ptr,  # [n] int64
    top_ids_ptr,  # [n, num_top] int64
    top_logprobs_ptr,  # [n, num_top] float32
    stride,
    vocab_size,
    num_chunks,
    num_groups,
    num_top,
    CHUNKS: tl.constexpr,  # powers of two, >= num_chunks and num_groups
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    largest, is_finite, sums = row_stats(chunk_max_ptr, chunk_sum_ptr, row, num_chunks, 1.0, CHUNKS)
    log_sum = tl.log(tl.sum(sums, axis=0)).to(tl.float32)
    log_sum = tl.where(is_finite, log_sum, float("nan"))
    largest = tl.where(is_finite, largest, 0.0)
    chosen = tl.load(logits_ptr + row * stride + tl.load(token_ids_ptr + row))
    tl.store(logprob_ptr + row, chosen - largest - log_sum)
    index = tl.arange(0, CHUNKS)
    larger = tl.load(chunk_larger_ptr + row * num_chunks + index, mask=index < num_chunks, other=0)
    tl.store(rank_ptr + row, tl.sum(larger, axis=0).to(tl.int64) + 1)

    group = tl.arange(0, GROUPS)
    is_group = group * GROUP < vocab_size
    group_max = tl.load(group_max_ptr + row * num_groups + group, mask=is_group, other=0.0)
    # Equal logarithms of unequal logits are ordered by id, as `kernels.sampling` does: so those are compared.
    best_of_group = tl.where(is_group, order_keys(group_max - largest - log_sum, group), _LOWEST)
    taken = tl.full((), 1 << 62, tl.int64)
    for number in range(0, num_top):
        best_group = column_of(tl.max(best_of_group, axis=0))
        columns = best_group * GROUP + tl.arange(0, GROUP)
        mask = columns < vocab_size
        x = tl.load(logits_ptr + row * stride + columns, mask=mask, other=0.0)
        keys = order_keys(x - largest - log_sum, columns)
        keys = tl.where(mask & (keys < taken), keys, _LOWEST)
        taken = tl.max(keys, axis=0)
        tl.store(top_ids_ptr + row * num_top + number, column_of(taken).to(tl.int64))
        tl.store(top_logprobs_ptr + row * num_top + number, value_of(taken))
        left = tl.max(tl.where(keys < taken, keys, _LOWEST), axis=0)
        # The best of what is left, but with the group for its column.
        left = tl.where(left > _LOWEST, (left & -KEYS_OF_VALUE) | (best_group ^ LAST_COLUMN), left)
        best_of_group = tl.where(group == best_group, left, best_of_group)


def logprobs_on_device(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.device_sampling.logprobs_on_device`."""
    check_logits(logits)
    num_rows, vocab_size = logits.shape
    if not 0 <= num_top <= vocab_size:
        raise ValueError(f"num_top={num_top} is outside [0, {vocab_size}]")
    device = logits.device
    chunk = chunk_size_of(vocab_size)
    num_chunks = triton.cdiv(vocab_size, chunk)
    num_groups = num_chunks * chunk // GROUP_SIZE
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=device)
    if num_rows:
        chunk_max = torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device)
        chunk_sum = torch.empty((num_rows, num_chunks), dtype=torch.float64, device=device)
        chunk_larger = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
        group_max = torch.empty((num_rows, num_groups), dtype=torch.float32, device=device)
        sizes = (logits.stride(0), vocab_size, num_chunks)
        stats_kernel[(num_rows, num_chunks)](
            *(logits, None, token_ids, chunk_max, chunk_sum, chunk_larger, group_max, None, *sizes),
            CHUNK=chunk,
            GROUP=GROUP_SIZE,
            num_warps=max(1, chunk // 512),
        )
        _logprobs_kernel[(num_rows,)](
            *(logits, token_ids, chunk_max, chunk_sum, chunk_larger, group_max),
            *(logprobs, ranks, top_ids, top_logprobs, *sizes, num_groups, num_top),
            CHUNKS=triton.next_power_of_2(num_chunks),
            GROUPS=triton.next_power_of_2(num_groups),
            GROUP=GROUP_SIZE,
            num_warps=8,
        )
    return logprobs, ranks, top_ids, top_logprobs
