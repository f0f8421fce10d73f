"""The threshold of each row's filters among what its window held, and the draw among what they keep.

If a window missed the threshold or held too much (a top-k of thousands, or numbers laid out to defeat the sample), the
whole row is searched instead: slower, never wrong. A draw inverts the cumulative distribution in token-id order, as
`kernels.sampling` does. Float64 is used for a row's or a chunk's few scalars only, never for an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import COLUMN_BITS, KEYS_OF_VALUE, lowest_key, order_keys, ordered_bits
from .philox import fraction_of, uniform_bits
from .sampling_stats import GREEDY_BELOW, LOG2_E, NO_COLUMN, row_stats, weights_of
from .sampling_threshold import is_kept_by, least_key_of_enough, measure_row, search_row, share_of


@triton.jit
def _among_candidates(
    values_ptr,  # [count], logits in the row's window, in any order
    columns_ptr,
    count,
    above,  # [CHUNKS], weight of what lies above the window, by chunk
    kept,  # int64, weight of what min-p keeps
    low,  # the window's ends and the lowest key that min-p keeps
    high,
    floor,
    largest,
    temperature,
    top_k,  # 0: off
    top_p,
    bits,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SIZE: tl.constexpr,  # >= count
    UNIT: tl.constexpr,
):
    """Find the threshold and the token's chunk, if the window holds the threshold.

    Returns:
        Whether it does; the threshold's key; the chunk; the weight in that chunk before the token.
    """
    slope = tl.div_rn(LOG2_E, temperature)
    slot = tl.arange(0, SIZE)
    inside = slot < count
    x = tl.load(values_ptr + slot, mask=inside, other=float("-inf"))
    values = ordered_bits(tl.div_rn(x, temperature))
    if top_k > 0 and count > top_k:  # nothing lies above this window
        floor = least_key_of_enough(values, None, columns_ptr, count, 0, low, high, top_k, SIZE)
    # What is not there is -inf, and weighs nothing.
    columns = tl.load(columns_ptr + slot, mask=inside, other=NO_COLUMN)
    weights = tl.where(is_kept_by(values, columns, floor), weights_of(x, largest, slope, UNIT), 0)
    total_above = tl.sum(above, axis=0)
    fits = True
    if top_p < 1.0:
        reaches = total_above + tl.sum(weights, axis=0)
        if top_k > 0:
            kept = reaches
            low = floor
        enough = share_of(kept, top_p)
        if low == floor:  # all that is kept so far is here: if it does not suffice, rounding is the reason
            enough = tl.minimum(enough, reaches)
        fits = (total_above < enough) & (enough <= reaches)
        floor = least_key_of_enough(values, weights, columns_ptr, count, total_above, low, high, enough, SIZE)
    # What is dropped goes behind the last column.
    columns = tl.load(columns_ptr + slot, mask=inside, other=NO_COLUMN)
    columns = tl.where(is_kept_by(values, columns, floor), columns, NO_COLUMN)
    # The first chunk up to whose end more is kept than the draw asks for.
    index = tl.arange(0, CHUNKS)
    target = fraction_of(bits, total_above + tl.sum(tl.where(columns < NO_COLUMN, weights, 0), axis=0))
    chosen = 0
    last = num_chunks - 1
    while chosen < last:
        middle = (chosen + last) // 2
        up_to = tl.sum(tl.where(index <= middle, above, 0), axis=0)
        up_to += tl.sum(tl.where(columns < (middle + 1) * CHUNK, weights, 0), axis=0)
        last = tl.where(up_to > target, middle, last)
        chosen = tl.where(up_to > target, chosen, middle + 1)
    before = tl.sum(tl.where(index < chosen, above, 0), axis=0)
    before += tl.sum(tl.where(columns < chosen * CHUNK, weights, 0), axis=0)
    return fits, floor, chosen, target - before


@triton.jit
def _chunk_of(chunk_weights, bits, num_chunks, CHUNKS: tl.constexpr):
    """The chunk that a draw falls in, and how much of its weight lies before the token."""
    index = tl.arange(0, CHUNKS)
    target = fraction_of(bits, tl.sum(chunk_weights, axis=0))
    is_before = tl.cumsum(chunk_weights, axis=0) <= target
    chosen = tl.minimum(tl.sum(is_before.to(tl.int32), axis=0), num_chunks - 1)
    return chosen, target - tl.sum(tl.where(index < chosen, chunk_weights, 0), axis=0)


@triton.jit
def _in_whole_row(
    row_ptr, largest, temperature, top_k, top_p, floor, bits, vocab_size, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """As `_among_candidates`, by bisection over the whole row, from `floor` on: threshold, chunk, weight before."""
    if top_k > 0:
        floor = search_row(*(row_ptr, temperature, largest, floor, top_k, False, vocab_size, CHUNK, UNIT))
    if top_p < 1.0:
        _number, kept = measure_row(row_ptr, temperature, largest, floor, vocab_size, CHUNK, UNIT)
        enough = share_of(kept, top_p)
        floor = search_row(*(row_ptr, temperature, largest, floor, enough, True, vocab_size, CHUNK, UNIT))
    slope = tl.div_rn(LOG2_E, temperature)
    index = tl.arange(0, CHUNKS)
    kept_weights = tl.zeros((CHUNKS,), tl.int64)
    for chunk in range(0, num_chunks):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        is_kept = (order_keys(tl.div_rn(x, temperature), columns) >= floor) & (x > float("-inf"))
        weight = tl.sum(tl.where(is_kept, weights_of(x, largest, slope, UNIT), 0), axis=0)
        kept_weights = tl.where(index == chunk, weight, kept_weights)
    chosen, before = _chunk_of(kept_weights, bits, num_chunks, CHUNKS)
    return floor, chosen, before


@triton.jit
def _greedy_token(chunk_max, chunk_best):
    """The lowest column of the largest logit; -1 if that is not finite."""
    highest = tl.max(chunk_max, axis=0)
    token = tl.min(tl.where(chunk_max == highest, chunk_best, NO_COLUMN), axis=0)
    has_token = (highest > float("-inf")) & (highest < float("inf"))
    return tl.where(has_token, token, -1).to(tl.int64)


@triton.jit
def _filtered(
    row, row_ptr, top_k_ptr, top_p_ptr, min_p_ptr, window_ptr, above_ptr, kept_ptr, count_ptr, values_ptr, columns_ptr,
    floor, low_logit, largest, temperature, chunk_weights, bits, vocab_size, num_chunks,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, CAPACITY: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A row with filters: its threshold, the chunk that the draw falls in, and the weight there before the token.

    Args:
        floor: the lowest key of a finite number.
        low_logit: the window's lower end.
        chunk_weights: what each chunk weighs without filters.
    """
    index = tl.arange(0, CHUNKS)
    is_chunk = index < num_chunks
    place = row * num_chunks + index
    floor = tl.maximum(floor, lowest_key(tl.div_rn(tl.load(window_ptr + row * 3 + 2), temperature)))
    low = tl.maximum(floor, lowest_key(tl.div_rn(low_logit, temperature)))
    # No key is as large as the first of the value above the largest.
    high_value = tl.div_rn(tl.load(window_ptr + row * 3 + 1), temperature)
    too_high = lowest_key(tl.div_rn(largest, temperature)) + KEYS_OF_VALUE
    high = tl.minimum(lowest_key(high_value), too_high)
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where((top_k > 0) & (top_k < vocab_size), top_k, 0)
    top_p = tl.load(top_p_ptr + row)
    above = tl.load(above_ptr + place, mask=is_chunk, other=0)
    kept = tl.sum(chunk_weights, axis=0)
    if tl.load(min_p_ptr + row) > 0.0:
        kept = tl.sum(tl.load(kept_ptr + place, mask=is_chunk, other=0), axis=0)
    count = tl.load(count_ptr + row)
    values, columns = values_ptr + row * CAPACITY, columns_ptr + row * CAPACITY
    chosen, before = 0, tl.zeros((), tl.int64)
    fits = False
    key = floor
    small: tl.constexpr = 1024 if CAPACITY > 1024 else CAPACITY
    if count <= small:
        fits, key, chosen, before = _among_candidates(
            *(values, columns, count, above, kept, low, high, floor, largest, temperature, top_k, top_p),
            *(bits, num_chunks, CHUNK, CHUNKS, small, UNIT),
        )
    elif count <= CAPACITY:
        fits, key, chosen, before = _among_candidates(
            *(values, columns, count, above, kept, low, high, floor, largest, temperature, top_k, top_p),
            *(bits, num_chunks, CHUNK, CHUNKS, CAPACITY, UNIT),
        )
    if fits:
        floor = key
    else:
        floor, chosen, before = _in_whole_row(
            *(row_ptr, largest, temperature, top_k, top_p, floor, bits, vocab_size, num_chunks, CHUNK, CHUNKS, UNIT)
        )
    return floor, chosen, before


