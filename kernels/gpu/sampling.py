"""Sampling on a GPU: any mix of temperature, top-k, top-p and min-p, in a fixed number of launches, without a sort.

    stats    every chunk of every row: largest logit, sum of exponentials, largest logit of each group of 64 columns
    bracket  one program a row: from these and a sample of the row, a window of values in which the threshold must lie
    collect  every chunk: what weighs more than the window is summed up, what lies in it is copied out
    choose   one program a row: the exact threshold among what was copied, then the draw, then one chunk once more

A row is read twice, or once where nothing is filtered: then only `stats` and `choose` do something.
"""

from __future__ import annotations

import torch
import triton

from .sampling_choose import choose_kernel
from .sampling_stats import GROUP_SIZE, check_logits, chunk_size_of, stats_kernel
from .sampling_window import bracket_kernel, collect_kernel

CAPACITY = 8192  # elements that a window may hold: 32 a thread in `choose`
SAMPLE_SIZE = 8192  # elements that `bracket` looks at


def sample_on_device(  # noqa: PLR0917,RUF100 - one tensor for each parameter of sampling
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
    """See `kernels.device_sampling.sample_on_device`."""
    check_logits(logits)
    num_rows, vocab_size = logits.shape
    device = logits.device
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return out
    chunk = chunk_size_of(vocab_size)
    num_chunks = triton.cdiv(vocab_size, chunk)
    chunks = triton.next_power_of_2(num_chunks)
    num_groups = num_chunks * chunk // GROUP_SIZE
    unit = float(1 << (62 - vocab_size.bit_length()))  # so that a row weighs less than 2**62
    capacity = min(CAPACITY, triton.next_power_of_2(vocab_size))

    def empty(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((num_rows, width), dtype=dtype, device=device)

    chunk_max, chunk_sum = empty(num_chunks, torch.float32), empty(num_chunks, torch.float64)
    chunk_best = empty(num_chunks, torch.int32)
    group_max = count = window = above = kept = values = columns = None
    if filtered:
        group_max, count, window = empty(num_groups, torch.float32), empty(1, torch.int32), empty(3, torch.float32)
        above, kept = empty(num_chunks, torch.int64), empty(num_chunks, torch.int64)
        values, columns = empty(capacity, torch.float32), empty(capacity, torch.int32)
    sizes = (logits.stride(0), vocab_size, num_chunks)
    stats_kernel[(num_rows, num_chunks)](
        *(logits, temperature, None, chunk_max, chunk_sum, chunk_best, group_max, count, *sizes),
        CHUNK=chunk,
        GROUP=GROUP_SIZE,
        num_warps=max(1, chunk // 512),
    )
    if filtered:
        bracket_kernel[(num_rows,)](
            *(logits, temperature, top_k, top_p, min_p, chunk_max, chunk_sum, group_max, window, *sizes, num_groups),
            CHUNKS=chunks,
            GROUPS=triton.next_power_of_2(num_groups),
            GROUP=GROUP_SIZE,
            SAMPLE=SAMPLE_SIZE,
            CAPACITY=capacity,
            num_warps=16,
        )
        collect_kernel[(num_rows, num_chunks)](
            *(logits, temperature, min_p, chunk_max, window, above, kept, count, values, columns, *sizes),
            CHUNK=chunk,
            CHUNKS=chunks,
            CAPACITY=capacity,
            UNIT=unit,
            num_warps=max(1, chunk // 256),  # eight elements a thread: their weights are 64 bits wide
        )
    choose_kernel[(num_rows,)](
        *(logits, temperature, top_k, top_p, min_p, seeds, positions, chunk_max, chunk_sum, chunk_best),
        *(window, above, kept, count, values, columns, out, *sizes),
        CHUNK=chunk,
        CHUNKS=chunks,
        CAPACITY=capacity,
        UNIT=unit,
        num_warps=8,  # with twice as many, a thread's half of the registers does not hold its candidates
    )
    return out
