"""Rotary position embedding of queries and keys, fused with their norm before it and the KV write after it."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from . import cpu_build
from .cpu_build import CODE
from .paged_attention import CACHE_CODES, write_kv
from .rms_norm import rms_norm_ref

_MAX_HEAD_DIM = 1024  # as in csrc/fused.c


class _Tensors(NamedTuple):
    """The tensors of `rotary_and_write`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor
    positions: torch.Tensor
    k_cache: torch.Tensor | None
    v_cache: torch.Tensor | None
    slot_mapping: torch.Tensor | None
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None


def rotary_ref(x: torch.Tensor, cos_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`x`, `[num_tokens, heads, head_dim]`, with the first `rotary_dim` elements of each head rotated in two halves.

    Element i is paired with i + rotary_dim / 2 (GPT-NeoX's order). In float32 (float64 for float64), rounded once.
    Source: RoFormer (Su et al. 2021), equation 34.
    """
    rotary_dim = cos_sin.shape[1]
    y = x if x.dtype == torch.float64 else x.float()
    cos, sin = cos_sin[positions].to(y.dtype).unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = y[..., :rotary_dim].chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, y[..., rotary_dim:]), dim=-1).to(x.dtype)


def rotary_and_write_ref(  # noqa: PLR0917 - inputs, table, cache: as in write_kv
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """What `rotary_and_write` means; the norm is not rounded before it is rotated."""
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x if x.dtype == torch.float64 else x.float()
        x.copy_(rotary_ref(y if weight is None else rms_norm_ref(y, weight, eps), cos_sin, positions))
    if k_cache is not None and v_cache is not None and slot_mapping is not None:
        write_kv(k, v, k_cache, v_cache, slot_mapping)


def rotary_and_write(  # noqa: PLR0917 - inputs, table, cache: as in write_kv
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor | None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Norm and rotate `q` and `k` in place, then write keys and values to the cache.

    Args:
        q: `[num_tokens, num_heads, head_dim]`; a view into a fused projection will do, as for `k` and `v`.
        k: `[num_tokens, num_kv_heads, head_dim]`.
        v: `[num_tokens, num_kv_heads, v_head_dim]`, unchanged.
        cos_sin: `[max_position, rotary_dim]` float32: rotary_dim / 2 cosines, then as many sines.
        positions: `[num_tokens]` int64, rows of `cos_sin`.
        k_cache, v_cache, slot_mapping: as for `write_kv`; all None to rotate only.
        q_weight, k_weight: `[head_dim]`, gain of an RMS norm of each head before the rotation; None for no norm.
        eps: of that norm.

    Raises:
        IndexError: a position outside `cos_sin` or a slot outside the cache. Nothing has been written then. Not on a
            GPU, where such a position takes the table's nearest row, and such a slot is skipped.
    """
    tensors = _Tensors(q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight)
    if q.device.type == "cuda":
        from .gpu import rotary as gpu

        if gpu.can(*tensors):
            gpu.rotary_and_write(*tensors[:8], q_weight=q_weight, k_weight=k_weight, eps=eps)
            return
    kernels = _kernels() if _c_can(tensors) else None
    if kernels is None:
        rotary_and_write_ref(*tensors[:8], q_weight=q_weight, k_weight=k_weight, eps=eps)
        return
    arguments = _c_arguments(tensors, eps)
    status = kernels.octavo_rotary(arguments)
    if status == 1:
        raise IndexError(f"a position is outside cos_sin's {cos_sin.shape[0]} rows: lower max_model_len, or extend it")
    if status == 2:
        raise IndexError("a slot of slot_mapping is outside the cache")


def _c_can(tensors: _Tensors) -> bool:
    q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight = tensors
    dtype = q.dtype
    if q.device.type != "cpu" or dtype not in cpu_build.DTYPE_CODES or q.shape[2] > _MAX_HEAD_DIM:
        return False
    if k.dtype is not dtype or v.dtype is not dtype or q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        return False
    if cos_sin.dtype is not torch.float32 or positions.dtype is not torch.int64:
        return False
    if not (cos_sin.is_contiguous() and positions.is_contiguous()):
        return False
    if k_cache is not None and v_cache is not None and slot_mapping is not None:
        if k_cache.dtype not in CACHE_CODES or v_cache.dtype is not k_cache.dtype:
            return False
        if slot_mapping.dtype is not torch.int64:
            return False
        if not (k_cache.is_contiguous() and v_cache.is_contiguous() and slot_mapping.is_contiguous()):
            return False
    elif k_cache is not None or v_cache is not None or slot_mapping is not None:
        raise ValueError("k_cache, v_cache and slot_mapping belong together: give all of them or none")
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    return all(
        weight.dtype in cpu_build.DTYPE_CODES and weight.dtype is weights[0].dtype and weight.is_contiguous()
        for weight in weights
    )


class _RotaryArgs(ctypes.Structure):
    """`rotary_args` of csrc/operations.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_cache", "v_cache", "cos_sin", "positions", "slots")),
        *((name, ctypes.c_void_p) for name in ("q_weight", "k_weight")),
        *((f"{x}_stride_{axis}", ctypes.c_int64) for x in "qkv" for axis in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "v_head_dim")),
        *((name, ctypes.c_int64) for name in ("rotary_dim", "max_position", "num_blocks", "block_size")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "weight_dtype", "num_threads", "cache_dtype")),
    )


def _c_arguments(tensors: _Tensors, eps: float) -> _RotaryArgs:
    q, k, v, cos_sin, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight = tensors
    weight = q_weight if q_weight is not None else k_weight
    return _RotaryArgs(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if k_cache is None else k_cache.data_ptr(),
        None if v_cache is None else v_cache.data_ptr(),
        cos_sin.data_ptr(),
        positions.data_ptr(),
        None if slot_mapping is None else slot_mapping.data_ptr(),
        None if q_weight is None else q_weight.data_ptr(),
        None if k_weight is None else k_weight.data_ptr(),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        v.shape[2],
        cos_sin.shape[1],
        cos_sin.shape[0],
        0 if k_cache is None else k_cache.shape[0],
        1 if k_cache is None else k_cache.shape[2],
        eps,
        cpu_build.DTYPE_CODES[q.dtype],
        0 if weight is None else cpu_build.DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
        cpu_build.DTYPE_CODES[q.dtype] if k_cache is None else CACHE_CODES[k_cache.dtype],
    )


_kernels = cpu_build.declared(octavo_rotary=(CODE, ctypes.POINTER(_RotaryArgs)))
