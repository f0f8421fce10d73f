"""A decoder's layers in one call, where each of their operations has a C kernel.

A decode step of one row is some 250 operations, most of them far shorter than the way from Python to C and back (20 us
and more each, with the GIL to be won again), and while that is gone the other threads fall asleep. In one call nothing
lies between them. They are the same operations on the same numbers, so the bits are the same as one by one.

Qwen3-0.6B's shape, bfloat16, one row, 2 threads, both ways in turn while the machine was quiet: 49.4 ms a step one by
one, 39.9 ms in one call; reading the weights at that machine's 30 GB/s takes 39.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import cpu_build
from .attention_batch import AttentionBatch
from .attention_kind import AttentionKind
from .cpu_build import CODE
from .fp8_weight import Fp8Weight
from .gated_activation import C_CODES as ACTIVATION_CODES
from .gated_activation import GatedActivation
from .kv_quantization import head_dim_of
from .linear_packed import FEW_ROWS, PackedWeight
from .linear_rounded import RoundedWeight
from .paged_attention import CACHE_CODES
from .quantized_weight import LinearWeight, QuantizedWeight, WeightPart

_QUANTIZED, _PACKED, _ROUNDED = 16, 32, 128  # as in csrc/decoder.c, as are the next two
_MAX_PARTS = 3
_OUT_OF_MEMORY, _POSITION_OUTSIDE = 1, 2


@dataclass(frozen=True, slots=True)
class StackProduct:
    """A linear layer; `bias` is added after the product has been rounded."""

    weight: LinearWeight
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class StackLayer:
    """What one layer computes, on the residual stream x:

        x += after_attention(o(attention(qkv(before_attention(x)))))
        x += after_mlp(down(activation(gate_up(before_mlp(x)))))

    Attributes:
        before_attention, after_attention, before_mlp, after_mlp: gains of RMS norms; None: no norm.
        eps: of these.
        q_norm, k_norm: gains of the norms of each head of queries and keys, before they turn; None: no norm.
        qk_eps: of those.
        cos_sin: as for `rotary_and_write`; None: nothing turns, and there are no such norms.
        attention: which keys a query sees, and how it weighs them.
        activation: of the gate, a function of `gated_activation`.
    """

    qkv: StackProduct
    o: StackProduct
    gate_up: StackProduct
    down: StackProduct
    before_attention: torch.Tensor
    before_mlp: torch.Tensor
    eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention: AttentionKind
    activation: GatedActivation
    after_attention: torch.Tensor | None = None
    after_mlp: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    qk_eps: float = 1e-6
    cos_sin: torch.Tensor | None = None


class DecoderStack:
    """Layers that C computes one after the other. Make one with `decoder_stack`.

    Args:
        layers: all of which `decoder_stack` has found fit.
        quick: as for `linear_quantized`.
    """

    def __init__(
        self, kernels: ctypes.CDLL, layers: Sequence[StackLayer], *, dtype: torch.dtype, quick: bool = False
    ) -> None:
        self._kernels = kernels
        self._layers = tuple(layers)  # whose tensors must outlive their addresses
        self._dtype = dtype
        self._quick = quick
        self._is_packed = any(
            isinstance(part, PackedWeight)
            for layer in layers
            for product in (layer.qkv, layer.o, layer.gate_up, layer.down)
            for part in _parts(product)
        )
        self._structs = (_Layer * len(layers))(*map(_described, layers))
        self._caches: list[tuple[int, int]] = []

    def run(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        """Change `x` by what all layers add to it, and write the new tokens' keys and values.

        Args:
            x: `[num_tokens, hidden_size]`, contiguous, of the stack's dtype; changed in place. At most
                `linear_packed.FEW_ROWS` tokens where a weight is packed.
            positions: `[num_tokens]` int64.
            caches: K and V of each layer, as for `paged_attention`, all of one dtype and number of blocks.

        Raises:
            IndexError: a position outside `cos_sin` or a slot outside the cache. Nothing has been written then.
            MemoryError: no memory for what is computed in between.
        """
        assert x.dtype is self._dtype
        assert x.is_contiguous()
        assert not self._is_packed or len(x) <= FEW_ROWS
        assert positions.dtype is torch.int64
        assert positions.is_contiguous()
        assert batch.slot_mapping.dtype is torch.int64
        assert batch.slot_mapping.is_contiguous()
        for indices in (batch.query_start, batch.context_lens, batch.block_tables):
            assert indices.dtype is torch.int32
            assert indices.stride(-1) == 1 or indices.shape[-1] <= 1
        self._use(caches)
        k_cache = caches[0][0]
        status = self._kernels.octavo_decoder_stack(
            _Step(
                ctypes.addressof(self._structs),
                x.data_ptr(),
                positions.data_ptr(),
                batch.slot_mapping.data_ptr(),
                batch.query_start.data_ptr(),
                batch.context_lens.data_ptr(),
                batch.block_tables.data_ptr(),
                len(self._layers),
                x.shape[0],
                x.shape[1],
                batch.num_rows,
                batch.block_tables.stride(0),
                batch.block_size,
                k_cache.shape[0],
                cpu_build.DTYPE_CODES[x.dtype],
                CACHE_CODES[k_cache.dtype],
                torch.get_num_threads(),
                self._quick,
            )
        )
        if status == _OUT_OF_MEMORY:
            raise MemoryError("the decoder's layers could not allocate their scratch memory")
        if status == _POSITION_OUTSIDE:
            raise IndexError("a position is outside cos_sin: lower max_model_len, or extend it")
        if status:
            raise IndexError(
                f"a slot of slot_mapping is outside the cache's {k_cache.shape[0] * k_cache.shape[2]} slots"
            )

    def _use(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Note where the caches lie; they are looked at when they are others than before."""
        addresses = [(k.data_ptr(), v.data_ptr()) for k, v in caches]
        if addresses == self._caches:
            return
        shape = caches[0][0].shape
        for layer, struct, (k, v) in zip(self._layers, self._structs, caches, strict=True):
            assert k.shape == v.shape == (shape[0], layer.num_kv_heads, shape[2], k.shape[3])
            assert head_dim_of(k) == layer.head_dim
            assert k.dtype is v.dtype is caches[0][0].dtype
            assert k.is_contiguous()
            assert v.is_contiguous()
            struct.k_cache, struct.v_cache = k.data_ptr(), v.data_ptr()
        self._caches = addresses


