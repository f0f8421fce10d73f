"""What several architectures are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import linear_dense as dense_kernels
from ..kernels import linear_deterministic as deterministic_kernels
from ..kernels.fp8_weight import Fp8Weight
from ..kernels.gated_activation import GatedActivation, gelu_tanh_and_mul, silu_and_mul
from ..kernels.linear_dense import linear_dense, linear_dense_quick
from ..kernels.linear_fp8 import linear_fp8
from ..kernels.linear_packed import FEW_ROWS, PackedWeight, linear_packed
from ..kernels.linear_quantized import linear_quantized
from ..kernels.linear_rounded import RoundedWeight, linear_rounded, multiplies_whole_numbers
from ..kernels.linear_widened import linear_widened
from ..kernels.quantized_weight import LinearWeight
from .errors import UnsupportedModelError

_ROWS_BOUND_BY_MEMORY = 4
# Products of so many rows take as long in float32 (0.26 TFLOP/s) as on weights that are widened first (some 50 ms for
# those of Qwen3-0.6B) and then multiplied by AMX (0.6 TFLOP/s): an estimate, from rates of 2 cores that have AMX.
# `python -m octavo.kernels.bench_packed` compares the two.
_ROWS_WORTH_WIDENING = 32

DenseLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class WeightKind(Enum):
    """What tells by which kernel a weight is multiplied."""

    DENSE = auto()  # of the dtype of what it multiplies
    OTHER_DTYPE = auto()
    PACKED = auto()
    ROUNDED = auto()
    QUANTIZED = auto()
    FP8 = auto()


def weight_kinds(weights: Iterable[LinearWeight], dtype: torch.dtype) -> frozenset[WeightKind]:
    """The kinds among weights that multiply activations of `dtype`."""
    kinds: set[WeightKind] = set()
    for weight in weights:
        if isinstance(weight, tuple):
            kinds |= weight_kinds(weight, dtype)
        elif isinstance(weight, torch.Tensor):
            kinds.add(WeightKind.DENSE if weight.dtype is dtype else WeightKind.OTHER_DTYPE)
        elif isinstance(weight, PackedWeight):
            kinds.add(WeightKind.PACKED)
        elif isinstance(weight, Fp8Weight):
            kinds.add(WeightKind.FP8)
        else:
            kinds.add(WeightKind.ROUNDED if isinstance(weight, RoundedWeight) else WeightKind.QUANTIZED)
    return frozenset(kinds)


@dataclass(frozen=True, slots=True)
class Linear:
    """How a model's linear layers multiply: by `dense` where a weight is a tensor; quantised ones, and parts of several
    kinds, each by their own.

    Attributes:
        quick: as for `linear_quantized`: the last bits of a row may depend on how many there are.
        few_rows: up to so many `linear_dense` takes the place of `dense`, as it does for weights of another dtype.
        widens_from: rows of 16-bit floats from which on quantised weights are widened to those; 0: never.
        packs: dense matrices are worth a `linear_packed.Packer`.
    """

    dense: DenseLinear
    quick: bool = False
    few_rows: int = 0
    widens_from: int = 0
    packs: bool = False

    def __call__(self, x: torch.Tensor, weight: LinearWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        match weight:
            case torch.Tensor():
                return self._for(x.shape[0], is_same=weight.dtype is x.dtype)(x, weight, bias)
            case tuple():
                out = torch.cat([self(x, part) for part in weight], dim=-1)
            case PackedWeight():
                assert self.packs, "it was packed for another way to multiply"
                out = linear_packed(x, weight)
            case RoundedWeight():
                out = linear_rounded(x, weight)
            case Fp8Weight():
                out = linear_fp8(x, weight, quick=self.quick)
            case _ if self._widens(x.shape[0]):
                out = linear_widened(x, weight, lambda x, part: self.dense(x, part, None))
            case _:
                out = linear_quantized(x, weight, quick=self.quick)
        return out if bias is None else out.add_(bias)

    def _for(self, num_rows: int, *, is_same: bool) -> DenseLinear:
        has_few = self.few_rows and (num_rows <= self.few_rows or not is_same)
        return linear_dense if has_few else self.dense

    def _widens(self, num_rows: int) -> bool:
        return bool(self.widens_from) and num_rows >= self.widens_from

    def is_in_c(self, num_rows: int, kinds: Iterable[WeightKind] = (WeightKind.DENSE,)) -> bool:
        """Whether so many rows are multiplied by weights of all these kinds in C, as `decoder_stack` does."""
        return all(self._is_in_c(num_rows, kind) for kind in kinds)

    def _is_in_c(self, num_rows: int, kind: WeightKind) -> bool:
        match kind:
            case WeightKind.QUANTIZED:
                return not self._widens(num_rows)
            case WeightKind.ROUNDED:
                return True
            case WeightKind.FP8:
                return False
            case WeightKind.PACKED:
                return self.packs and num_rows <= FEW_ROWS
            case _:
                return self._for(num_rows, is_same=kind is WeightKind.DENSE) in (
                    *(dense_kernels.linear_dense, dense_kernels.linear_dense_quick),
                    deterministic_kernels.linear_deterministic,
                )


def _gated_by(act: Callable[[torch.Tensor], torch.Tensor]) -> GatedActivation:
    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate).mul_(up)

    return gated


# Each takes `[num_tokens, 2 * n]`, whose first half is the gate, to `act(gate) * up`.
GATED_ACTIVATIONS: dict[str, GatedActivation] = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
    "gelu_new": gelu_tanh_and_mul,
    "gelu": _gated_by(F.gelu),
    "relu": _gated_by(F.relu),
}


def gated_activation(name: str) -> GatedActivation:
    """The gated form of the function that a configuration calls `name`."""
    if name not in GATED_ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported; supported are {', '.join(GATED_ACTIVATIONS)}"
        )
    return GATED_ACTIVATIONS[name]


def cpu_multiplies_in(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions that multiply matrices of `dtype`."""
    capabilities = torch.cpu.get_capabilities()
    match dtype:
        case torch.bfloat16:
            return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
        case torch.float16:
            return bool(capabilities.get("avx512_fp16") or capabilities.get("amx_fp16") or capabilities.get("fp16"))
        case _:
            return True


