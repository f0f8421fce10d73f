"""A row's window: a range of logits, few of its elements in it, in which the threshold of its filters must lie.

Where the ends of the window lie is estimated, from the largest logit of each group of columns and a sample of the row.
`collect_kernel` then sums up what weighs more than the window, and copies out what lies in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import float_of, ordered_bits
from .sampling_stats import GREEDY_BELOW, LOG2_E, exp_of_difference, row_stats, weights_of

_RUN_LENGTH = tl.constexpr(8)  # columns that the sample takes side by side: one sector of memory


@triton.jit
def lowest_logit(scaled, temperature):
    """The lowest float32 that is at least `scaled` when divided by `temperature`."""
    key = ordered_bits(scaled * temperature).to(tl.int64)
    if (scaled > float("-inf")) & (scaled < float("inf")):
        # The product is off by a few units in the last place at most. (Of numbers below 1e-38, where it may be by more,
        # as many weigh alike.)
        step = 0
        while (tl.div_rn(float_of(key), temperature) < scaled) & (step < 64):
            key += 1
            step += 1
        step = 0
        while (tl.div_rn(float_of(key - 1), temperature) >= scaled) & (step < 64):
            key -= 1
            step += 1
    return float_of(key)


@triton.jit
def _min_logit(largest, min_p):
    """The smallest scaled logit that min-p keeps: see `kernels.sampling`."""
    log_min_p = tl.log(tl.maximum(min_p, 1e-38).to(tl.float64))
    return tl.where(min_p > 0.0, (largest.to(tl.float64) + log_min_p).to(tl.float32), float("-inf"))


@triton.jit
def _dropped(group_weight, weight, threshold, stands_for):
    """An estimate of what elements lighter than `threshold` weigh, and by how much it may be wrong."""
    below = tl.where(weight < threshold, weight, 0.0)
    known = tl.sum(tl.where(group_weight < threshold, group_weight, 0.0), axis=0)
    # Four standard deviations, and two elements that nobody has seen.
    slack = 4.0 * stands_for * tl.sqrt(tl.sum(below * below, axis=0)) + 2.0 * threshold
    return known + stands_for * tl.sum(below, axis=0), slack


@triton.jit
def _low_of_top_k(group_max, largest, top_k):
    """A logit that the `top_k`th is not below.

    As many groups as top_k reach up to a value, so as many elements do.
    """
    keys = ordered_bits(group_max).to(tl.int64)
    low_key = tl.min(keys, axis=0)
    high_key = ordered_bits(largest).to(tl.int64) + 1
    is_close = False
    while (high_key - low_key > 1) & (not is_close):
        key = low_key + ((high_key - low_key) >> 1)
        count = tl.sum((keys >= key).to(tl.int32), axis=0)
        low_key = tl.where(count >= top_k, key, low_key)
        high_key = tl.where(count >= top_k, high_key, key)
        is_close = (count >= top_k) & (count <= top_k + top_k // 8)
    low = float_of(low_key)
    if tl.sum((group_max >= low).to(tl.int32), axis=0) < top_k:
        low = float("-inf")  # fewer groups than top_k
    return low


@triton.jit
def _ends_of_top_p(
    row_ptr, group_max_ptr, group_max, sums, largest, floor, temperature, top_p, min_p, vocab_size, num_groups,
    GROUP: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Logits that the threshold of top-p lies between: what lies below a value is estimated.

    The largest of each group are known, the others are sampled.

    Args:
        group_max_ptr: of this row, `group_max` is what lies there.
        sums: what each chunk weighs.
        floor: the lowest logit that min-p keeps.
    """
    slope = tl.div_rn(LOG2_E, temperature)
    element = tl.arange(0, SAMPLE)
    run = (element // _RUN_LENGTH).to(tl.int64)
    columns = (run * (vocab_size // _RUN_LENGTH) // (SAMPLE // _RUN_LENGTH)) * _RUN_LENGTH
    columns += element % _RUN_LENGTH
    x = tl.load(row_ptr + columns)
    others = x < tl.load(group_max_ptr + columns // GROUP)
    stands_for = (vocab_size - num_groups) / tl.maximum(tl.sum(others.to(tl.float32), axis=0), 1.0)
    # From here on weights alone are compared, which order elements as logits do: so x needs no registers.
    weight = tl.where(others & (x >= floor), exp_of_difference(x, largest, slope), 0.0)
    group_weight = tl.where(group_max >= floor, exp_of_difference(group_max, largest, slope), 0.0)
    kept = tl.sum(sums, axis=0).to(tl.float32)
    if min_p > 0.0:
        kept = tl.sum(group_weight, axis=0) + stands_for * tl.sum(weight, axis=0)
    goal = (1.0 - top_p) * kept  # this much may be dropped
    low, low_end = largest - 40.0 * temperature, largest  # exp(-40) of a vocabulary is nothing
    high_start, high = low, largest
    found_high = False
    for _step in range(14):
        middle = 0.5 * (low + low_end)
        at_middle = exp_of_difference(middle, largest, slope)
        dropped, slack = _dropped(group_weight, weight, at_middle, stands_for)
        is_low = dropped + slack <= goal
        low = tl.where(is_low, middle, low)
        low_end = tl.where(is_low, low_end, middle)
        middle = 0.5 * (high_start + high)
        at_middle = exp_of_difference(middle, largest, slope)
        dropped, slack = _dropped(group_weight, weight, at_middle, stands_for)
        is_high = dropped - slack >= goal
        found_high = found_high | is_high
        high = tl.where(is_high, middle, high)
        high_start = tl.where(is_high, high_start, middle)
    return low, tl.where(found_high, high, float("inf"))


@triton.jit
def bracket_kernel(
    logits_ptr,  # [n, vocab_size] float32, rows stride apart
    temperature_ptr,  # [n], as the next three
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    chunk_max_ptr,  # [n, num_chunks]
    chunk_sum_ptr,
    group_max_ptr,  # [n, num_groups]
    window_ptr,  # [n, 3] float32; a row without a filter gets NaN
    stride,
    vocab_size,
    num_chunks,
    num_groups,
    CHUNKS: tl.constexpr,  # powers of two, >= num_chunks and num_groups
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SAMPLE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Write each row's window, [its lower end, its upper end), and the lowest logit that min-p keeps.

    All three are logits before the temperature, and each the lowest of those that are equal after it.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    has_top_k = (top_k > 0) & (top_k < vocab_size)
    has_top_p = top_p < 1.0
    window = window_ptr + row * 3
    if (temperature < GREEDY_BELOW) | (not (has_top_k | has_top_p | (min_p > 0.0))):
        tl.store(window, float("nan"))
        return
    largest, is_finite, sums = row_stats(chunk_max_ptr, chunk_sum_ptr, row, num_chunks, temperature, CHUNKS)
    if not is_finite:
        tl.store(window, float("nan"))
        return
    floor = lowest_logit(_min_logit(tl.div_rn(largest, temperature), min_p), temperature)
    low, high = floor, float("inf")
    if not (has_top_k | has_top_p):
        high = floor
    elif vocab_size > CAPACITY:  # else everything is copied out
        group = tl.arange(0, GROUPS)
        group_max = tl.load(group_max_ptr + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
        if has_top_k:
            low = _low_of_top_k(group_max, largest, top_k)
        else:
            low, high = _ends_of_top_p(
                *(logits_ptr + row * stride, group_max_ptr + row * num_groups, group_max, sums, largest, floor),
                *(temperature, top_p, min_p, vocab_size, num_groups, GROUP, SAMPLE),
            )
        low = tl.maximum(floor, lowest_logit(tl.div_rn(low, temperature), temperature))
        high = tl.maximum(low, lowest_logit(tl.div_rn(high, temperature), temperature))
    tl.store(window, low)
    tl.store(window + 1, high)
    tl.store(window + 2, floor)


@triton.jit
def collect_kernel(
    logits_ptr,  # [n, vocab_size] float32, rows stride apart
    temperature_ptr,
    min_p_ptr,
    chunk_max_ptr,  # [n, num_chunks]
    window_ptr,  # [n, 3]
    above_ptr,  # [n, num_chunks] int64, weight of what lies above the window
    kept_ptr,  # [n, num_chunks] int64, weight of what min-p keeps; written where there is a min-p
    count_ptr,  # [n] int32, elements in the window
    values_ptr,  # [n, CAPACITY] float32, logits in the window
    columns_ptr,  # [n, CAPACITY] int32
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    UNIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    low = tl.load(window_ptr + row * 3)
    if low != low:
        return
    high = tl.load(window_ptr + row * 3 + 1)
    floor = tl.load(window_ptr + row * 3 + 2)
    index = tl.arange(0, CHUNKS)
    chunk_max = tl.load(chunk_max_ptr + row * num_chunks + index, mask=index < num_chunks, other=float("-inf"))
    largest = tl.max(chunk_max, axis=0)
    has_min_p = tl.load(min_p_ptr + row) > 0.0
    place = row * num_chunks + chunk
    if tl.load(chunk_max_ptr + place) < low:  # nothing here weighs enough
        tl.store(above_ptr + place, tl.zeros((), tl.int64))
        tl.store(kept_ptr + place, tl.zeros((), tl.int64))
        return
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    # A row with NaN in it has no window.
    x = tl.load(logits_ptr + row * stride + columns, mask=columns < vocab_size, other=float("-inf"))
    weights = weights_of(x, largest, tl.div_rn(LOG2_E, tl.load(temperature_ptr + row)), UNIT)
    tl.store(above_ptr + place, tl.sum(tl.where(x >= high, weights, 0), axis=0))
    if has_min_p:
        tl.store(kept_ptr + place, tl.sum(tl.where(x >= floor, weights, 0), axis=0))
    inside = (x >= low) & (x < high) & (x > float("-inf"))
    num_inside = tl.sum(inside.to(tl.int32), axis=0)
    if num_inside > 0:
        # Where a chunk's elements come to lie depends on which program is first: what is done with them must not.
        start = tl.atomic_add(count_ptr + row, num_inside, sem="relaxed")
        slot = start + tl.cumsum(inside.to(tl.int32), axis=0) - 1
        fits = inside & (slot < CAPACITY)
        tl.store(values_ptr + row * CAPACITY + slot, x, mask=fits)
        tl.store(columns_ptr + row * CAPACITY + slot, columns, mask=fits)
