"""A GPU that computes nothing, for a process of its own: tensors without contents, kernels that are never run.

Torch's fake tensors have shape, dtype and device, so that code for CUDA takes its own ways, mixing devices is an error,
and so is whatever would wait for the device to say a number (`.item()`, `.tolist()`, a shape that follows from data).
Triton specialises every launch as it does on an H200, notes what it would compile, and checks the grid.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

MAX_SHARED_BYTES = 227 * 1024  # that one thread block of an H100 or H200 can have
DEVICE = torch.device("cuda", 0)
_GIB = 1024**3


class Kernels:
    """What Triton was asked for.

    Attributes:
        made: names of kernels, one for each variant that would have been compiled.
        captured: of those, the ones that were made while a graph was captured, which a real one forbids.
        num_launches: of any of them.
    """

    def __init__(self, *, compiles: bool) -> None:
        self.compiles = compiles
        self.made: list[str] = []
        self.captured: list[str] = []
        self.num_launches = 0
        self.is_capturing = False

    def make(
        self,
        kernel: Any,
        key: str,
        signature: dict[str, str],
        device: int,
        constexprs: dict[tuple[int, ...], Any],
        options: Any,
        attributes: dict[tuple[int, ...], Any],
        _warmup: bool,
    ) -> Any:
        """In the place of `JITFunction._do_compile`; the real thing as well, where asked for."""
        name = kernel.fn.__name__
        self.made.append(f"{name} {signature} {constexprs} {options.num_warps} {options.num_stages}")
        if self.is_capturing:
            self.captured.append(name)
        compiled: Any = _Compiled(self, name)
        if self.compiles:
            target = driver.active.get_current_target()
            source = kernel.ASTSource(kernel, signature, constexprs, attributes)
            shared = kernel.compile(source, target=target, options=options.__dict__).metadata.shared
            assert shared <= MAX_SHARED_BYTES, f"{self.made[-1]} takes {shared} bytes of shared memory"
        knobs.runtime.kernel_load_end_hook(None, None, name, None, None)
        kernel.device_caches[device][0][key] = compiled
        return compiled


class _Compiled:
    """What a launch needs of a compiled kernel."""

    function, packed_metadata = 0, ()

    def __init__(self, kernels: Kernels, name: str) -> None:
        self._kernels, self._name = kernels, name

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        self._kernels.num_launches += 1
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            raise ValueError(f"{self._name} cannot be launched on a grid of {x} x {y} x {z}")


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Graph:
    num_replays = 0

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        _Graph.num_replays += 1


class _Event:
    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def fake_cuda(*, compiles: bool = False) -> Iterator[Kernels]:
    """Be on a machine with an H200; not to be undone, so that it is for a process of its own.

    Args:
        compiles: for sm_90 indeed, and check the shared memory; takes seconds a kernel.
    """
    kernels = Kernels(compiles=compiles)

    @contextlib.contextmanager
    def capture(_graph: _Graph, **_options: Any) -> Iterator[None]:
        kernels.is_capturing = True
        yield
        kernels.is_capturing = False

    jit.JITFunction._do_compile = lambda self, *args: kernels.make(self, *args)
    driver.set_active(_Driver())
    _let_devices_be_guarded()
    for name, value in {
        "CUDAGraph": _Graph,
        "graph": capture,
        "Event": _Event,
        "device": lambda _device: contextlib.nullcontext(),
        "synchronize": lambda _device=None: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda _device=None: (139 * _GIB, 140 * _GIB),
        "memory_allocated": lambda _device=None: 20 * _GIB,
        "memory_reserved": lambda _device=None: 20 * _GIB,
        "max_memory_allocated": lambda _device=None: 21 * _GIB,
        "reset_peak_memory_stats": lambda _device=None: None,
        "get_device_properties": lambda _device=None: SimpleNamespace(multi_processor_count=132),
    }.items():
        setattr(torch.cuda, name, value)
    for name in ("empty", "zeros"):
        setattr(torch, name, _with_real_pinned(getattr(torch, name)))
    torch.Tensor.numpy = _real(torch.Tensor.numpy)  # type: ignore[method-assign,assignment]  # a view of pinned memory
    warnings.filterwarnings("ignore", message=".*data_ptr.*")
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield kernels


def _real(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **options)

    return called


def _with_real_pinned(make: Callable[..., Any]) -> Callable[..., Any]:
    """The host writes to pinned memory, so it is there; that it is not pinned makes no difference here."""

    really = _real(make)

    def maker(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return (really if pin_memory else make)(*args, **options)

    return maker


def _let_devices_be_guarded() -> None:
    """A torch without CUDA has nobody to switch CUDA devices, and refuses to index their tensors: let the one for meta
    tensors do it, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # of c10::DeviceType
    if not guards[cuda]:
        guards[cuda] = guards[meta]
