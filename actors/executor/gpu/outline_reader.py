"""A checkpoint's weights in their shapes and kinds, without contents: enough for a GPU that computes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ....kernels.quantized_weight import QuantizedWeight, WeightPart
from ....models.errors import UnsupportedModelError
from ....models.gguf.reader import is_gguf
from ....models.quantization.fp8 import RandomFp8Reader, is_in_fp8
from ....models.quantization.partition import part_of
from ....models.quantization.reader import QuantizedReader, open_weights
from ....models.quantization.scheme import Scheme
from ....models.random_weights import RandomReader, RandomWeights
from ....models.weights import ALL, Part, WeightReader, checkpoint_dtype

_OF_FACTORS = torch.float32
"""In which nothing is read. In the model's own a reader for a CPU might ask for the C kernels, and have them built."""


def open_outline(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Scheme | RandomWeights | Literal["int8", "int4"] | None,
) -> WeightReader:
    """In the place of `open_weights`: the reader of weights of the kinds that it would read.

    Raises:
        UnsupportedModelError: their kinds are not known here.
    """
    if isinstance(quantization, Scheme) and quantization.method in {"gptq", "awq", "compressed-tensors"}:
        return OutlineReader(folder, dtype=dtype, device=device, scheme=quantization)
    if isinstance(quantization, Scheme) and quantization.method == "fp8":
        return Fp8OutlineReader(folder, dtype=dtype, device=device, scheme=quantization)
    if is_gguf(folder) or (isinstance(quantization, Scheme) and quantization.method != "mxfp4"):
        raise UnsupportedModelError(f"what is launched for the quantised weights of {folder} is not known beforehand")
    if isinstance(quantization, Scheme):
        random = RandomWeights(quantized_to="mxfp4")
    else:
        random = quantization if isinstance(quantization, RandomWeights) else RandomWeights(quantized_to=quantization)
    return open_weights(folder, dtype=dtype, device=device, quantization=random)


def stored_dtype(folder: Path) -> torch.dtype:
    """In the place of `checkpoint_dtype`, which reads a tensor."""
    with unset_fake_temporarily():
        return checkpoint_dtype(folder)


class OutlineReader(RandomReader):
    """Stands for a `QuantizedReader`.

    Which factors a matrix has follows from what is stored, and decides what is launched for it. So those are read, some
    per cent of the checkpoint; the codes are not.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, scheme: Scheme) -> None:
        super().__init__(folder, dtype=dtype, device=device)
        self._bits = scheme.bits
        self._stored = QuantizedReader(folder, dtype=_OF_FACTORS, device=torch.device("cpu"), scheme=scheme)
        self._stack.enter_context(self._stored)
        self._orders: dict[bytes, torch.Tensor] = {}  # inputs in the same order are that of one tensor

    def _read_linear(self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)) -> WeightPart:
        with unset_fake_temporarily():
            factors = self._stored.factors(name, shape)
        if factors is None:
            return super()._read_linear(name, shape, part)
        zeros, order = factors.zeros, factors.input_order
        whole = QuantizedWeight.from_codes(
            torch.empty(shape, dtype=torch.uint8, device=self.device),
            self._like(factors.scales),
            bits=self._bits,
            group_size=factors.group_size(shape[1]),
            zeros=None if zeros is None else self._like(zeros),
            input_order=None if order is None else self._order(order),
        )
        try:
            return part_of(whole, *part)
        except ValueError as error:
            raise UnsupportedModelError(f"{name} in {self._folder} cannot be divided among ranks: {error}") from error

    def _like(self, factor: torch.Tensor) -> torch.Tensor:
        return torch.empty(factor.shape, dtype=factor.dtype, device=self.device)

    def _order(self, order: torch.Tensor) -> torch.Tensor:
        with unset_fake_temporarily():
            contents = order.numpy().tobytes()
        if contents not in self._orders:
            self._orders[contents] = self._like(order)
        return self._orders[contents]


class Fp8OutlineReader(RandomFp8Reader):
    """Stands for an `Fp8Reader`: of what is stored it wants to know which layers have scales."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, scheme: Scheme) -> None:
        asked = RandomWeights(by_block=scheme.group_size > 0, static_inputs=scheme.static_inputs)
        super().__init__(folder, dtype=dtype, device=device, asked=asked)
        self._stored = self._stack.enter_context(WeightReader(folder, dtype=_OF_FACTORS, device=torch.device("cpu")))

    def is_coded(self, name: str) -> bool:
        """See `RandomFp8Reader.is_coded`."""
        return is_in_fp8(name, self._stored)
