"""Memory for weights on huge pages, and the way to give back pages of a file that have been copied there.

A step reads every weight once. On pages of 4 KiB the processor then waits for address translation, and its prefetcher
stops at each page's end: on huge pages the same loop reads up to 1.4 times as fast.

The system clears a page when it is first touched, and a virtual machine may have to ask its host for each huge page
then: a checkpoint of 1.2 GB was loaded in 3 to 5 s, and in 1 to 1.6 s on small pages, on which a step took a tenth
longer (4 % on another such machine, whose host itself has small pages). So the rest of a tensor lies on small pages
once a huge one was slow to come, and so does all that follows once slow ones have taken a tenth of a second (each of
113 matrices had waited 6 ms for one). When a tensor has been filled the kernel is asked to merge its pages in its own
time (khugepaged, some minutes).
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import time
from collections.abc import Sequence

import torch

_HUGE = 2 * 1024**2
_LEAST = 512 * 1024  # bytes below which a tensor is not worth pages of its own
_COLLAPSE = 25  # MADV_COLLAPSE, which Python does not name yet
_SLOW_NS = 1_000_000  # for a huge page: 0.5 s for a gigabyte; 5 ms were seen, and 0.1 to 0.2
_PATIENCE_NS = 100_000_000  # that a process spends on slow ones


class _Patience:
    """How long this process will wait for slow huge pages yet: they are slow for all of its tensors alike."""

    def __init__(self) -> None:
        self.left_ns = _PATIENCE_NS


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """As `torch.empty` on the CPU, on huge pages while they come fast; it lives as long as the tensor."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    # Whole huge pages from a multiple of their size on; what lies before it is never touched and costs nothing.
    size = -(-num_bytes // _HUGE) * _HUGE
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    offset = -start % _HUGE
    patience = _patience()
    if patience.left_ns <= 0:
        return _view(memory, offset, num_bytes, dtype, shape)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, offset, size)
    except OSError:  # a kernel without them
        return torch.empty(tuple(shape), dtype=dtype)
    for page in range(offset, offset + size - _HUGE, _HUGE):
        started_ns = time.thread_time_ns()  # what others take of the CPU meanwhile does not count
        memory[page] = 0
        took_ns = time.thread_time_ns() - started_ns
        if took_ns > _SLOW_NS:
            patience.left_ns -= took_ns
            memory.madvise(mmap.MADV_NOHUGEPAGE, page + _HUGE, offset + size - page - _HUGE)
            break
    return _view(memory, offset, num_bytes, dtype, shape)


def _view(memory: mmap.mmap, offset: int, num_bytes: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8, offset=offset, count=num_bytes).view(dtype).view(tuple(shape))


def place(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`torch.cat(parts).to(dtype)` in memory from `empty`, each part read once."""
    rows = sum(part.shape[0] for part in parts)
    out = empty((rows, *parts[0].shape[1:]), dtype)
    start = 0
    for part in parts:
        out[start : start + part.shape[0]].copy_(part)
        start += part.shape[0]
    merge_pages(out)
    return out


def merge_pages(tensor: torch.Tensor) -> None:
    """Let the kernel put memory from `empty` that has been filled on huge pages by and by, where it is not on them."""
    libc = _libc()
    if libc is not None and hasattr(mmap, "MADV_HUGEPAGE") and tensor.nbytes >= _LEAST:
        start = tensor.data_ptr()
        if start % _HUGE == 0:  # else it is not on pages of its own
            libc.madvise(start, -(-tensor.nbytes // _HUGE) * _HUGE, mmap.MADV_HUGEPAGE)


def collapse(tensor: torch.Tensor) -> None:
    """Put memory that somebody else has allocated and filled on huge pages, where it fills whole ones.

    At once while that goes fast (a kernel from 6.1 on), and else by and by.
    """
    libc = _libc()
    start = -(-tensor.data_ptr() // _HUGE) * _HUGE
    end = (tensor.data_ptr() + tensor.nbytes) // _HUGE * _HUGE
    if libc is None or not hasattr(mmap, "MADV_HUGEPAGE") or end <= start:
        return
    libc.madvise(start, end - start, mmap.MADV_HUGEPAGE)
    patience = _patience()
    for page in range(start, end, _HUGE):
        if patience.left_ns <= 0:
            return
        started_ns = time.thread_time_ns()
        if libc.madvise(page, _HUGE, _COLLAPSE):
            return
        took_ns = time.thread_time_ns() - started_ns
        if took_ns > _SLOW_NS:
            patience.left_ns -= took_ns


def release_file_pages(tensor: torch.Tensor) -> None:
    """Take the pages of a tensor that is a view of a file out of this process; reading them again maps them again.

    Nothing may have been written to the tensor.
    """
    libc = _libc()
    if libc is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        libc.madvise(start, end - start, mmap.MADV_DONTNEED)


@functools.cache
def _patience() -> _Patience:
    return _Patience()


@functools.cache
def _libc() -> ctypes.CDLL | None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.madvise.restype = ctypes.c_int
    return libc
