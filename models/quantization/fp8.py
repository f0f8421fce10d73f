"""Checkpoints whose linear layers are floats of 8 bits (e4m3), with scales of blocks, outputs or whole matrices.

Sources: `transformers`, integrations/finegrained_fp8.py (`weight_scale_inv`, of blocks of 128 times 128); AutoFP8 and
compressed-tensors, compressors/naive_quantized (`weight_scale`, of an output or a matrix, and `input_scale`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...kernels.fp8_weight import BLOCK, Fp8Weight, joined_scales, quantize_fp8
from ...kernels.huge_pages import release_file_pages
from ...kernels.linear_fp8 import multiplies_fp8
from ...kernels.quantized_weight import LinearWeight, WeightPart
from ..errors import UnsupportedModelError, WeightsError
from ..random_weights import RandomReader, RandomWeights
from ..weights import ALL, Part, WeightReader
from .scheme import Scheme

_WEIGHT_SCALES = ("weight_scale_inv", "weight_scale")
_INPUT_SCALES = ("input_scale", "activation_scale")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HEAD = "lm_head.weight"


def is_in_fp8(name: str, stored: WeightReader) -> bool:
    """Whether a checkpoint with tensors of these names holds the weight of a linear layer in fp8."""
    return _weight_scale(name.removesuffix(".weight"), stored) is not None


def _weight_scale(layer: str, stored: WeightReader) -> str | None:
    """What the scales of a layer's weight are called, if it has any."""
    return next((f"{layer}.{each}" for each in _WEIGHT_SCALES if f"{layer}.{each}" in stored), None)


