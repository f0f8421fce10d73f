"""Codes as they lie in memory."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.code_layout import NIBBLE_ROWS, codes_shape, pack_nibbles, unpack_nibbles


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 64), (7, 128), (8, 64), (21, 192)])
def test_what_is_packed_is_unpacked(out_features: int, in_features: int) -> None:
    codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert tuple(packed.shape) == codes_shape(out_features, in_features, 4)
    assert torch.equal(unpack_nibbles(packed, out_features), codes)


def test_a_code_stands_where_the_kernels_look_for_it() -> None:
    row, column = 11, 64 + 32 + 4 * 5 + 3
    codes = torch.zeros((16, 128), dtype=torch.uint8)
    codes[row, column] = 9
    packed = pack_nibbles(codes)
    block, unit = row // NIBBLE_ROWS, column // 64
    assert packed[block, 256 * unit + 32 * 5 + 4 * (row % NIBBLE_ROWS) + 3] == 9 << 4
    assert packed.count_nonzero() == 1


def test_codes_of_eight_bits_are_one_to_a_byte() -> None:
    assert codes_shape(5, 128, 8) == (5, 128)
