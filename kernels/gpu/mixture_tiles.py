"""The tiles of a mixture's grouped products, by how many rows an expert has on the average."""

from __future__ import annotations

from dataclasses import dataclass

from .launch import is_interpreted


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a grouped product's programs; `up` and `down` are `(block_n, block_k, num_warps, num_stages)`."""

    block_m: int
    up: tuple[int, int, int, int]
    down: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class CodeTiles:
    """As `Tiles`; `up` and `down` are `(block_n, num_warps, num_stages)`: inputs come unit by unit of the codes."""

    block_m: int
    up: tuple[int, int, int]
    down: tuple[int, int, int]


# By BLOCK_M: rows of an expert that one program takes. The first are bound by memory, the last by arithmetic: there
# each of two warp groups multiplies 64 rows, and gate and up together are as wide as down's tile.
TILES = {
    16: Tiles(16, up=(32, 128, 4, 4), down=(32, 256, 4, 4)),
    32: Tiles(32, up=(64, 128, 4, 3), down=(64, 128, 4, 4)),
    64: Tiles(64, up=(64, 64, 4, 4), down=(128, 64, 4, 4)),
    128: Tiles(128, up=(128, 64, 8, 3), down=(256, 64, 8, 3)),
}

# The same for weights that are codes, 64 of whose rows at least fill the tensor cores' instructions from the left.
CODE_TILES = {
    16: CodeTiles(16, up=(64, 4, 5), down=(64, 4, 6)),
    32: CodeTiles(32, up=(64, 4, 4), down=(64, 4, 5)),
    64: CodeTiles(64, up=(64, 4, 4), down=(64, 4, 4)),
    128: CodeTiles(128, up=(128, 8, 3), down=(128, 8, 3)),
}
_FULL_AT = {16: 12, 32: 24, 64: 192}  # rows of an expert up to which a block of so many is taken, on the average


def tiles_for(num_pairs: int, num_experts: int, itemsize: int, *, batch_invariant: bool) -> Tiles:
    """The tiles for so many pairs; always the same ones where bits must not depend on how many there are."""
    block_m = _block_m(num_pairs, num_experts, batch_invariant=batch_invariant)
    if is_interpreted():
        return Tiles(min(block_m, 32), up=(16, 32, 4, 1), down=(32, 16, 4, 1))
    if itemsize > 2:  # float32 is not multiplied by tensor cores: small tiles, that fit the registers
        return Tiles(min(block_m, 32), up=(32, 32, 4, 2), down=(32, 32, 4, 2))
    return TILES[block_m]


def code_tiles_for(num_pairs: int, num_experts: int, itemsize: int, *, batch_invariant: bool) -> CodeTiles:
    """As `tiles_for`, for weights that are codes."""
    block_m = _block_m(num_pairs, num_experts, batch_invariant=batch_invariant)
    if is_interpreted():
        return CodeTiles(min(block_m, 32), up=(16, 4, 1), down=(32, 4, 1))
    if itemsize > 2:
        return CodeTiles(min(block_m, 32), up=(32, 4, 2), down=(32, 4, 2))
    return CODE_TILES[block_m]


def _block_m(num_pairs: int, num_experts: int, *, batch_invariant: bool) -> int:
    rows = num_pairs / num_experts
    return 64 if batch_invariant else next((m for m, most in _FULL_AT.items() if rows <= most), 128)
