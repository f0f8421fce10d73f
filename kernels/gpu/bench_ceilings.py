"""What the GPU does at its best: a stream that is only read, a copy, a large product in bfloat16. Random data.

Zeros would flatter: a product of zeros ran 13 % faster than one of random numbers on an H200.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .device_time import device_time
from .launch import num_processors

READ_BYTES = 4 * 1024**3  # many times any L2
PRODUCT = 8192
_BLOCK = 8192
_PROGRAMS_EACH = 8  # of a multiprocessor


@triton.jit
def _read_kernel(
    x_ptr,  # [num_blocks * BLOCK]
    out_ptr,  # [num_programs]
    num_blocks,
    BLOCK: tl.constexpr,
):
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    block = program.to(tl.int64)
    while block < num_blocks:
        total += tl.load(x_ptr + block * BLOCK + col)
        block += num_programs
    tl.store(out_ptr + program, tl.sum(total, axis=0))


def read_all(x: torch.Tensor) -> torch.Tensor:
    """Sums of parts of `x`, float32 `[n]`: reads everything and writes next to nothing.

    Args:
        x: n a multiple of 8,192.
    """
    num_blocks = x.numel() // _BLOCK
    num_programs = min(num_blocks, num_processors(x.device) * _PROGRAMS_EACH)
    out = torch.empty(num_programs, dtype=torch.float32, device=x.device)
    _read_kernel[(num_programs,)](x, out, num_blocks, BLOCK=_BLOCK, num_warps=8)
    return out


def rows(device: torch.device, *, num_bytes: int = READ_BYTES, size: int = PRODUCT) -> list[dict[str, Any]]:
    """The three figures, each twice: what differs between them is noise."""
    x = torch.randn(num_bytes // 4, device=device)
    y = torch.empty_like(x)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    runs: list[tuple[str, str, Callable[[], object], int, int]] = [
        ("read", f"{num_bytes / 2**30:g} GiB", lambda: read_all(x), num_bytes, 0),
        ("copy", f"{num_bytes / 2**30:g} GiB", lambda: y.copy_(x), 2 * num_bytes, 0),
        ("product", f"{size}^3 bfloat16", lambda: torch.mm(a, b), 6 * size * size, 2 * size**3),
    ]
    return [
        {"kernel": name, "shape": shape, "us": device_time(run).us, "bytes": moved, "flops": flops, "round": number}
        for number in (1, 2)
        for name, shape, run, moved, flops in runs
    ]
