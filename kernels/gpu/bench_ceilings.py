"""What the GPU does at its best: a stream that is only read, a copy, a large product in bfloat16. Random data.

Zeros would flatter: a product of zeros ran 13 % faster than one of random numbers on an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from .cases import Case, OnCase, Row, rows_of
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


def rows(
    device: torch.device,
    *,
    num_bytes: int = READ_BYTES,
    size: int = PRODUCT,
    first_case: int = 0,
    on_case: OnCase = lambda _number, _of, _what: None,
) -> Iterator[Row]:
    """The three figures, each twice: what differs between them is noise."""

    def read() -> Row:
        x = torch.randn(num_bytes // 4, device=device)
        return {**device_time(lambda: read_all(x)).figures, "bytes": num_bytes, "flops": 0}

    def copy() -> Row:
        x = torch.randn(num_bytes // 4, device=device)
        y = torch.empty_like(x)
        return {**device_time(lambda: y.copy_(x)).figures, "bytes": 2 * num_bytes, "flops": 0}

    def product() -> Row:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        return {**device_time(lambda: torch.mm(a, b)).figures, "bytes": 6 * size * size, "flops": 2 * size**3}

    kinds: tuple[tuple[str, str, Callable[[], Row]], ...] = (
        ("product", f"{size}^3 bfloat16", product),  # first, as it needs no kernel of ours and warms the device
        ("copy", f"{num_bytes / 2**30:g} GiB", copy),
        ("read", f"{num_bytes / 2**30:g} GiB", read),
    )
    cases = [
        Case({"kernel": name, "shape": shape, "round": number}, lambda once=once: [once()])  # type: ignore[misc]
        for number in (1, 2)
        for name, shape, once in kinds
    ]
    return rows_of(cases, device, first=first_case, on_case=on_case)
