"""Weights of 4 or 8 bits, with factors for each group of inputs, as they lie in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from . import huge_pages
from .code_layout import NIBBLE_ROWS, pack_nibbles, padded_inputs, unpack_nibbles
from .cpu_build import DTYPE_CODES
from .fp8_weight import Fp8Weight, joined_scales
from .linear_packed import PackedWeight
from .linear_rounded import RoundedWeight

_FACTOR_CODES = {**DTYPE_CODES, torch.int8: 3}  # as in csrc/vector.h


class _Described(ctypes.Structure):
    """`weight` of csrc/quantized.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "offsets", "superblocks")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "group_size")),
        *((name, ctypes.c_int64) for name in ("num_groups", "superblock_groups")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_dtype", "offset_dtype")),
    )


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`[out_features, in_features]` weights in groups of `group_size` consecutive inputs that share their factors.

    What it means, for weight `i` of row `o` in group `g = i // group_size`:

        scales[o, g] * (code[o, i] - zeros[o, g])      or, where there are offsets,
        scales[o, g] * code[o, i] + offsets[o, g]

    where, with `superblock_scales`, scales and offsets are whole numbers themselves, and what is meant by them is

        superblock_scales[o, g // u, 0] * scales[o, g]        -superblock_scales[o, g // u, 1] * offsets[o, g]

    of the `u` groups of a superblock, as in ggml's K types: exact, and of less memory than the products. Make one with
    `from_codes`, or `gguf_blocks.pack_blocks`; `dequantize` is the meaning as code.

    Attributes:
        codes: uint8, rows filled up to `PAD` inputs with code 0. On a CPU as csrc/quantized.c wants them: with 4 bits
            `NIBBLE_ROWS` rows among each other; elsewhere as gpu/linear_quantized.py wants them.
        scales: `[out_features, num_groups]`, float32, bfloat16 or float16. With `superblock_scales` int8, and
            with 4 bits `[ceil(out_features / 8), num_groups, 8]`: those of `NIBBLE_ROWS` rows beside each other.
        zeros: int16, the same shape; None means 8 for codes of 4 bits and 0 for codes of 8.
        offsets: of the dtype of scales or another float, the same shape, in place of zeros.
        bits: 4, codes 0 to 15; or 8, codes -128 to 127.
        group_size: a multiple of 32 (16 with 8 bits); the last group may be smaller.
        input_order: int64 `[in_features]`: weight `i` multiplies input `input_order[i]`; None where that is `i`.
        superblock_scales: float16 `[out_features, num_superblocks, 1]`, or 2 with offsets, for 8 or 16 groups each.
        described: the same for the C library.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    offsets: torch.Tensor | None
    bits: int
    group_size: int
    in_features: int
    input_order: torch.Tensor | None = None
    superblock_scales: torch.Tensor | None = None
    described: ctypes.c_void_p = field(init=False, repr=False, compare=False)
    _struct: _Described = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        zeros, offsets, superblocks = self.zeros, self.offsets, self.superblock_scales
        described = _Described(
            self.codes.data_ptr(),
            self.scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            None if offsets is None else offsets.data_ptr(),
            None if superblocks is None else superblocks.data_ptr(),
            self.in_features,
            *(self.shape[0], self.group_size, self.scales.shape[1]),
            1 if superblocks is None else self.scales.shape[1] // superblocks.shape[1],
            self.bits,
            _FACTOR_CODES[self.scales.dtype],
            0 if offsets is None else _FACTOR_CODES[offsets.dtype],
        )
        object.__setattr__(
            self, "_struct", described
        )  # a frozen dataclass has no other way; it must outlive its address
        object.__setattr__(self, "described", ctypes.c_void_p(ctypes.addressof(described)))

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        rows = self.scales if self.superblock_scales is None else self.superblock_scales
        return rows.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        tensors = (self.codes, self.scales, self.zeros, self.offsets, self.input_order, self.superblock_scales)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        *,
        bits: int,
        group_size: int,
        zeros: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        input_order: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """Lay codes out for the kernel.

        Args:
            codes: `[out_features, in_features]`, any integer type, one code an element.
            group_size: -1 for one group a row; otherwise as the attribute.

        Raises:
            ValueError: sizes, types or codes that do not fit each other.
        """
        out_features, in_features = codes.shape
        padded = padded_inputs(in_features)
        if bits not in (4, 8):
            raise ValueError(f"bits={bits}: 4 and 8 are supported")
        low, high = (0, 15) if bits == 4 else (-128, 127)
        if codes.numel() == 0 or int(codes.min()) < low or int(codes.max()) > high:
            raise ValueError(f"codes of {bits} bits are from {low} to {high}, and there is at least one")
        if group_size == -1:
            group_size = padded
        unit = 32 if bits == 4 else 16
        if group_size < 1 or group_size % unit:
            raise ValueError(f"group_size={group_size} with {bits} bits: it must be a multiple of {unit}, or -1")
        expected = (out_features, -(-in_features // group_size))
        for name, factor, dtypes in (
            ("scales", scales, tuple(DTYPE_CODES)),
            ("zeros", zeros, (torch.int16,)),
            ("offsets", offsets, tuple(DTYPE_CODES)),
        ):
            if factor is not None and (tuple(factor.shape) != expected or factor.dtype not in dtypes):
                raise ValueError(
                    f"{name} are {factor.dtype} {list(factor.shape)}, not one of {dtypes} {list(expected)}"
                )
        if zeros is not None and offsets is not None:
            raise ValueError("give zeros or offsets, not both")
        if input_order is not None and not torch.equal(
            input_order.sort().values, torch.arange(in_features, dtype=torch.int64, device=input_order.device)
        ):
            raise ValueError("input_order must name each input once")
        if bits == 4:
            packed = pack_nibbles(F.pad(codes.to(torch.uint8), (0, padded - in_features)))
        else:
            packed = F.pad(codes.to(torch.int8), (0, padded - in_features)).view(torch.uint8)
        return cls(
            codes=packed.contiguous(),
            scales=scales.contiguous(),
            zeros=None if zeros is None else zeros.contiguous(),
            offsets=None if offsets is None else offsets.contiguous(),
            bits=bits,
            group_size=group_size,
            in_features=in_features,
            input_order=input_order,
        )

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        plain = self if device.type == "cpu" else self.with_plain_factors()  # which is what kernels elsewhere take
        codes = plain.codes.to(device)
        if self.bits == 4 and device.type != self.device.type:  # whose layouts differ
            codes = pack_nibbles(unpack_nibbles(plain.codes, self.shape[0]).to(device))
        return replace(
            plain,
            codes=codes,
            scales=plain.scales.to(device),
            zeros=moved(plain.zeros),
            offsets=moved(plain.offsets),
            input_order=moved(plain.input_order),
            superblock_scales=moved(plain.superblock_scales),
        )

    def with_plain_factors(self) -> QuantizedWeight:
        """The same weights, exactly, with float32 factors in place of whole numbers and `superblock_scales`."""
        if self.superblock_scales is None:
            return self
        scales, offsets = self._float_factors(slice(None), torch.float32)
        return replace(self, scales=scales, offsets=offsets, superblock_scales=None)

    def _float_factors(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and offsets of some rows, `[num_rows, num_groups]`."""

        def of_rows(factors: torch.Tensor) -> torch.Tensor:
            if factors.dim() == 3:
                factors = factors.transpose(1, 2).reshape(-1, factors.shape[1])[: self.shape[0]]
            return factors[rows].to(dtype)

        scales, offsets = of_rows(self.scales), None if self.offsets is None else of_rows(self.offsets)
        if self.superblock_scales is None:
            return scales, offsets
        superblocks = self.superblock_scales[rows].to(dtype)
        superblocks = superblocks.repeat_interleave(self.scales.shape[1] // superblocks.shape[1], dim=1)
        return scales.mul_(superblocks[:, :, 0]), None if offsets is None else offsets.mul_(superblocks[:, :, 1]).neg_()

    def unpacked(self, rows: slice = slice(None)) -> torch.Tensor:
        """The codes, one an element: `[out_features, in_features]`, uint8 for 4 bits and int8 for 8."""
        if self.bits == 8:
            return self.codes[rows].view(torch.int8)[:, : self.in_features]
        start, stop, _ = rows.indices(self.shape[0])
        if self.device.type != "cpu":
            return unpack_nibbles(self.codes[start:stop], stop - start)[:, : self.in_features]
        first = start // NIBBLE_ROWS
        nibbles = unpack_nibbles(self.codes[first : -(-stop // NIBBLE_ROWS)], stop - first * NIBBLE_ROWS)
        return nibbles[start - first * NIBBLE_ROWS :, : self.in_features]

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> torch.Tensor:
        """The weights it stands for, inputs in their own order: exact in float32 for factors of 16 bits and zeros."""
        codes = self.unpacked(rows)
        group = torch.arange(self.in_features, device=self.device) // self.group_size
        scales, offsets = self._float_factors(rows, dtype)
        scales = scales[:, group]
        if offsets is not None:
            weight = scales * codes.to(dtype) + offsets[:, group]
        elif self.zeros is not None:
            weight = scales * (codes.to(dtype) - self.zeros[rows].to(dtype)[:, group])
        else:
            weight = scales * (codes.to(dtype) - (8 if self.bits == 4 else 0))
        if self.input_order is None:
            return weight
        ordered = torch.empty_like(weight)
        ordered[:, self.input_order] = weight
        return ordered


WeightPart = torch.Tensor | QuantizedWeight | Fp8Weight
LinearWeight = WeightPart | PackedWeight | RoundedWeight | tuple[WeightPart, ...]
"""What a linear layer multiplies by; a tuple holds parts behind each other that do not fit into one."""


def concatenate(parts: Sequence[WeightPart]) -> LinearWeight:
    """Weights behind each other along their outputs, as one where they are of one kind, otherwise as a tuple."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    in_fp8 = [part for part in parts if isinstance(part, Fp8Weight)]
    if in_fp8:
        joined = joined_scales(in_fp8) if len(in_fp8) == len(parts) else None
        return tuple(parts) if joined is None else replace(joined, codes=torch.cat([part.codes for part in in_fp8]))
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if len(quantized) < len(parts) or any(_kind(part) != _kind(quantized[0]) for part in quantized):
        return tuple(parts)
    order = quantized[0].input_order
    for part in quantized:
        if (part.input_order is None) != (order is None):
            return tuple(parts)
        if order is not None and part.input_order is not None and not torch.equal(part.input_order, order):
            return tuple(parts)
    if first.device.type == "cpu" and any(part.scales.dim() == 3 and part.shape[0] % NIBBLE_ROWS for part in quantized):
        return concatenate([part.with_plain_factors() for part in quantized])
    zeros = [part.zeros for part in quantized if part.zeros is not None]
    offsets = [part.offsets for part in quantized if part.offsets is not None]
    superblocks = [part.superblock_scales for part in quantized if part.superblock_scales is not None]
    codes = _codes_to_join(quantized)
    return replace(
        quantized[0],
        codes=huge_pages.place(codes, torch.uint8) if first.device.type == "cpu" else torch.cat(codes),
        scales=torch.cat([part.scales for part in quantized]),
        zeros=torch.cat(zeros) if zeros else None,
        offsets=torch.cat(offsets) if offsets else None,
        superblock_scales=torch.cat(superblocks) if superblocks else None,
    )


def _codes_to_join(parts: Sequence[QuantizedWeight]) -> list[torch.Tensor]:
    """Codes that may stand behind each other: rows that lie among each other are all of one part, or packed anew."""
    first = parts[0]
    if first.bits == 8 or first.device.type != "cpu" or all(part.shape[0] % NIBBLE_ROWS == 0 for part in parts[:-1]):
        return [part.codes for part in parts]
    return [pack_nibbles(torch.cat([unpack_nibbles(part.codes, part.shape[0]) for part in parts]))]


def _kind(weight: QuantizedWeight) -> tuple[object, ...]:
    offsets = None if weight.offsets is None else weight.offsets.dtype
    superblocks = None if weight.superblock_scales is None else weight.superblock_scales.shape[1:]
    scales = weight.scales.dtype
    return weight.bits, weight.group_size, weight.in_features, scales, weight.zeros is None, offsets, superblocks
