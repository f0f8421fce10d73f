"""Searches for a threshold: the largest key from which on elements are as many, or weigh as much, as is asked for.

Among a row's candidates, which lie in registers, or, where those missed it, over the whole row, again and again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .order import (
    COLUMN_BITS,
    KEYS_OF_VALUE,
    LAST_COLUMN,
    column_of,
    float_of,
    halfway,
    lowest_key,
    order_keys,
    ordered_bits,
)
from .sampling_stats import LOG2_E, NO_COLUMN, weights_of


@triton.jit
def _weight_of(is_meant, weights):
    """What the meant elements weigh; `weights` None: how many they are."""
    if weights is None:
        return tl.sum(is_meant.to(tl.int64), axis=0)
    else:
        return tl.sum(tl.where(is_meant, weights, 0), axis=0)


@triton.jit
def least_key_of_enough(values, weights, columns_ptr, count, base, low, high, enough, SIZE: tl.constexpr):
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
        columns = tl.load(columns_ptr + slot, mask=slot < count, other=NO_COLUMN)
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
def measure_row(row_ptr, temperature, largest, key, vocab_size, CHUNK: tl.constexpr, UNIT: tl.constexpr):
    """Number and weight of a row's elements with this key or a larger one."""
    slope = tl.div_rn(LOG2_E, temperature)
    counts = tl.zeros((CHUNK,), tl.int32)
    weights = tl.zeros((CHUNK,), tl.int64)
    for start in range(0, vocab_size, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        is_kept = (order_keys(tl.div_rn(x, temperature), columns) >= key) & (x > float("-inf"))
        counts += is_kept.to(tl.int32)
        weights += tl.where(is_kept, weights_of(x, largest, slope, UNIT), 0)
    return tl.sum(counts, axis=0), tl.sum(weights, axis=0)


@triton.jit
def search_row(
    row_ptr, temperature, largest, low, enough, BY_WEIGHT: tl.constexpr, vocab_size, CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """As `least_key_of_enough`, over a whole row; `low` if even that is not enough."""
    high = lowest_key(tl.div_rn(largest, temperature)) + (KEYS_OF_VALUE)
    count_low, weight_low = measure_row(row_ptr, temperature, largest, low, vocab_size, CHUNK, UNIT)
    count_high = tl.zeros((), tl.int32)
    if BY_WEIGHT:
        is_enough = weight_low >= enough
    else:
        is_enough = count_low >= enough
    turn = 0
    while is_enough & (high - low > 1) & (count_low - count_high > 1):
        middle = halfway(low, high, turn % 2 == 0)
        count, weight = measure_row(row_ptr, temperature, largest, middle, vocab_size, CHUNK, UNIT)
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
def share_of(total, top_p):
    """`max(1, ceil(total * top_p))`."""
    product = total.to(tl.float64) * top_p.to(tl.float64)
    share = product.to(tl.int64)
    share += (share.to(tl.float64) < product).to(tl.int64)
    return tl.maximum(share, 1)


@triton.jit
def is_kept_by(values, columns, floor):
    """Whether the keys of elements are at least `floor`."""
    value = (floor >> COLUMN_BITS).to(tl.int32)
    return (values > value) | ((values == value) & (columns <= column_of(floor)))
