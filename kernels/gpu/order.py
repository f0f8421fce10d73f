"""Numbers that order a row's elements by (larger value, lower column), in Triton: see `kernels.sampling.order_keys`."""

from __future__ import annotations

import triton
import triton.language as tl

COLUMN_BITS = tl.constexpr(19)
MAX_VOCAB_SIZE = 1 << 19
KEYS_OF_VALUE = tl.constexpr(1 << 19)
LAST_COLUMN = tl.constexpr((1 << 19) - 1)


@triton.jit
def ordered_bits(x):
    """Float32 without NaN as int32 of the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0: makes -0.0 equal to 0.0
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def order_keys(x, columns):
    """A distinct int64 for each element; larger for a larger value, among equals for a lower column."""
    return (ordered_bits(x).to(tl.int64) << COLUMN_BITS) | (columns ^ LAST_COLUMN)


@triton.jit
def lowest_key(x):
    """The smallest key that an element of value `x` can have."""
    return ordered_bits(x).to(tl.int64) << COLUMN_BITS


@triton.jit
def float_of(key):
    """Undo `ordered_bits`; `key` is of any signed integer type."""
    bits = key.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def value_of(key):
    """The value of an element with this key."""
    return float_of(key >> COLUMN_BITS)


@triton.jit
def column_of(key):
    """The column of an element with this key, int32."""
    return ((key & LAST_COLUMN) ^ LAST_COLUMN).to(tl.int32)


@triton.jit
def halfway(low, high, by_value):
    """A key strictly between `low` and `high - 1`, or at an end of them: `low < key < high`, where `high - low > 1`.

    Halving the values goes fast where they are spread evenly, as logits are; halving the keys always comes to an end.
    """
    middle = low + ((high - low) >> 1)
    linear = lowest_key(0.5 * value_of(low) + 0.5 * value_of(high))
    usable = by_value & (linear > low) & (linear < high)
    return tl.where(usable, linear, middle)
