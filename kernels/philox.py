"""Chance as a function: the counter-based generator Philox4x32-10.

A draw is a hash of a key and a counter, without state, so the number for (seed, position) is the same whoever asks,
in whatever order, alone or among others.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xCD9E8D57, 0xD2511F53)  # for counter words 2 and 0, in this order: see `philox4x32`
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_NUM_ROUNDS = 10


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Hash counters with keys by ten rounds of Philox4x32.

    Args:
        counter: `[4, N]` int64, each a 32-bit word in [0, 2**32).
        key: `[2, N]` int64, likewise.

    Returns:
        `[4, N]` int64, four random 32-bit words for each column.
    """
    device = counter.device
    multipliers = torch.tensor(_MULTIPLIERS, dtype=torch.int64, device=device).unsqueeze(1)
    rounds = torch.arange(_NUM_ROUNDS, dtype=torch.int64, device=device).view(-1, 1, 1)
    steps = torch.tensor(_KEY_STEPS, dtype=torch.int64, device=device).unsqueeze(1)
    round_keys = (key + rounds * steps) & _MASK32  # [rounds, 2, N]
    # A round maps (c0, c1, c2, c3) to (hi(m2 c2) ^ c1 ^ k0, lo(m2 c2), hi(m0 c0) ^ c3 ^ k1, lo(m0 c0)): kept as the
    # pairs even = (c2, c0) and odd = (c1, c3), so that one tensor operation does both halves.
    even = counter[[2, 0]]
    odd = counter[[1, 3]]
    for round_key in round_keys.unbind(0):
        # The product wraps in int64, yet its 64 bits are right; masking undoes the sign extension of the shift.
        product = even * multipliers
        even = (((product >> 32) & _MASK32) ^ odd ^ round_key).flip(0)  # (new c0, new c2) to (new c2, new c0)
        odd = product & _MASK32
    return torch.stack((even[1], odd[0], even[0], odd[1]))


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one number in [0, 1) for each (seed, position), with 53 random bits.

    The seed is the key, the position the counter's low 64 bits; the high 64 are zero here and free for other purposes.

    Args:
        seeds: int64, any shape; the 64 bits of an unsigned seed, reinterpreted.
        positions: int64, same shape, >= 0.

    Returns:
        float64, same shape.
    """
    shape = seeds.shape
    seeds, positions = seeds.reshape(-1), positions.reshape(-1)
    zero = torch.zeros_like(positions)
    counter = torch.stack((positions & _MASK32, (positions >> 32) & _MASK32, zero, zero))
    key = torch.stack((seeds & _MASK32, (seeds >> 32) & _MASK32))
    words = philox4x32(counter, key)
    bits = (words[0] << 21) | (words[1] >> 11)  # 32 + 21 bits, so the conversion is exact
    return (bits.to(torch.float64) * 2.0**-53).reshape(shape)