class Fp8Reader(WeightReader):
    """Reads linear layers as the codes that they are for a GPU that multiplies those, elsewhere as floats.

    Which layers are codes is told by their scales; others, and all that is no linear layer, are floating there.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, scheme: Scheme) -> None:
        super().__init__(folder, dtype=dtype, device=device)
        self._scheme = scheme
        self._keeps_codes = multiplies_fp8(device)

    def take_fused_linear(
        self,
        names: Iterable[str],
        shapes: Sequence[tuple[int, ...]],
        rows: Iterable[slice] | None = None,
        columns: slice = ALL,
    ) -> LinearWeight:
        """See `WeightReader.take_fused_linear`."""
        if not self._keeps_codes:
            return super().take_fused_linear(names, shapes, rows, columns)
        parts = [
            self._stored(name, (out_features, in_features), (part, columns))
            for name, (out_features, in_features), part in zip(names, shapes, rows or [ALL] * len(shapes), strict=True)
        ]
        coded = [part for part in parts if isinstance(part, Fp8Weight)]
        floating = [part for part in parts if isinstance(part, torch.Tensor)]
        if not coded:
            return self._placed(floating, is_matrix=True)
        joined = None if floating else joined_scales(coded)
        if joined is not None:
            return self._placed_codes(coded, joined)
        return tuple(
            self._placed_codes([part], part) if isinstance(part, Fp8Weight) else self._placed([part], is_matrix=True)
            for part in parts
        )

    def _read_linear(self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)) -> WeightPart:
        """See `WeightReader._read_linear`; a float is a product in float32, rounded to the model's dtype."""
        stored = self._stored(name, shape, part)
        if isinstance(stored, torch.Tensor):
            return stored
        if self._keeps_codes:
            return self._placed_codes([stored], stored)
        wide = stored.dequantize().to(self.dtype)
        release_file_pages(stored.codes)
        return wide

    def _placed_codes(self, parts: list[Fp8Weight], like: Fp8Weight) -> Fp8Weight:
        """Codes behind each other, on the device, with the scales of `like`."""
        codes = [part.codes for part in parts]
        if self._loader is not None:
            placed = self._loader.place(codes, torch.float8_e4m3fn, self.device)
        else:
            placed = torch.cat(codes).to(self.device)
        input_scale = None if like.input_scale is None else like.input_scale.to(self.device)
        return replace(like, codes=placed, scales=like.scales.contiguous().to(self.device), input_scale=input_scale)

    def _stored(self, name: str, shape: tuple[int, int], part: Part) -> Fp8Weight | torch.Tensor:
        """A rank's part of a matrix as the file holds it; the codes may be a view of it."""
        layer = name.removesuffix(".weight")
        scale_name = _weight_scale(layer, self)
        codes = self._read(name, shape, part)
        has_codes = codes.dtype is torch.float8_e4m3fn
        if scale_name is None:
            if has_codes:
                raise self._malformed(layer, f"{' or '.join(_WEIGHT_SCALES)} is missing")
            return codes
        if not has_codes:
            if name not in self._missing and name not in self._mismatched:
                raise self._malformed(layer, f"weight holds {codes.dtype} instead of torch.float8_e4m3fn")
            codes = codes.to(torch.float8_e4m3fn)
        scales = self._read_scales(layer, scale_name)
        input_scale = self._read_input_scale(layer) if self._scheme.static_inputs else None
        if self._scheme.group_size == BLOCK:
            return self._by_block(layer, codes, scales, shape, part)
        if scales.numel() not in (1, shape[0]) or (scales.dim() > 1 and scales.shape[1:].numel() > 1):
            raise self._malformed(layer, f"its scales are {list(scales.shape)} for {shape[0]} outputs")
        of_rows = scales.reshape(-1, 1).expand(shape[0], 1)[part[0]]
        return Fp8Weight(codes, of_rows.contiguous(), 1, codes.shape[1], input_scale)

    def _by_block(
        self, layer: str, codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], part: Part
    ) -> Fp8Weight:
        expected = tuple(-(-size // BLOCK) for size in shape)
        if tuple(scales.shape) != expected:
            raise self._malformed(layer, f"its scales are {list(scales.shape)} instead of {list(expected)}")
        (row, end_row, _), (column, end_column, _) = (
            axis.indices(size) for axis, size in zip(part, shape, strict=True)
        )
        if column % BLOCK or (end_column % BLOCK and end_column != shape[1]):
            raise UnsupportedModelError(
                f"{layer} in {self._folder} cannot be divided among ranks: inputs {column} to {end_column} tear blocks "
                f"of {BLOCK} apart"
            )
        scales = scales[:, column // BLOCK : -(-end_column // BLOCK)]
        if row % BLOCK == 0:
            return Fp8Weight(codes, scales[row // BLOCK : -(-end_row // BLOCK)].contiguous(), BLOCK, BLOCK)
        return Fp8Weight(codes, scales.repeat_interleave(BLOCK, dim=0)[row:end_row].contiguous(), 1, BLOCK)

    def _read_scales(self, layer: str, name: str) -> torch.Tensor:
        self._taken.add(name)
        scales: torch.Tensor = self._handles[name].get_tensor(name)
        if scales.dtype not in _FLOATS:
            raise self._malformed(layer, f"{name} holds {scales.dtype} instead of {' or '.join(map(str, _FLOATS))}")
        if not bool(torch.isfinite(scales).all()):
            raise self._malformed(layer, f"{name} is not all finite")
        return scales.to(torch.float32, copy=True)  # no view of the file

    def _read_input_scale(self, layer: str) -> torch.Tensor:
        name = next((f"{layer}.{each}" for each in _INPUT_SCALES if f"{layer}.{each}" in self), None)
        if name is None:
            raise self._malformed(layer, f"{' or '.join(_INPUT_SCALES)} is missing")
        scale = self._read_scales(layer, name)
        if scale.numel() != 1 or float(scale) <= 0:
            raise self._malformed(layer, f"{name} is {scale.tolist()} instead of one number above 0")
        return scale.view(1)

    def _malformed(self, layer: str, reason: str) -> WeightsError:
        return WeightsError(
            f"the fp8 weights of {layer} in {self._folder} cannot be used: {reason}. "
            "Check that config.json is of the same checkpoint and that the download is whole."
        )


class RandomFp8Reader(RandomReader):
    """Random linear layers in fp8 on a GPU that multiplies it, all else random floats: what a checkpoint takes, in time
    and memory. The output projection stays floating, as in most of them."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, asked: RandomWeights) -> None:
        super().__init__(folder, dtype=dtype, device=device, seed=asked.seed)
        self._by_block = asked.by_block
        self._input_scale = torch.ones(1, dtype=torch.float32, device=device) if asked.static_inputs else None

    def is_coded(self, name: str) -> bool:
        """Whether a linear layer's weight is in fp8."""
        return name != _HEAD

    def _read_linear(self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)) -> WeightPart:
        """See `WeightReader._read_linear`."""
        floating = self._read(name, shape, part)
        if not self.is_coded(name) or not multiplies_fp8(self.device):
            return floating
        weight = replace(quantize_fp8(floating, by_block=self._by_block), input_scale=self._input_scale)
        return weight.with_scale_per_row() if self._by_block and (part[0].start or 0) % BLOCK else weight
