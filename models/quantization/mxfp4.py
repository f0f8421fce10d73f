"""MXFP4, in which GPT-OSS's experts are stored: 4-bit floats, 32 of which share a power of two.

Source: Open Compute Project 2023 (Microscaling Formats), sections 5.3.3 (E2M1) and 5.4.1 (E8M0).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

from ...kernels.expert_codes import MOST_EXPONENT, ExpertCodes
from ...kernels.huge_pages import release_file_pages
from ...kernels.quantized_weight import LinearWeight
from ..random_weights import RandomReader
from ..weights import ALL, WeightReader

GROUP = 32  # weights, consecutive inputs of an output, that share a power of two

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the lower three bits; the fourth is the sign
_NOT_A_NUMBER = 255
_BFLOAT16_NAN = 0x7FC0
_MANTISSA_BITS = 7  # of a bfloat16, whose exponent has the same offset of 127
_RANDOM_EXPONENT = 120  # of random codes, whose root mean square is 2.9: weights as other random ones


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights that codes and exponents stand for, each exact in bfloat16.

    Args:
        blocks: `[..., num_groups, 16]` uint8: two codes a byte, the first in the lower half.
        scales: `[..., num_groups]` uint8: the exponent of the power of two, and 127.

    Returns:
        `[..., num_groups * 32]` bfloat16; NaN where an exponent is 255.
    """
    # A byte's two weights are looked up as one number of 32 bits, and a power of two is an exponent without a mantissa:
    # a checkpoint of 20 billion weights must not take minutes.
    codes = torch.arange(256, device=blocks.device)
    values = torch.tensor((*_VALUES, *(-value for value in _VALUES)), dtype=torch.bfloat16, device=blocks.device)
    pairs = torch.stack((values[codes & 15], values[codes >> 4]), dim=-1).view(torch.int32).flatten()
    weights = pairs.index_select(0, blocks.flatten().to(torch.int32)).view(torch.bfloat16)
    powers = scales.to(torch.int16) << _MANTISSA_BITS
    powers[powers == 0] = 1 << (_MANTISSA_BITS - 1)  # 2 ** -127 is below the normal numbers
    powers[scales == _NOT_A_NUMBER] = _BFLOAT16_NAN
    return weights.view(*scales.shape, GROUP).mul_(powers.view(torch.bfloat16).unsqueeze(-1)).flatten(-2)


