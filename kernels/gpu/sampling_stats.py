"""What sampling knows of each chunk of a row of logits, and of the row from its chunks.

The sum of a chunk's exponentials is a fixed tree of float32 additions; what decides anything else are sums of integers:
an element weighs `exp(x - largest)` in units of 2**-44 or so. Neither depends on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..sampling import GREEDY_EPS
from .order import MAX_VOCAB_SIZE

GROUP_SIZE = 64  # columns whose largest logit is kept
CHUNK_SIZE = 2048  # columns of one program; a row's bits depend on it, so it must not follow from the batch

GREEDY_BELOW = tl.constexpr(GREEDY_EPS)
NO_COLUMN = tl.constexpr(1 << 30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_logits(ptrs, mask):
    """Logits, -inf where masked; NaN becomes +inf, which spoils a row as well and can be compared."""
    x = tl.load(ptrs, mask=mask, other=float("-inf"))
    return tl.where(x == x, x, float("inf"))


@triton.jit
def exp_of_difference(x, largest, slope):
    """`exp((x - largest) / temperature)` for `slope = log2(e) / temperature`.

    Without a division, of which each logit would need one. Where order is decided, the quotient is compared instead, as
    IEEE division rounds it.
    """
    return tl.exp2((x - largest) * slope)


@triton.jit
def weights_of(x, largest, slope, UNIT: tl.constexpr):
    """What elements weigh beside the largest of their row, in whole units."""
    return (exp_of_difference(x, largest, slope) * UNIT).to(tl.int64)


@triton.jit
def stats_kernel(
    logits_ptr,  # [n, vocab_size] float32, rows stride apart
    temperature_ptr,  # [n] float32; None: 1
    token_ids_ptr,  # [n] int64, or None
    chunk_max_ptr,  # [n, num_chunks] float32; +inf if the chunk holds NaN or +inf
    chunk_sum_ptr,  # [n, num_chunks] float64, sum of exp((x - chunk_max) / temperature)
    chunk_best_ptr,  # [n, num_chunks] int32: lowest column of the largest; with token_ids, how many are larger
    group_max_ptr,  # [n, num_chunks * CHUNK / GROUP] float32, or None
    count_ptr,  # [n] int32, set to 0; or None
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    num_groups: tl.constexpr = CHUNK // GROUP
    columns = chunk * CHUNK + tl.arange(0, num_groups)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = load_logits(logits_ptr + row * stride + columns, columns < vocab_size)
    temperature = 1.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
    group_max = tl.max(x, axis=1)
    largest = tl.max(group_max, axis=0)
    place = row * num_chunks + chunk
    tl.store(chunk_max_ptr + place, largest)
    if token_ids_ptr is not None:
        chosen = tl.load(logits_ptr + row * stride + tl.load(token_ids_ptr + row))
        tl.store(chunk_best_ptr + place, tl.sum(tl.sum((x > chosen).to(tl.int32), axis=1), axis=0))
    if temperature < GREEDY_BELOW:
        best = tl.where(x == largest, columns, NO_COLUMN)
        tl.store(chunk_best_ptr + place, tl.min(tl.min(best, axis=1), axis=0))
    else:
        if group_max_ptr is not None:
            groups = (row * num_chunks + chunk) * num_groups + tl.arange(0, num_groups)
            tl.store(group_max_ptr + groups, group_max)
        # Groups in float32, then their sums in float64. The sum of a spoilt chunk is nobody's.
        base = tl.where((largest > float("-inf")) & (largest < float("inf")), largest, 0.0)
        exponentials = exp_of_difference(tl.minimum(x, base), base, tl.div_rn(LOG2_E, temperature))
        tl.store(chunk_sum_ptr + place, tl.sum(tl.sum(exponentials, axis=1).to(tl.float64), axis=0))
    if count_ptr is not None:
        if chunk == 0:
            tl.store(count_ptr + row, 0)


@triton.jit
def row_stats(chunk_max_ptr, chunk_sum_ptr, row, num_chunks, temperature, CHUNKS: tl.constexpr):
    """The row's largest logit, whether it is finite over the temperature, and what each chunk weighs beside it."""
    index = tl.arange(0, CHUNKS)
    mask = index < num_chunks
    chunk_max = tl.load(chunk_max_ptr + row * num_chunks + index, mask=mask, other=float("-inf"))
    chunk_sum = tl.load(chunk_sum_ptr + row * num_chunks + index, mask=mask, other=0.0)
    largest = tl.max(chunk_max, axis=0)
    scaled = tl.div_rn(largest, temperature)
    is_finite = (scaled > float("-inf")) & (scaled < float("inf"))
    base = tl.where(is_finite, largest, 0.0)
    # In float64, as a chunk's weight is a factor of many elements; below 2**-1000 there is nothing.
    slope = tl.div_rn(LOG2_E, temperature).to(tl.float64)
    difference = tl.minimum(chunk_max, base).to(tl.float64) - base.to(tl.float64)
    return largest, is_finite, chunk_sum * tl.exp2(tl.maximum(difference * slope, -1000.0))


def chunk_size_of(vocab_size: int) -> int:
    """Columns of one program, a power of two."""
    return min(CHUNK_SIZE, max(GROUP_SIZE, int(triton.next_power_of_2(vocab_size))))


def check_logits(logits: torch.Tensor) -> None:
    """Refuse what the kernels are not written for.

    Raises:
        ValueError: the logits are not float32 rows of neighbouring elements, or too wide.
    """
    if logits.dim() != 2 or logits.dtype is not torch.float32 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"logits must be [num_rows, vocab_size] float32 with neighbouring columns, got {tuple(logits.shape)} "
            f"{logits.dtype} {logits.stride()}: convert with .float().contiguous()"
        )
    if not 1 <= logits.shape[1] < MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {logits.shape[1]} is outside [1, {MAX_VOCAB_SIZE - 1}]")
