"""What every launcher of a Triton kernel has to know: interpreted or not, how wide the GPU is, what was compiled."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from triton import knobs

# Processors that the interpreter pretends to have: few, so that tests reach what happens when work outnumbers them.
_INTERPRETED_PROCESSORS = 8


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1` when triton was imported)."""
    return bool(knobs.runtime.interpret)


# Passed to kernels as a constexpr: make a dot's operands float32 first. The interpreter holds bfloat16 as uint16, and a
# `tl.dot` of two such is silently wrong there (Triton 3.6 to 3.9). On a GPU it would only cost speed.
UPCAST: Final = is_interpreted()


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; a made-up few in the interpreter."""
    return _INTERPRETED_PROCESSORS if device.type != "cuda" else _num_processors(device.index or 0)


@functools.cache
def _num_processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


class CompilationCounter:
    """Counts the variants of kernels that Triton makes ready in this process.

    Compiled anew or read from Triton's cache on disk, the launch that asked for it stalls: neither may happen once an
    executor is ready. It listens to binaries being loaded, which each variant's is once; the hooks of compilation
    itself need arguments that JSON can write, and dataclasses among them would fail.
    """

    def __init__(self) -> None:
        self.count = 0
        knobs.runtime.kernel_load_end_hook.add(self)

    def __call__(self, *_event: Any) -> None:  # Triton's hook protocol
        self.count += 1


_COUNTER: Final = CompilationCounter()  # one of a process, as is the hook of triton that it answers


def compilations() -> int:
    """How many variants of Triton kernels this process has made ready so far; 0 in the interpreter."""
    return _COUNTER.count
