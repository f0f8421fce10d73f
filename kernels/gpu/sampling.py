"""Sampling on a GPU: any mix of temperature, top-k, top-p and min-p, in a fixed number of launches, without a sort.

    stats    every chunk of every row: largest logit, sum of exponentials, largest logit of each group of 64 columns
    bracket  one program a row: from these and a sample of the row, a window of values in which the threshold must lie
    collect  every chunk: what weighs more than the window is summed up, what lies in it is copied out
    choose   one program a row: the exact threshold among what was copied, then the draw, then one chunk once more

A row is read twice, or once where nothing is filtered: then only `stats` and `choose` do something. If a window missed
the threshold or holds too much (a top-k of thousands, or numbers laid out to defeat the sample), `choose` bisects over
the whole row instead: slower, never wrong.

Sums that decide anything are sums of integers: an element weighs `exp(x - largest)` in units of 2**-44 or so. They do
not depend on the order of addition, so neither on the batch nor on which program was first. The one exception is the
sum of a chunk's exponentials, a fixed tree. A draw inverts the cumulative distribution in token-id order, as
`kernels.sampling` does. Float64 is used for a row's or a chunk's few scalars only, never for an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..sampling import GREEDY_EPS
from .order import (
    COLUMN_BITS,
    KEYS_OF_VALUE,
    LAST_COLUMN,
    MAX_VOCAB_SIZE,
    column_of,
    float_of,
    halfway,
    lowest_key,
    order_keys,
    ordered_bits,
)
from .philox import fraction_of, uniform_bits

GROUP_SIZE = 64  # columns whose largest logit is kept
CHUNK_SIZE = 2048  # columns of one program; a row's bits depend on it, so it must not follow from the batch
CAPACITY = 8192  # elements that a window may hold: 32 a thread in `choose`
SAMPLE_SIZE = 8192  # elements that `bracket` looks at, in runs of _RUN
_RUN = 8  # one sector of memory

_GREEDY_BELOW = tl.constexpr(GREEDY_EPS)
_RUN_LENGTH = tl.constexpr(_RUN)
_NO_COLUMN = tl.constexpr(1 << 30)
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
def _weights(x, largest, slope, UNIT: tl.constexpr):
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
    if temperature < _GREEDY_BELOW:
        best = tl.where(x == largest, columns, _NO_COLUMN)
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
def _bracket_kernel(
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
    if (temperature < _GREEDY_BELOW) | (not (has_top_k | has_top_p | (min_p > 0.0))):
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
            # As many groups as top_k reach up to a value, so as many elements do: the threshold is not below it.
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
        else:
            # What lies below a value is estimated: the largest of each group are known, the others are sampled.
            slope = tl.div_rn(LOG2_E, temperature)
            element = tl.arange(0, SAMPLE)
            run = (element // _RUN_LENGTH).to(tl.int64)
            columns = (run * (vocab_size // _RUN_LENGTH) // (SAMPLE // _RUN_LENGTH)) * _RUN_LENGTH
            columns += element % _RUN_LENGTH
            x = tl.load(logits_ptr + row * stride + columns)
            others = x < tl.load(group_max_ptr + row * num_groups + columns // GROUP)
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
            high = tl.where(found_high, high, float("inf"))
        low = tl.maximum(floor, lowest_logit(tl.div_rn(low, temperature), temperature))
        high = tl.maximum(low, lowest_logit(tl.div_rn(high, temperature), temperature))
    tl.store(window, low)
    tl.store(window + 1, high)
    tl.store(window + 2, floor)


@triton.jit
def _collect_kernel(
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
    weights = _weights(x, largest, tl.div_rn(LOG2_E, tl.load(temperature_ptr + row)), UNIT)
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


@triton.jit
def _weight_of(is_meant, weights):
    """What the meant elements weigh; `weights` None: how many they are."""
    if weights is None:
        return tl.sum(is_meant.to(tl.int64), axis=0)
    else:
        return tl.sum(tl.where(is_meant, weights, 0), axis=0)


@triton.jit
def _least_key_of_enough(values, weights, columns_ptr, count, base, low, high, enough, SIZE: tl.constexpr):
    """The largest key whose elements, with all larger ones and `base`, weigh `enough`.

    Values are searched first, and the columns of equals only where there are any: fewer bits, and fewer registers.

    Args:
        values: `[SIZE]`, ordered bits of the elements.
        weights: `[SIZE]` int64, 0 for those that do not count; None: each weighs 1.
        columns_ptr: `[count]`, their columns.
        base: weight of elements that are not among them, all with larger keys.
        low: a key that is low enough; all elements below its value weigh 0.
        high: a key that is too high, the lowest of its value.
        enough: > base, and not more than there is.
    """
    low_value = low >> COLUMN_BITS
    high_value = high >> COLUMN_BITS
    num_between = tl.sum(((values >= low_value.to(tl.int32)) & (values < high_value.to(tl.int32))).to(tl.int32), axis=0)
    turn = 0
    while (high_value - low_value > 1) & (num_between > 1):
        middle = low_value + ((high_value - low_value) >> 1)
        # Halving the numbers goes fast where they are spread evenly; halving their bits always comes to an end.
        linear = ordered_bits(0.5 * float_of(low_value) + 0.5 * float_of(high_value)).to(tl.int64)
        middle = tl.where((turn % 2 == 0) & (linear > low_value) & (linear < high_value), linear, middle)
        is_enough = base + _weight_of(values >= middle.to(tl.int32), weights) >= enough
        low_value = tl.where(is_enough, middle, low_value)
        high_value = tl.where(is_enough, high_value, middle)
        num_between = tl.sum(
            ((values >= low_value.to(tl.int32)) & (values < high_value.to(tl.int32))).to(tl.int32), axis=0
        )
        turn += 1
    value = tl.min(tl.where(values >= low_value.to(tl.int32), values, 0x7FFFFFFF), axis=0)
    key = value.to(tl.int64) << COLUMN_BITS
    if tl.sum((values == value).to(tl.int32), axis=0) > 1:
        slot = tl.arange(0, SIZE)
        columns = tl.load(columns_ptr + slot, mask=slot < count, other=_NO_COLUMN)
        larger = base + _weight_of(values > value, weights)
        first = -1
        last = (key * 0).to(tl.int32) + LAST_COLUMN
        while last - first > 1:
            column = (first + last) // 2
            is_enough = larger + _weight_of((values == value) & (columns <= column), weights) >= enough
            first = tl.where(is_enough, first, column)
            last = tl.where(is_enough, column, last)
        key = key | (last ^ LAST_COLUMN)
    return key


@triton.jit
def _measure_row(row_ptr, temperature, largest, key, vocab_size, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Number and weight of a row's elements with this key or a larger one."""
    slope = tl.div_rn(LOG2_E, temperature)
    counts = tl.zeros((CHUNK,), tl.int32)
    weights = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, vocab_size, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        is_kept = (order_keys(tl.div_rn(x, temperature), columns) >= key) & (x > float("-inf"))
        counts += is_kept.to(tl.int32)
        weights += tl.where(is_kept, _weights(x, largest, slope, UNIT), 0)
    return tl.sum(counts, axis=0), tl.sum(weights, axis=0)