def decoder_stack(layers: Sequence[StackLayer], *, dtype: torch.dtype, quick: bool = False) -> DecoderStack | None:
    """The layers as one call, for `x` of `dtype`; None where there is no C library, or one of them does not fit it."""
    kernels = _kernels()
    if kernels is None or dtype not in cpu_build.DTYPE_CODES or not all(_fits(layer, dtype) for layer in layers):
        return None
    return DecoderStack(kernels, layers, dtype=dtype, quick=quick)


def _fits(layer: StackLayer, dtype: torch.dtype) -> bool:
    norms = (layer.before_attention, layer.after_attention, layer.before_mlp, layer.after_mlp)
    return (
        all(_product_fits(product, dtype) for product in (layer.qkv, layer.o, layer.gate_up, layer.down))
        and _are_alike(norms, (dtype, torch.float32))
        and _are_alike((layer.q_norm, layer.k_norm), tuple(cpu_build.DTYPE_CODES))
        and _are_alike((layer.cos_sin,), (torch.float32,))
        and _are_alike((layer.attention.sinks,), (torch.float32,))
        and layer.attention.alibi_slopes is None
        and layer.activation in ACTIVATION_CODES
        and (layer.cos_sin is not None or layer.q_norm is None is layer.k_norm)
        and layer.head_dim <= _MAX_HEAD_DIM
    )


_MAX_HEAD_DIM = 1024  # as in csrc/fused.c


