"""The counter-based generator of `kernels.philox` in Triton, with the same bits.

Integers only: a draw stays the 53-bit whole number that the torch version divides by 2**53. Whoever compares it with a
distribution does so in integers as well, so that nothing depends on the rounding of floats, and no float64 is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(counter_0, counter_1, counter_2, counter_3, key_0, key_1):
    """Ten rounds of Philox4x32; all arguments and the four results are uint32.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    multiplier_0 = tl.full((), 0xD2511F53, tl.uint32)
    multiplier_2 = tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        previous_0, previous_2 = counter_0, counter_2
        counter_0 = tl.umulhi(multiplier_2, previous_2) ^ counter_1 ^ key_0
        counter_2 = tl.umulhi(multiplier_0, previous_0) ^ counter_3 ^ key_1
        counter_1 = multiplier_2 * previous_2
        counter_3 = multiplier_0 * previous_0
        key_0 += tl.full((), 0x9E3779B9, tl.uint32)
        key_1 += tl.full((), 0xBB67AE85, tl.uint32)
    return counter_0, counter_1, counter_2, counter_3


@triton.jit
def uniform_bits(seed, position):
    """`kernels.philox.uniform(seed, position) * 2**53` as a uint64; both arguments are int64."""
    zero = (position * 0).to(tl.uint32)
    word_0, word_1, _, _ = philox4x32(
        *(position.to(tl.uint32), (position >> 32).to(tl.uint32), zero, zero),
        *(seed.to(tl.uint32), (seed >> 32).to(tl.uint32)),
    )
    return (word_0.to(tl.uint64) << 21) | (word_1 >> 11).to(tl.uint64)


@triton.jit
def fraction_of(bits, total):
    """`floor(u * total)` exactly, for `bits = u * 2**53` (uint64) and `0 <= total < 2**63` (int64)."""
    return tl.umulhi(bits << 11, total.to(tl.uint64)).to(tl.int64)
