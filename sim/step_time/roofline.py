"""A step's time in closed form, from a model's sizes and a GPU's data sheet: no measurement needed.

    t = max(weight bytes / bandwidth, FLOPs / FLOP rate)       every matrix product but attention's
      + KV bytes read / bandwidth + attention FLOPs / FLOP rate
      + layers * c_layer + rows * c_row + c_step
      + 2 * layers * all-reduce                                 with tensor parallelism

Everything ends in integers of 2**-16 ns, so that a run of decodes, whose time is linear in the KV it reads, is summed
up exactly in one go.

Source of the efficiencies (share of the data sheet's rates that kernels reach): Vidur's measured layer operators of
Llama-2-7B. H100 and A100 agree to the second digit: 5.6 ms for 12.95 GB at 3.35 TB/s, 82.9 ms for 4,096 tokens at
989 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from ...messages.errors import InvalidConfigError
from .gpus import GpuSpec
from .host_overhead import HostOverhead
from .interface import StepShape
from .model_shape import BITS, ModelShape

_SHIFT = 16
_ONE = 1 << _SHIFT
_MAX_INT64 = (1 << 63) - 1
_MIN_VECTOR = 128  # fewer steps are summed sooner one by one than by numpy


class Efficiency(msgspec.Struct, frozen=True, kw_only=True):
    """How near kernels come to the data sheet, and what they cost beside.

    Attributes:
        bandwidth: share of the memory bandwidth.
        flops: share of the matrix rate in large products.
        attention: share of it in prefill attention.
        layer_ns: launches of a layer that no product's time covers (attention's, mostly).
        row_ns: device time of a row beside: sampling.
        step_ns: device time of a step beside: embedding, sampler's launches.
    """

    bandwidth: float = 0.69
    flops: float = 0.65
    attention: float = 0.45
    layer_ns: float = 4_000.0
    row_ns: float = 500.0
    step_ns: float = 60_000.0

    def __post_init__(self) -> None:
        for name in ("bandwidth", "flops", "attention"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is a share: more than 0, at most 1")
        for name in ("layer_ns", "row_ns", "step_ns"):
            if not getattr(self, name) >= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


class RooflineModel:
    """The closed form for one model on one GPU, or on `tp` of them that share every layer.

    Args:
        model: its sizes and dtypes.
        gpu: each of the group.
        tp: tensor-parallel size; 1, or a divisor of the heads.
        efficiency: see there.
        host: see there.

    Raises:
        InvalidConfigError: `tp` does not divide the heads.
    """

    def __init__(
        self,
        model: ModelShape,
        gpu: GpuSpec,
        *,
        tp: int = 1,
        efficiency: Efficiency | None = None,
        host: HostOverhead | None = None,
    ) -> None:
        check_tp(model, tp)
        self.model = model
        self.gpu = gpu
        self.tp = tp
        self.efficiency = efficiency if efficiency is not None else Efficiency()
        self.host = host if host is not None else HostOverhead()
        self._base: dict[tuple[int, int, int], int] = {}

        eff = self.efficiency
        self._ns_per_byte = 1e9 / (gpu.bandwidth * eff.bandwidth)
        self._ns_per_flop = 1e9 / (gpu.flops(model.weight_dtype) * eff.flops)
        # Attention multiplies in the KV's precision, which is widened to 16 bits.
        attention_dtype = "float32" if model.kv_dtype == "float32" else "bfloat16"
        ns_per_attention_flop = 1e9 / (gpu.flops(attention_dtype) * eff.attention)
        self._weight_bits = BITS[model.weight_dtype]
        # A token that is looked at costs 2 FLOPs for the score and 2 for the sum, in each dimension of each query head.
        flops_per_pair = 4 * model.num_heads * model.head_dim / tp
        kv_bytes = model.kv_bytes_per_token(tp) / model.num_layers
        pair_ns = flops_per_pair * ns_per_attention_flop
        read_ns = kv_bytes * self._ns_per_byte
        num_full = model.num_layers - model.num_sliding_layers
        # In units of 2**-16 ns: per KV token read, and per pair of query and key; full layers, layers with a window.
        self._read_full = round(num_full * read_ns * _ONE)
        self._read_sliding = round(model.num_sliding_layers * read_ns * _ONE)
        self._pair_full = round(num_full * pair_ns * _ONE)
        self._pair_sliding = round(model.num_sliding_layers * pair_ns * _ONE)
        self._kv_full = self._read_full + self._pair_full
        self._kv_sliding = self._read_sliding + self._pair_sliding
        self._window = model.sliding_window

    @property
    def kv_read_ns(self) -> float:
        """Time to read one token's KV of one layer."""
        return self.model.kv_bytes_per_token(self.tp) / self.model.num_layers * self._ns_per_byte

    def bytes_ns(self, num_bytes: float) -> float:
        """Time to read or write so many bytes of memory."""
        return num_bytes * self._ns_per_byte

    def weights_ns(self, num_tokens: int) -> float:
        """Time to read the weights that `num_tokens` tokens meet; of the experts, those expected to be met."""
        model = self.model
        params: float = model.dense_params + model.head_params
        if model.num_experts:
            missed = (1.0 - model.num_active_experts / model.num_experts) ** num_tokens
            params += model.num_moe_layers * model.num_experts * (1.0 - missed) * model.expert_params
        return params / self.tp * self._weight_bits / 8 * self._ns_per_byte

    def products_ns(self, num_tokens: int, num_samples: int) -> float:
        """Time to multiply with them, if memory were free."""
        model = self.model
        per_token = 2 * (model.num_active_params - model.head_params)
        return (per_token * num_tokens + 2 * model.head_params * num_samples) / self.tp * self._ns_per_flop

    def all_reduce_ns(self, num_tokens: int) -> float:
        """One all-reduce of the hidden states, a ring's volume at the link's rate."""
        if self.tp == 1:
            return 0.0
        num_bytes = num_tokens * self.model.hidden_size * max(16, BITS[self.model.kv_dtype]) / 8
        return self.gpu.link_latency_ns + 2 * (self.tp - 1) / self.tp * num_bytes / self.gpu.link_bandwidth * 1e9

    def _base_units(self, num_tokens: int, num_samples: int, num_rows: int) -> int:
        """All but attention, in units of 2**-16 ns."""
        key = (num_tokens, num_samples, num_rows)
        base = self._base.get(key)
        if base is None:
            eff, num_layers = self.efficiency, self.model.num_layers
            total = max(self.weights_ns(num_tokens), self.products_ns(num_tokens, num_samples))
            total += num_layers * eff.layer_ns + num_rows * eff.row_ns + eff.step_ns
            total += 2 * num_layers * self.all_reduce_ns(num_tokens)
            base = self._base[key] = max(_ONE, round(total * _ONE))
        return base

    def _prefill_units(self, num_new: int, num_history: int) -> int:
        """Attention of a chunk: the KV it reads once, and the pairs it looks at."""
        length = num_history + num_new
        pairs = num_new * num_history + num_new * (num_new + 1) // 2
        units = self._read_full * length + self._pair_full * pairs
        if self._read_sliding:
            window = self._window
            seen = _windowed_pairs(length, window) - _windowed_pairs(num_history, window)
            units += self._read_sliding * min(length, window + num_new) + self._pair_sliding * seen
        return units

    def head_ns(self, num_samples: int) -> float:
        """The output matrix alone, for rows that are sampled from."""
        params = self.model.head_params / self.tp
        flops = 2 * params * num_samples
        return max(params * self._weight_bits / 8 * self._ns_per_byte, flops * self._ns_per_flop)

    def decode_attention_ns(self, num_decodes: int, kv_tokens: int) -> float:
        """Attention of all layers, for rows that decode."""
        sliding = self._kv_sliding * min(kv_tokens, num_decodes * self._window)
        return (self._kv_full * kv_tokens + sliding) / _ONE

    def prefill_attention_ns(self, num_new: int, num_history: int) -> float:
        """Attention of all layers, for a chunk of a prompt."""
        return self._prefill_units(num_new, num_history) / _ONE

    def step_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        num_decodes, prefills, kv_tokens = shape.num_decodes, shape.prefills, shape.decode_kv_tokens
        num_tokens = num_decodes
        units = self._kv_full * kv_tokens
        if self._kv_sliding:
            # The lengths are not known one by one; this is exact when they are all beyond the window, or all within.
            units += self._kv_sliding * min(kv_tokens, num_decodes * self._window)
        for num_new, num_history in prefills:
            num_tokens += num_new
            units += self._prefill_units(num_new, num_history)
        units += self._base_units(num_tokens, shape.num_samples, num_decodes + len(prefills))
        return units >> _SHIFT

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        """See `StepTimeModel`."""
        num_decodes = shape.num_decodes
        base = self._base_units(num_decodes, shape.num_samples, num_decodes)
        longest = shape.decode_kv_tokens + num_steps * num_decodes
        if base + (self._kv_full + self._kv_sliding) * longest > _MAX_INT64:
            return [self.step_ns(shape.after_decodes(i)) for i in range(num_steps)]
        if num_steps < _MIN_VECTOR and not self._kv_sliding:
            first, by = base + self._kv_full * shape.decode_kv_tokens, self._kv_full * num_decodes
            return [units >> _SHIFT for units in range(first, first + num_steps * by, by)]
        kv_tokens = np.arange(num_steps, dtype=np.int64) * num_decodes + shape.decode_kv_tokens
        units = base + self._kv_full * kv_tokens
        if self._kv_sliding:
            units += self._kv_sliding * np.minimum(kv_tokens, num_decodes * self._window)
        result: list[int] = (units >> _SHIFT).tolist()
        return result

    def host_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        return self.host.host_ns(shape)

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        """None: a closed form has no range; how far to trust it, `describe` says."""
        return 0

    def describe(self) -> dict[str, str | int | float]:
        """See `StepTimeModel`."""
        eff = self.efficiency
        return {
            "kind": "roofline",
            "rests_on": "closed form of data-sheet figures, not measured",
            "model": self.model.name,
            "weight_dtype": self.model.weight_dtype,
            "kv_dtype": self.model.kv_dtype,
            "gpu": self.gpu.name,
            "tp": self.tp,
            "efficiency_bandwidth": eff.bandwidth,
            "efficiency_flops": eff.flops,
            "efficiency_attention": eff.attention,
            "host_step_ns": self.host.step_ns,
            "host_row_ns": self.host.row_ns,
        }


def _windowed_pairs(length: int, window: int) -> int:
    """Pairs of query and key in a sequence whose queries look back over `window` tokens, themselves included."""
    within = min(length, window)
    return within * (within + 1) // 2 + (length - within) * window


def check_tp(model: ModelShape, tp: int) -> None:
    """Whether `tp` GPUs can share the model's layers.

    Raises:
        InvalidConfigError: they cannot; the message says which sizes can.
    """
    possible = [size for size in (1, 2, 4, 8, 16, 32) if divides(model, size)]
    if tp < 1 or not divides(model, tp):
        raise InvalidConfigError(
            f"tensor_parallel_size is {tp}, which does not divide {model.name}'s {model.num_heads} heads with "
            f"{model.num_kv_heads} KV heads; possible are {', '.join(map(str, possible))}",
            field="tensor_parallel_size",
        )


def divides(model: ModelShape, tp: int) -> bool:
    """Heads are dealt out evenly; KV heads too, or each is held by several GPUs evenly."""
    return model.num_heads % tp == 0 and (model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0)