@triton.jit
def _search_row(
    row_ptr, temperature, largest, low, enough, BY_WEIGHT: tl.constexpr, vocab_size, CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """As `_least_key_of_enough`, over a whole row; `low` if even that is not enough."""
    high = lowest_key(tl.div_rn(largest, temperature)) + (KEYS_OF_VALUE)
    count_low, weight_low = _measure_row(row_ptr, temperature, largest, low, vocab_size, CHUNK, UNIT)
    count_high = tl.zeros((), tl.int32)
    if BY_WEIGHT:
        is_enough = weight_low >= enough
    else:
        is_enough = count_low >= enough
    turn = 0
    while is_enough & (high - low > 1) & (count_low - count_high > 1):
        middle = halfway(low, high, turn % 2 == 0)
        count, weight = _measure_row(row_ptr, temperature, largest, middle, vocab_size, CHUNK, UNIT)
        if BY_WEIGHT:
            is_low = weight >= enough
        else:
            is_low = count >= enough
        low = tl.where(is_low, middle, low)
        count_low = tl.where(is_low, count, count_low)
        high = tl.where(is_low, high, middle)
        count_high = tl.where(is_low, count_high, count)
        turn += 1
    return low


@triton.jit
def _share(total, top_p):
    """`max(1, ceil(total * top_p))`."""
    product = total.to(tl.float64) * top_p.to(tl.float64)
    share = product.to(tl.int64)
    share += (share.to(tl.float64) < product).to(tl.int64)
    return tl.maximum(share, 1)


@triton.jit
def _is_kept(values, columns, floor):
    """Whether the keys of elements are at least `floor`."""
    value = (floor >> COLUMN_BITS).to(tl.int32)
    return (values > value) | ((values == value) & (columns <= column_of(floor)))


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
        floor = _least_key_of_enough(values, None, columns_ptr, count, 0, low, high, top_k, SIZE)
    # What is not there is -inf, and weighs nothing.
    columns = tl.load(columns_ptr + slot, mask=inside, other=_NO_COLUMN)
    weights = tl.where(_is_kept(values, columns, floor), _weights(x, largest, slope, UNIT), 0)
    total_above = tl.sum(above, axis=0)
    fits = True
    if top_p < 1.0:
        reaches = total_above + tl.sum(weights, axis=0)
        if top_k > 0:
            kept = reaches
            low = floor
        enough = _share(kept, top_p)
        if low == floor:  # all that is kept so far is here: if it does not suffice, rounding is the reason
            enough = tl.minimum(enough, reaches)
        fits = (total_above < enough) & (enough <= reaches)
        floor = _least_key_of_enough(values, weights, columns_ptr, count, total_above, low, high, enough, SIZE)
    # What is dropped goes behind the last column.
    columns = tl.load(columns_ptr + slot, mask=inside, other=_NO_COLUMN)
    columns = tl.where(_is_kept(values, columns, floor), columns, _NO_COLUMN)
    # The first chunk up to whose end more is kept than the draw asks for.
    index = tl.arange(0, CHUNKS)
    target = fraction_of(bits, total_above + tl.sum(tl.where(columns < _NO_COLUMN, weights, 0), axis=0))
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
def _choose_kernel(
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
    if temperature < _GREEDY_BELOW:
        chunk_max = tl.load(chunk_max_ptr + place, mask=is_chunk, other=float("-inf"))
        best = tl.load(chunk_best_ptr + place, mask=is_chunk, other=_NO_COLUMN)
        highest = tl.max(chunk_max, axis=0)
        token = tl.min(tl.where(chunk_max == highest, best, _NO_COLUMN), axis=0)
        has_token = (highest > float("-inf")) & (highest < float("inf"))
        tl.store(out_ptr + row, tl.where(has_token, token, -1).to(tl.int64))
        return
    largest, is_finite, sums = row_stats(chunk_max_ptr, chunk_sum_ptr, row, num_chunks, temperature, CHUNKS)
    if not is_finite:
        tl.store(out_ptr + row, -1 + row * 0)
        return

    bits = uniform_bits(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    row_ptr = logits_ptr + row * stride
    slope = tl.div_rn(LOG2_E, temperature)
    floor = (row * 0 - 0x7F7FFFFF - 1) << COLUMN_BITS  # the lowest key of a finite number
    # Of a row without filters, chunks are weighed by their sums, and the chosen one's elements beside its own largest.
    chunk_weights = (sums * UNIT).to(tl.int64)
    chosen, before, whole = 0, tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    is_filtered = False
    if window_ptr is not None:
        low_logit = tl.load(window_ptr + row * 3)
        is_filtered = low_logit == low_logit
        if is_filtered:
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
                if top_k > 0:
                    floor = _search_row(
                        *(row_ptr, temperature, largest, floor, top_k, False, vocab_size, CHUNK, UNIT),
                    )
                if top_p < 1.0:
                    _number, kept = _measure_row(row_ptr, temperature, largest, floor, vocab_size, CHUNK, UNIT)
                    enough = _share(kept, top_p)
                    floor = _search_row(
                        *(row_ptr, temperature, largest, floor, enough, True, vocab_size, CHUNK, UNIT),
                    )
                kept_weights = tl.zeros((CHUNKS,), tl.int64)
                for chunk in range(0, num_chunks):
                    chunk_columns = chunk * CHUNK + tl.arange(0, CHUNK)
                    x = tl.load(row_ptr + chunk_columns, mask=chunk_columns < vocab_size, other=float("-inf"))
                    is_kept = (order_keys(tl.div_rn(x, temperature), chunk_columns) >= floor) & (x > float("-inf"))
                    weight = tl.sum(tl.where(is_kept, _weights(x, largest, slope, UNIT), 0), axis=0)
                    kept_weights = tl.where(index == chunk, weight, kept_weights)
                chosen, before = _chunk_of(kept_weights, bits, num_chunks, CHUNKS)
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
    chunk_weight = tl.where(is_kept, _weights(y, base, slope, UNIT), 0)
    if not is_filtered:
        total = tl.sum(chunk_weight, axis=0)
        part = before.to(tl.float64) / tl.maximum(whole, 1).to(tl.float64) * total.to(tl.float64)
        before = tl.minimum(part.to(tl.int64), total - 1)
    token = tl.min(tl.where(tl.cumsum(chunk_weight, axis=0) > before, token_ids, _NO_COLUMN), axis=0)
    tl.store(out_ptr + row, token.to(tl.int64))


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
        _bracket_kernel[(num_rows,)](
            *(logits, temperature, top_k, top_p, min_p, chunk_max, chunk_sum, group_max, window, *sizes, num_groups),
            CHUNKS=chunks,
            GROUPS=triton.next_power_of_2(num_groups),
            GROUP=GROUP_SIZE,
            SAMPLE=SAMPLE_SIZE,
            CAPACITY=capacity,
            num_warps=16,
        )
        _collect_kernel[(num_rows, num_chunks)](
            *(logits, temperature, min_p, chunk_max, window, above, kept, count, values, columns, *sizes),
            CHUNK=chunk,
            CHUNKS=chunks,
            CAPACITY=capacity,
            UNIT=unit,
            num_warps=max(1, chunk // 256),  # eight elements a thread: their weights are 64 bits wide
        )
    _choose_kernel[(num_rows,)](
        *(logits, temperature, top_k, top_p, min_p, seeds, positions, chunk_max, chunk_sum, chunk_best),
        *(window, above, kept, count, values, columns, out, *sizes),
        CHUNK=chunk,
        CHUNKS=chunks,
        CAPACITY=capacity,
        UNIT=unit,
        num_warps=8,  # with twice as many, a thread's half of the registers does not hold its candidates
    )
    return out
