"""A GPU that computes nothing, for a process of its own: tensors without contents, kernels that are never run.

Torch's fake tensors have shape, dtype and device, so that code for CUDA takes its own ways, mixing devices is an error,
and so is whatever would wait for the device to say a number (`.item()`, `.tolist()`, a shape that follows from data).
Triton specialises every launch as it does on the GPU that is told of, and asks to have it compiled.

So it becomes known, in seconds and without a GPU, what some code will launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

from .. import weight_quantization
from ..code_layout import codes_shape, padded_inputs
from ..quantized_weight import QuantizedWeight
from .fake_transfers import Transfers

DEVICE = torch.device("cuda", 0)
_GIB = 1024**3
_CUDA, _META = 1, 14  # of c10::DeviceType


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What code asks of a GPU before it launches anything; the defaults are an H200's."""

    capability: tuple[int, int] = (9, 0)
    num_processors: int = 132
    total_bytes: int = 140 * _GIB
    free_bytes: int = 139 * _GIB

    @classmethod
    def of(cls, device: torch.device) -> GpuFacts:
        """Of a GPU that is there."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        properties = torch.cuda.get_device_properties(device)
        return cls(torch.cuda.get_device_capability(device), properties.multi_processor_count, total_bytes, free_bytes)


@dataclass(frozen=True, slots=True)
class KernelVariant:
    """A specialisation of a Triton kernel, as a launch asks for it."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def compile(self) -> Any:
        """Compile it as a launch would, into Triton's cache on disk or from it; returns Triton's compiled kernel."""
        source = self.kernel.ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        target = driver.active.get_current_target()
        with unset_fake_temporarily():
            return self.kernel.compile(source, target=target, options=self.options.__dict__)


def build_launcher(compiled: Any) -> bool:
    """Have Triton build the C function that launches a compiled kernel, which goes into its cache on disk as well.

    A launch would run a C compiler for it, one for each signature. It is linked with the driver's library, so that
    nothing is built where that is not installed.

    Returns:
        Whether it is there now. If not, a launch will build it: another Triton may have another way, or no need.
    """
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)
    except Exception:  # noqa: BLE001,RUF100 - of a part of Triton that it promises nothing about; only time is lost
        return False
    return True


@contextlib.contextmanager
def fake_cuda(
    facts: GpuFacts,
    *,
    on_variant: Callable[[KernelVariant], None],
    on_launch: Callable[[str, tuple[int, int, int]], None] = lambda _name, _grid: None,
    capture: Callable[..., contextlib.AbstractContextManager[None]] = lambda *_, **__: contextlib.nullcontext(),
    transfers: Transfers | None = None,
) -> Iterator[None]:
    """Be on a machine with such a GPU; not to be undone, so that it is for a process of its own.

    Weights are quantised without a look at them, and generators of random numbers are none.

    Args:
        on_variant: hears of each variant when it is first launched.
        on_launch: hears of every launch: the kernel's name and its grid.
        capture: in the place of `torch.cuda.graph`.
        transfers: watches what is copied and waited for; takes some time for each of torch's operations.
    """

    def synchronize(_device: Any = None) -> None:
        if transfers is not None:
            transfers.on_wait("torch.cuda.synchronize")
            transfers.complete()

    def make(
        kernel: Any,
        key: str,
        signature: dict[str, str],
        device: int,
        constexprs: dict[tuple[int, ...], Any],
        options: Any,
        attributes: dict[tuple[int, ...], Any],
        _warmup: bool,
    ) -> Any:
        """In the place of `JITFunction._do_compile`."""
        variant = KernelVariant(kernel, signature, constexprs, attributes, options)
        on_variant(variant)
        knobs.runtime.kernel_load_end_hook(None, None, variant.name, None, None)
        compiled = kernel.device_caches[device][0][key] = _Compiled(variant.name, on_launch)
        return compiled

    jit.JITFunction._do_compile = make
    driver.set_active(_Driver(facts))
    _let_devices_be_guarded()
    for name, value in {
        "CUDAGraph": _Graph,
        "graph": capture,
        "Event": _Event if transfers is None else transfers.event,
        "device": lambda _device: contextlib.nullcontext(),
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "get_device_capability": lambda _device=None: facts.capability,
        "mem_get_info": lambda _device=None: (facts.free_bytes, facts.total_bytes),
        "memory_allocated": lambda _device=None: facts.total_bytes // 7,
        "memory_reserved": lambda _device=None: facts.total_bytes // 7,
        "max_memory_allocated": lambda _device=None: facts.total_bytes // 7 + _GIB,
        "reset_peak_memory_stats": lambda _device=None: None,
        "get_device_properties": lambda _device=None: SimpleNamespace(multi_processor_count=facts.num_processors),
    }.items():
        setattr(torch.cuda, name, value)
    for name in ("empty", "zeros"):
        setattr(torch, name, _with_real_pinned(getattr(torch, name), transfers))
    torch.tensor = _without_device(torch.tensor, transfers)
    torch.equal = _by_identity(torch.equal)
    fake_tensor.CONSTANT_NUMEL_LIMIT = 0  # else operations on a single number of the host's are done, also on the GPU
    torch.Tensor.numpy = _real(torch.Tensor.numpy)  # type: ignore[method-assign]  # a view of pinned memory
    torch.Generator = _Generator  # type: ignore[misc,assignment]  # torch without CUDA has none for it
    weight_quantization.quantize = quantize_without_contents
    QuantizedWeight.from_codes = _from_codes  # type: ignore[method-assign,assignment]
    warnings.filterwarnings("ignore", message=".*data_ptr.*")
    with FakeTensorMode(allow_non_fake_inputs=True), transfers or contextlib.nullcontext():
        yield


