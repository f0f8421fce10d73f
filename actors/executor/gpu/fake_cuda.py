"""The GPU that computes nothing (`kernels.gpu.fake_cuda`), for code that loads models to it.

So it becomes known, in seconds and without a GPU, what a model's steps will launch (`compile_ahead`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ....kernels.gpu import fake_cuda as fake
from ....kernels.gpu.fake_cuda import DEVICE, GpuFacts, KernelVariant
from ....kernels.gpu.fake_transfers import Transfers
from ....models.quantization import reader
from ....models.random_weights import RandomReader
from .. import device as device_module

__all__ = ["DEVICE", "GpuFacts", "KernelVariant", "Transfers", "fake_cuda"]


@contextlib.contextmanager
def fake_cuda(
    facts: GpuFacts,
    *,
    on_variant: Callable[[KernelVariant], None],
    on_launch: Callable[[str, tuple[int, int, int]], None] = lambda _name, _grid: None,
    capture: Callable[..., contextlib.AbstractContextManager[None]] = lambda *_, **__: contextlib.nullcontext(),
    transfers: Transfers | None = None,
) -> Iterator[None]:
    """See `kernels.gpu.fake_cuda.fake_cuda`; random weights are without contents as well."""
    RandomReader._made = _without_contents  # type: ignore[method-assign,assignment]  # normal numbers need a generator
    reader.quantize = fake.quantize_without_contents  # type: ignore[attr-defined]  # whence it is called
    device_module.resolve_device = lambda asked, gpu=None: DEVICE
    with fake.fake_cuda(facts, on_variant=on_variant, on_launch=on_launch, capture=capture, transfers=transfers):
        yield


def _without_contents(self: RandomReader, _name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> torch.Tensor:
    return torch.empty(shape, dtype=self.dtype, device=self.device)[part]