def rounds_weights(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model multiplies quickest by matrices that are rounded to whole numbers as they are read."""
    return device.type == "cpu" and dtype is torch.bfloat16 and multiplies_whole_numbers() and not _has_tiles()


def linear_for(dtype: torch.dtype, device: torch.device) -> Linear:
    """The quickest `F.linear` for weights of `dtype` on `device`."""
    if device.type not in ("cpu", "cuda"):
        return Linear(F.linear, quick=True)
    if device.type == "cuda":
        return Linear(linear_dense, quick=True)
    ours = rounds_weights(dtype, device) or not cpu_multiplies_in(dtype)
    if ours or (dtype is torch.float32 and not _torch_has_avx512()):
        return Linear(linear_dense_quick, quick=True)
    # Few rows wait for memory alone, and ours reads it faster; for more torch has better instructions.
    return Linear(
        F.linear,
        quick=True,
        few_rows=_ROWS_BOUND_BY_MEMORY,
        widens_from=0 if dtype is torch.float32 else _ROWS_WORTH_WIDENING,
        packs=dtype is torch.bfloat16,
    )


def _has_tiles() -> bool:
    """Whether the CPU multiplies tiles of bfloat16, 16 times as quick as floats; its other instructions are not."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _torch_has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def layer_windows(config: Any, layer_types: list[str] | None) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for none, from the names in `layer_types`."""
    num_layers: int = config.num_hidden_layers
    window: int | None = config.sliding_window
    if layer_types is None:
        return (0,) * num_layers
    if len(layer_types) != num_layers:
        raise UnsupportedModelError(f"layer_types names {len(layer_types)} layers, num_hidden_layers={num_layers}")
    unknown = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"layer type {', '.join(unknown)} is not supported; supported are full_attention and sliding_attention"
        )
    if "sliding_attention" in layer_types and not window:
        raise UnsupportedModelError("layer_types has sliding_attention but sliding_window is not set")
    return tuple(window if window and kind == "sliding_attention" else 0 for kind in layer_types)


def head_shape(config: Any) -> tuple[int, int, int]:
    """`(num_heads, num_kv_heads, head_dim)` of a configuration."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(f"{num_heads} attention heads cannot share {num_kv_heads} KV heads evenly")
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim={head_dim} is odd: rotary embedding turns pairs")
    return num_heads, num_kv_heads, head_dim
