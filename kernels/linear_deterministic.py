"""Linear layers, and the elementwise functions of torch that need a substitute, whose bits depend on a row alone.

torch's products choose another order of sums for another number of rows, and its vectorised elementwise functions give
the last few elements of a tensor to other code than the rest: so a token's numbers change in the last place with what
else is in the batch. These do not; `octavo bench offline --peers octavo-deterministic` prints what that costs.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from . import cpu_build
from .cpu_build import CODE, POINTER, REAL, SIZE


def linear_deterministic_ref(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What `linear_deterministic` means: products summed in float32 (float64 for float64), rounded once."""
    if x.dtype == torch.float64:
        return F.linear(x, weight.double())
    return F.linear(x.float(), weight.float()).to(x.dtype)


def is_available() -> bool:
    """Whether the C library is there; torch has no path that keeps the promise."""
    return _kernels() is not None


def linear_deterministic(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, each output summed in one order of its own, in float32.

    Args:
        x: `[num_tokens, in_features]`, float32, bfloat16 or float16.
        weight: `[out_features, in_features]`, contiguous, in any of these dtypes.
        bias: `[out_features]`, added after the product has been rounded; None for none.

    Returns:
        `[num_tokens, out_features]`, dtype of `x`. Each element is bitwise the same, whatever else is in the batch and
        however many threads there are.

    Raises:
        ValueError: shapes or dtypes that the kernel does not take: there is no slower path to fall back on.
        RuntimeError: there is no C library (`is_available`), and `x` is on the CPU.
    """
    if x.is_cuda:
        from .gpu.linear import linear_deterministic as on_gpu

        return on_gpu(x, weight.to(x.dtype), bias)
    if (
        x.dtype not in cpu_build.DTYPE_CODES
        or weight.dtype not in cpu_build.DTYPE_CODES
        or x.device.type != "cpu"
        or x.dim() != 2
        or weight.dim() != 2
        or weight.shape[1] != x.shape[1]
        or not weight.is_contiguous()
    ):
        raise ValueError(
            f"linear_deterministic takes two floating matrices on the CPU, the weight contiguous, got "
            f"{x.dtype} {tuple(x.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )
    kernels = _needed()
    x = x.contiguous()
    num_tokens, in_features = x.shape
    out = torch.empty((num_tokens, weight.shape[0]), dtype=x.dtype)
    status = kernels.octavo_linear(
        *(x.data_ptr(), weight.data_ptr(), out.data_ptr(), num_tokens, in_features, weight.shape[0]),
        *(cpu_build.DTYPE_CODES[x.dtype], cpu_build.DTYPE_CODES[weight.dtype], torch.get_num_threads()),
    )
    if status != 0:
        raise MemoryError("linear_deterministic could not allocate its scratch memory")
    return out if bias is None else out.add_(bias)


def softcap_deterministic_(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`tanh(x / cap) * cap` in place; `x` float32, contiguous, of any shape. Each element's bits are its own."""
    if x.dtype is not torch.float32 or not x.is_contiguous() or x.device.type != "cpu":
        raise ValueError(f"softcap_deterministic_ takes contiguous float32 on the CPU, got {x.dtype} {x.stride()}")
    _needed().octavo_softcap(x.data_ptr(), x.numel(), cap, torch.get_num_threads())
    return x


def gelu_and_mul_ref(gate_up: torch.Tensor) -> torch.Tensor:
    """What `gelu_and_mul_deterministic` means: in float32 (float64 for float64), rounded once."""
    gate, up = (gate_up if gate_up.dtype == torch.float64 else gate_up.float()).chunk(2, dim=-1)
    return (F.gelu(gate) * up).to(gate_up.dtype)


def gelu_and_mul_deterministic(gate_up: torch.Tensor) -> torch.Tensor:
    """`gelu(gate) * up` with the exact gelu; each token's bits are its own.

    Args:
        gate_up: `[num_tokens, 2 * intermediate_size]`, contiguous, the gates in the first half.
    """
    if gate_up.dtype not in cpu_build.DTYPE_CODES or gate_up.dim() != 2 or not gate_up.is_contiguous():
        raise ValueError(f"gelu_and_mul_deterministic takes a contiguous matrix, got {gate_up.dtype} {gate_up.shape}")
    num_tokens, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, dim), dtype=gate_up.dtype)
    _needed().octavo_gelu_erf(
        *(gate_up.data_ptr(), out.data_ptr(), num_tokens, dim),
        *(cpu_build.DTYPE_CODES[gate_up.dtype], torch.get_num_threads()),
    )
    return out


def _needed() -> ctypes.CDLL:
    kernels = _kernels()
    if kernels is None:
        raise RuntimeError("deterministic arithmetic needs the C kernels: install gcc or clang, see the log")
    return kernels


_kernels = cpu_build.declared(
    octavo_linear=(CODE, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, CODE, CODE, CODE),
    octavo_softcap=(None, POINTER, SIZE, REAL, CODE),
    octavo_gelu_erf=(None, POINTER, POINTER, SIZE, SIZE, CODE, CODE),
)