class MXFP4Reader(WeightReader):
    """Reads a checkpoint whose experts are in MXFP4, one expert at a time; all else is floating there.

    On a GPU they stay codes, where a rank's part has whole groups; else they become floats.
    """

    @property
    def keeps_codes(self) -> bool:
        """Whether there are products with codes on this device."""
        return self.device.type == "cuda"

    def take_expert_codes(
        self,
        name: str,
        shape: tuple[int, int, int],
        experts: range,
        *,
        takes_turns: bool = False,
        rows: slice = ALL,
        columns: slice = ALL,
    ) -> ExpertCodes | None:
        """See `WeightReader.take_expert_codes`."""
        num_experts, in_features, out_features = shape
        groups = _whole_groups(columns, in_features)
        if not self.keeps_codes or name in self or groups is None:
            return None
        exponents_shape = (num_experts, out_features, -(-in_features // GROUP))
        exponents: list[torch.Tensor] = []
        for index in experts:
            one = self._read_bytes(f"{name}_scales", exponents_shape, index)
            if one is None or int(one.max()) > MOST_EXPONENT:
                return None
            exponents.append(one)
        blocks_shape = (*exponents_shape, GROUP // 2)
        if self._read_bytes(f"{name}_blocks", blocks_shape, experts.start) is None:
            return None

        def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for index, one in zip(experts, exponents, strict=True):
                blocks = self._read_bytes(f"{name}_blocks", blocks_shape, index)
                assert blocks is not None, "the first expert's were there"
                # On the device they are picked apart.
                both = (stored.to(self.device) for stored in (blocks, one))
                yield _parts_of(*both, rows=rows, groups=groups, takes_turns=takes_turns)
                release_file_pages(blocks)

        return ExpertCodes.from_mxfp4(
            parts(), num_experts=len(experts), in_features=len(range(*columns.indices(in_features)))
        )

    def _read_expert(self, name: str, shape: tuple[int, int, int], index: int) -> torch.Tensor:
        """See `WeightReader._read_expert`."""
        num_experts, in_features, out_features = shape
        if name in self:  # it has been left floating
            return super()._read_expert(name, shape, index)
        num_groups = -(-in_features // GROUP)
        blocks = self._read_bytes(f"{name}_blocks", (num_experts, out_features, num_groups, GROUP // 2), index)
        scales = self._read_bytes(f"{name}_scales", (num_experts, out_features, num_groups), index)
        if blocks is None or scales is None:
            return torch.zeros(out_features, in_features)
        # On a GPU the bytes go there, a quarter of what they stand for, and become weights there.
        weights = dequantize(blocks.to(self.device), scales.to(self.device))[:, :in_features]
        release_file_pages(blocks)
        return weights

    def _made_linear(self, name: str, parts: list[torch.Tensor]) -> LinearWeight:
        """See `WeightReader._made_linear`."""
        if self.device.type == "cpu" or any(part.device.type == "cpu" for part in parts):
            return super()._made_linear(name, parts)
        return torch.cat(parts).to(self.dtype)

    def _read_bytes(self, name: str, shape: tuple[int, ...], index: int) -> torch.Tensor | None:
        """One expert's bytes; None where they are not there as they should be, which `finish` will say."""
        self._taken.add(name)
        if name in self._missing or name in self._mismatched:
            return None
        handle = self._handles.get(name)
        if handle is None:
            self._missing.append(name)
            return None
        stored = handle.get_slice(name)
        part: torch.Tensor = stored[index : index + 1]
        if tuple(stored.get_shape()) != shape or part.dtype is not torch.uint8:
            self._mismatched.append(name)
            self._problems.append(
                f"{name} {part.dtype} {list(stored.get_shape())} instead of torch.uint8 {list(shape)}"
            )
            return None
        return part[0]


class RandomMXFP4Reader(RandomReader):
    """Random experts in MXFP4 on a GPU, all else random floats: what a checkpoint takes, in time and memory."""

    @property
    def keeps_codes(self) -> bool:
        """See `MXFP4Reader.keeps_codes`."""
        return self.device.type == "cuda"

    def take_expert_codes(
        self,
        name: str,
        shape: tuple[int, int, int],
        experts: range,
        *,
        takes_turns: bool = False,
        rows: slice = ALL,
        columns: slice = ALL,
    ) -> ExpertCodes | None:
        """See `WeightReader.take_expert_codes`."""
        _, in_features, out_features = shape
        groups = _whole_groups(columns, in_features)
        if not self.keeps_codes or groups is None:
            return None
        exponents_shape = (out_features, -(-in_features // GROUP))

        def parts() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for index in experts:
                seed = self._seed ^ zlib.crc32(f"{name}.{index}".encode())
                blocks = torch.randint(
                    *(0, 256, (*exponents_shape, GROUP // 2)),
                    generator=torch.Generator(self.device).manual_seed(seed),
                    dtype=torch.uint8,
                    device=self.device,
                )
                exponents = torch.full(exponents_shape, _RANDOM_EXPONENT, dtype=torch.uint8, device=self.device)
                yield _parts_of(blocks, exponents, rows=rows, groups=groups, takes_turns=takes_turns)

        return ExpertCodes.from_mxfp4(
            parts(), num_experts=len(experts), in_features=len(range(*columns.indices(in_features)))
        )


def _whole_groups(columns: slice, in_features: int) -> slice | None:
    """The groups that some inputs are; None where they tear one apart."""
    first, end, _ = columns.indices(in_features)
    if first % GROUP or (end % GROUP and end < in_features):
        return None
    return slice(first // GROUP, -(-end // GROUP))


def _parts_of(
    blocks: torch.Tensor, exponents: torch.Tensor, *, rows: slice, groups: slice, takes_turns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's part of an expert's matrix, or of two whose outputs take turns, then behind each other."""

    def part(of_all: torch.Tensor) -> torch.Tensor:
        halves = (of_all[0::2], of_all[1::2]) if takes_turns else (of_all,)
        return torch.cat([half[rows, groups] for half in halves])

    return part(blocks), part(exponents)