class _Compiled:
    """What a launch needs of a compiled kernel."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, on_launch: Callable[[str, tuple[int, int, int]], None]) -> None:
        self._name, self._on_launch = name, on_launch

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_: Any) -> None:
        self._on_launch(self._name, (x, y, z))


class _Driver:
    def __init__(self, facts: GpuFacts) -> None:
        major, minor = facts.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class _Graph:
    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        pass


class _Event:
    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Generator:
    """Where random numbers have no contents none is needed: `torch.Generator(device).manual_seed(0)` is None."""

    def __init__(self, _device: Any = None) -> None:
        pass

    def manual_seed(self, _seed: int) -> None:
        return None


def quantize_without_contents(weight: torch.Tensor, *, bits: int, group_size: int) -> QuantizedWeight:
    """In the place of `weight_quantization.quantize`: weights of the same kind, where the floating ones are."""
    (out_features, in_features), device = weight.shape, weight.device
    padded = padded_inputs(in_features)
    shape = codes_shape(out_features, padded, bits) if device.type == "cpu" else (out_features, padded * bits // 8)
    codes = torch.empty(shape, dtype=torch.uint8, device=device)
    scales = torch.empty(out_features, -(-in_features // group_size), dtype=torch.bfloat16, device=device)
    return QuantizedWeight(codes, scales, None, None, bits, group_size, in_features)


def _from_codes(
    codes: torch.Tensor, scales: torch.Tensor, *, bits: int, group_size: int, **factors: Any
) -> QuantizedWeight:
    """In the place of `QuantizedWeight.from_codes`, which looks at the codes."""
    group_size = padded_inputs(codes.shape[1]) if group_size == -1 else group_size
    weight = quantize_without_contents(codes, bits=bits, group_size=group_size)
    return replace(weight, scales=scales, **factors)


def _real(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **options)

    return called


def _with_real_pinned(make: Callable[..., Any], transfers: Transfers | None) -> Callable[..., Any]:
    """The host writes to pinned memory, so it is there; that it is not pinned makes no difference here."""

    really = _real(make)

    def maker(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        made = (really if pin_memory else make)(*args, **options)
        if pin_memory and transfers is not None:
            transfers.pin(made)
        return made

    return maker


def _without_device(make: Callable[..., Any], transfers: Transfers | None) -> Callable[..., Any]:
    """In the place of `torch.tensor`: on the GPU without contents, where torch would really put a number."""
    really = _real(make)

    def maker(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return make(data, dtype=dtype, device=device, **options)
        if transfers is not None:
            transfers.on_wait("torch.tensor, of what the host has")
        made = really(data, dtype=dtype)
        return torch.empty(made.shape, dtype=made.dtype, device=device)

    return maker


def _by_identity(equal: Callable[..., bool]) -> Callable[..., bool]:
    """In the place of `torch.equal`: without contents no two are known to be equal, but one is to itself."""
    really = _real(equal)

    def compared(one: torch.Tensor, other: torch.Tensor) -> bool:
        if isinstance(one, fake_tensor.FakeTensor) or isinstance(other, fake_tensor.FakeTensor):
            return one is other
        return bool(really(one, other))

    return compared


def _let_devices_be_guarded() -> None:
    """Nobody is to switch CUDA devices: not a torch without CUDA, which cannot and then refuses to index their tensors,
    and not one with it, which would take some of the GPU's memory. Let who does it for meta tensors, and does nothing.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[_CUDA] = guards[_META]