@triton.jit
def choose_kernel(
    logits_ptr,  # [n, vocab_size] float32, rows stride apart
    temperature_ptr,  # [n], as all up to positions_ptr
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    chunk_max_ptr,  # [n, num_chunks], as the next two
    chunk_sum_ptr,
    chunk_best_ptr,
    window_ptr,  # [n, 3]; this and the next five are None where no row has a filter
    above_ptr,  # [n, num_chunks]
    kept_ptr,
    count_ptr,  # [n]
    values_ptr,  # [n, CAPACITY]
    columns_ptr,
    out_ptr,  # [n] int64
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    UNIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    index = tl.arange(0, CHUNKS)
    is_chunk = index < num_chunks
    place = row * num_chunks + index
    if temperature < GREEDY_BELOW:
        chunk_max = tl.load(chunk_max_ptr + place, mask=is_chunk, other=float("-inf"))
        best = tl.load(chunk_best_ptr + place, mask=is_chunk, other=NO_COLUMN)
        tl.store(out_ptr + row, _greedy_token(chunk_max, best))
        return
    largest, is_finite, sums = row_stats(chunk_max_ptr, chunk_sum_ptr, row, num_chunks, temperature, CHUNKS)
    if not is_finite:
        tl.store(out_ptr + row, -1 + row * 0)
        return

    bits = uniform_bits(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    row_ptr = logits_ptr + row * stride
    floor = (row * 0 - 0x7F7FFFFF - 1) << COLUMN_BITS  # the lowest key of a finite number
    # Of a row without filters, chunks are weighed by their sums, and the chosen one's elements beside its own largest.
    chunk_weights = (sums * UNIT).to(tl.int64)
    chosen, before, whole = 0, tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    is_filtered = False
    if window_ptr is not None:
        low_logit = tl.load(window_ptr + row * 3)
        is_filtered = low_logit == low_logit
        if is_filtered:
            floor, chosen, before = _filtered(
                *(row, row_ptr, top_k_ptr, top_p_ptr, min_p_ptr, window_ptr, above_ptr, kept_ptr, count_ptr),
                *(values_ptr, columns_ptr, floor, low_logit, largest, temperature, chunk_weights, bits),
                *(vocab_size, num_chunks, CHUNK, CHUNKS, CAPACITY, UNIT),
            )
    if not is_filtered:
        chosen, before = _chunk_of(chunk_weights, bits, num_chunks, CHUNKS)
        whole = tl.sum(tl.where(index == chosen, chunk_weights, 0), axis=0)

    # Once more the chosen chunk: `before` of its weight lies before the token.
    token_ids = chosen * CHUNK + tl.arange(0, CHUNK)
    y = tl.load(row_ptr + token_ids, mask=token_ids < vocab_size, other=float("-inf"))
    base = largest
    if not is_filtered:
        base = tl.load(chunk_max_ptr + row * num_chunks + chosen)
    is_kept = (order_keys(tl.div_rn(y, temperature), token_ids) >= floor) & (y > float("-inf"))
    chunk_weight = tl.where(is_kept, weights_of(y, base, tl.div_rn(LOG2_E, temperature), UNIT), 0)
    if not is_filtered:
        total = tl.sum(chunk_weight, axis=0)
        part = before.to(tl.float64) / tl.maximum(whole, 1).to(tl.float64) * total.to(tl.float64)
        before = tl.minimum(part.to(tl.int64), total - 1)
    token = tl.min(tl.where(tl.cumsum(chunk_weight, axis=0) > before, token_ids, NO_COLUMN), axis=0)
    tl.store(out_ptr + row, token.to(tl.int64))