def _are_alike(tensors: tuple[torch.Tensor | None, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    there = [tensor for tensor in tensors if tensor is not None]
    return all(
        x.dtype is there[0].dtype and x.dtype in dtypes and x.is_contiguous() and x.device.type == "cpu" for x in there
    )


def _product_fits(product: StackProduct, dtype: torch.dtype) -> bool:
    parts = _parts(product)
    if len(parts) > _MAX_PARTS or not _are_alike((product.bias,), (dtype,)):
        return False
    return all(_part_fits(part, dtype) for part in parts)


def _part_fits(part: _Part, dtype: torch.dtype) -> bool:
    match part:
        case QuantizedWeight():
            return part.input_order is None and part.device.type == "cpu"
        case PackedWeight() | RoundedWeight():
            return part.dtype is dtype
        case Fp8Weight():
            return False
        case _:
            return part.dtype in cpu_build.DTYPE_CODES and part.is_contiguous() and part.device.type == "cpu"


_Part = WeightPart | PackedWeight | RoundedWeight


def _parts(product: StackProduct) -> tuple[_Part, ...]:
    return product.weight if isinstance(product.weight, tuple) else (product.weight,)


class _Product(ctypes.Structure):
    """`product` of csrc/decoder.c."""

    _fields_ = (
        ("weights", ctypes.c_void_p * _MAX_PARTS),
        ("bias", ctypes.c_void_p),
        ("out_features", ctypes.c_int64 * _MAX_PARTS),
        ("in_features", ctypes.c_int64),
        ("num_parts", ctypes.c_int64),
        ("kinds", ctypes.c_int32 * _MAX_PARTS),
        ("unused", ctypes.c_int32),
    )


class _Layer(ctypes.Structure):
    """`layer` of csrc/decoder.c."""

    _fields_ = (
        *((name, _Product) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")),
        *((name, ctypes.c_void_p) for name in ("q_norm", "k_norm", "cos_sin", "sinks", "k_cache", "v_cache")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim", "max_position")),
        ("window", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("eps", "qk_eps", "scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("norm_dtype", "qk_norm_dtype", "activation", "unused")),
    )


class _Step(ctypes.Structure):
    """`step` of csrc/decoder.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "x", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in ("query_start", "context_lens", "block_tables")),
        *((name, ctypes.c_int64) for name in ("num_layers", "num_tokens", "hidden_size", "num_rows")),
        *((name, ctypes.c_int64) for name in ("block_table_stride", "block_size", "num_blocks")),
        *((name, ctypes.c_int32) for name in ("dtype", "cache_dtype", "num_threads", "may_be_quick")),
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _code(*tensors: torch.Tensor | None) -> int:
    """Of those that are there, which are of one dtype."""
    return next((cpu_build.DTYPE_CODES[tensor.dtype] for tensor in tensors if tensor is not None), 0)


def _described_product(product: StackProduct) -> _Product:
    parts = _parts(product)
    described = _Product(bias=_address(product.bias), in_features=parts[0].shape[1], num_parts=len(parts))
    for index, part in enumerate(parts):
        if isinstance(part, QuantizedWeight):
            described.weights[index], described.kinds[index] = part.described, _QUANTIZED
        elif isinstance(part, PackedWeight):
            described.weights[index], described.kinds[index] = part.address, _PACKED + part.panel
        elif isinstance(part, RoundedWeight):
            described.weights[index], described.kinds[index] = part.address, _ROUNDED
        else:
            assert isinstance(part, torch.Tensor), "others do not fit"
            described.weights[index], described.kinds[index] = part.data_ptr(), cpu_build.DTYPE_CODES[part.dtype]
        described.out_features[index] = part.shape[0]
    return described


def _described(layer: StackLayer) -> _Layer:
    s = layer
    return _Layer(
        *map(_described_product, (s.qkv, s.o, s.gate_up, s.down)),
        *map(_address, (s.before_attention, s.after_attention, s.before_mlp, s.after_mlp)),
        *map(_address, (s.q_norm, s.k_norm, s.cos_sin, s.attention.sinks)),
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        rotary_dim=0 if s.cos_sin is None else s.cos_sin.shape[1],
        max_position=0 if s.cos_sin is None else s.cos_sin.shape[0],
        window=s.attention.sliding_window,
        eps=s.eps,
        qk_eps=s.qk_eps,
        scale=s.attention.scale,
        softcap=s.attention.softcap,
        norm_dtype=_code(s.before_attention),
        qk_norm_dtype=_code(s.q_norm, s.k_norm),
        activation=ACTIVATION_CODES[s.activation],
    )


_kernels = cpu_build.declared(octavo_decoder_stack=(CODE, ctypes.POINTER(_Step)))
