"""A `WeightReader` for checkpoints with quantised weights, and one that quantises floating weights as it reads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from ...kernels import cpu_build
from ...kernels.fp8_weight import BLOCK
from ...kernels.quantized_weight import LinearWeight, QuantizedWeight, WeightPart
from ...kernels.weight_quantization import quantize
from ..errors import UnsupportedModelError, WeightsError
from ..gguf.reader import is_gguf
from ..gguf.weight_reader import GGUFReader
from ..random_weights import RandomReader, RandomWeights
from ..weights import ALL, Part, WeightReader
from .formats import Factors, MalformedError, Take, is_quantized, read_factors, read_layer
from .fp8 import Fp8Reader, RandomFp8Reader
from .mxfp4 import MXFP4Reader, RandomMXFP4Reader
from .partition import part_of
from .scheme import Scheme

log = logging.getLogger(__name__)

Quantization = Literal["auto", "int8", "int4"]

HEAD = "lm_head.weight"

# Inputs that share a scale when floating weights are quantised at load: 8.25 and 4.5 bits a weight.
_BITS_AND_GROUP = {"int8": (8, 64), "int4": (4, 32)}
_LONGEST_GGUF_GROUP = 32

T = TypeVar("T")
_Read = Callable[[Take, Callable[[str], bool], tuple[int, int], Scheme], T]


class QuantizingReader(WeightReader):
    """Quantises every linear layer of a floating checkpoint as it is read, to `int8` or `int4`.

    The output projection, which is most sensitive, becomes int8 either way: a copy of its own where it is tied to the
    token embedding. The embedding itself, norms and biases stay floating.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, to: Literal["int8", "int4"], **options: Any
    ) -> None:
        super().__init__(folder, dtype=dtype, device=device, **options)
        self._to = to

    def _read_linear(
        self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)
    ) -> torch.Tensor | QuantizedWeight:
        bits, group_size = _BITS_AND_GROUP["int8" if name == HEAD else self._to]
        floating = self._read(name, shape, part)
        quantized = self._quantize(name, floating, bits, group_size)
        self._release(floating)
        return quantized

    def _made_linear(self, name: str, parts: list[torch.Tensor]) -> LinearWeight:
        """See `WeightReader._made_linear`."""
        return self._quantize(name, torch.cat(parts), *_BITS_AND_GROUP[self._to])

    def _quantize(self, name: str, weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeight:
        try:
            return quantize(weight, bits=bits, group_size=group_size).to(self.device)
        except ValueError as error:
            raise WeightsError(f"{name} in {self._folder}: {error}") from error

    def tied_head(self, embedding: torch.Tensor, rows: slice = ALL) -> LinearWeight:
        """See `WeightReader.tied_head`."""
        self.settle()
        return self._quantize(HEAD, embedding, *_BITS_AND_GROUP["int8"])


class RandomQuantizingReader(QuantizingReader, RandomReader):
    """Quantises random weights: what a checkpoint's would take, in time and memory, without one."""


class QuantizedReader(WeightReader):
    """Reads the linear layers that a checkpoint holds quantised as they are, and the others as floats."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: torch.device, scheme: Scheme) -> None:
        super().__init__(folder, dtype=dtype, device=device)
        self._scheme = scheme
        self._layers: list[str] = []

    def _read_linear(self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)) -> WeightPart:
        if not self._is_quantized(name):
            return super()._read_linear(name, shape, part)
        layer = name.removesuffix(".weight")
        self._layers.append(layer)
        whole = self._stored(name, read_layer, shape)
        try:
            return part_of(whole, *part).to(self.device)
        except ValueError as error:
            raise UnsupportedModelError(f"{layer} in {self._folder} cannot be divided among ranks: {error}") from error

    def factors(self, name: str, shape: tuple[int, int]) -> Factors | None:
        """Of a linear layer's weight all but its codes, on the host; None where it is stored floating.

        Raises:
            WeightsError: what is stored is not such a weight's.
        """
        return self._stored(name, read_factors, shape) if self._is_quantized(name) else None

    def _is_quantized(self, name: str) -> bool:
        return is_quantized(name.removesuffix(".weight"), self.__contains__, self._scheme)

    def _stored(self, name: str, read: _Read[T], shape: tuple[int, int]) -> T:
        """What is read of the layer whose weight has this name."""
        layer = name.removesuffix(".weight")

        def take(suffix: str, expected: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
            return self._read_stored(f"{layer}.{suffix}", expected, dtypes)

        def has(suffix: str) -> bool:
            return f"{layer}.{suffix}" in self

        try:
            return read(take, has, shape, self._scheme)
        except MalformedError as error:
            raise WeightsError(
                f"the quantised weights of {layer} in {self._folder} cannot be used: {error}. "
                "Check that config.json is of the same checkpoint and that the download is whole."
            ) from error

    def _read_stored(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
        self._taken.add(name)
        if name not in self:
            raise MalformedError(f"{name} is missing")
        handle = self._handles[name]
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            raise MalformedError(f"{name} is {list(found)} instead of {list(shape)}")
        tensor: torch.Tensor = handle.get_tensor(name)
        if tensor.dtype not in dtypes:
            raise MalformedError(f"{name} holds {tensor.dtype} instead of {' or '.join(map(str, dtypes))}")
        return tensor

    def finish(self) -> None:
        """See `WeightReader.finish`. Biases of nothing but zeros, which AutoGPTQ adds to every layer, are no error."""
        for layer in self._layers:
            bias = f"{layer}.bias"
            if bias in self and bias not in self._taken and not self._handles[bias].get_tensor(bias).any():
                self._taken.add(bias)
        super().finish()


def inseparable_inputs(folder: Path, quantization: Scheme | RandomWeights | Literal["int8", "int4"] | None) -> int:
    """Consecutive inputs of a matrix that share a scale, so that no two ranks can have them; 1 for floating weights."""
    if is_gguf(folder):
        return _LONGEST_GGUF_GROUP
    if isinstance(quantization, Scheme) and quantization.method == "mxfp4":
        return 1  # they are floating once they have been read
    if isinstance(quantization, Scheme):
        return max(1, quantization.group_size)  # -1: all inputs share one, of which each rank has a copy
    to = quantization.quantized_to if isinstance(quantization, RandomWeights) else quantization
    if to == "fp8":
        return BLOCK if isinstance(quantization, RandomWeights) and quantization.by_block else 1
    return 1 if to is None or to == "mxfp4" else _BITS_AND_GROUP[to][1]


def open_weights(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Scheme | RandomWeights | Literal["int8", "int4"] | None,
) -> WeightReader:
    """The reader for a checkpoint: a GGUF file, quantised as `Scheme` says, to be quantised, floating, or for none."""
    if isinstance(quantization, RandomWeights):
        if quantization.quantized_to is None:
            return RandomReader(folder, dtype=dtype, device=device, seed=quantization.seed)
        if quantization.quantized_to == "mxfp4":
            return RandomMXFP4Reader(folder, dtype=dtype, device=device, seed=quantization.seed)
        if quantization.quantized_to == "fp8":
            return RandomFp8Reader(folder, dtype=dtype, device=device, asked=quantization)
        return RandomQuantizingReader(
            folder, dtype=dtype, device=device, to=quantization.quantized_to, seed=quantization.seed
        )
    if is_gguf(folder):
        return GGUFReader(folder, dtype=dtype, device=device)
    if quantization is None:
        return WeightReader(folder, dtype=dtype, device=device)
    if isinstance(quantization, Scheme) and quantization.method == "mxfp4":
        return MXFP4Reader(folder, dtype=dtype, device=device)
    if isinstance(quantization, Scheme) and quantization.method == "fp8":
        return Fp8Reader(folder, dtype=dtype, device=device, scheme=quantization)
    _warn_of_slow_products(device)
    if isinstance(quantization, Scheme):
        return QuantizedReader(folder, dtype=dtype, device=device, scheme=quantization)
    return QuantizingReader(folder, dtype=dtype, device=device, to=quantization)


def _warn_of_slow_products(device: torch.device) -> None:
    if device.type == "cpu" and cpu_build.library() is None:
        log.warning(
            "weights.slow_quantised reason='there are no C kernels' consequence='each step widens every quantised "
            "matrix to float32, slower than without quantisation' remedy='install gcc or clang (an earlier line says "
            "what failed), or take the floating weights'"
        )
