"""Whether this host has a GPU that torch can use, found out without importing torch.

The processes that serve HTTP and schedule never import torch, and a process that has touched CUDA cannot fork children
that use it. NVIDIA's management library answers without either.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "cuda"]

_LIBRARY = "libnvidia-ml.so.1"
_BUILT_FOR = re.compile(r"^cuda\s*(?::[^=]*)?=\s*(.+)$", re.MULTILINE)


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """What `auto` means on this host; the others mean themselves."""
    if device != "auto":
        return device
    return "cuda" if has_gpu() else "cpu"


@functools.cache
def has_gpu() -> bool:
    """Whether there is a driver with a GPU that is not hidden, and a torch that was built for it."""
    return not is_hidden(os.environ.get("CUDA_VISIBLE_DEVICES")) and torch_is_built_for_cuda() and count_gpus() > 0


def is_hidden(visible_devices: str | None) -> bool:
    """Whether `CUDA_VISIBLE_DEVICES` leaves no GPU: it ends the list at the first entry that names none."""
    if visible_devices is None:
        return False
    first = visible_devices.split(",")[0].strip()
    return not first or first.startswith("-")


def torch_is_built_for_cuda() -> bool:
    """As `torch.version.cuda is not None`, from the file that says so."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return names_cuda(text)


def names_cuda(version_file: str) -> bool:
    """Whether torch's version.py names a CUDA version: `cuda: Optional[str] = '13.0'`, and not `None`."""
    found = _BUILT_FOR.search(version_file)
    return found is not None and found.group(1).strip() != "None"


def count_gpus() -> int:
    """GPUs that the driver knows; 0 without a driver."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return 0
    if library.nvmlInit_v2() != 0:
        return 0
    try:
        count = ctypes.c_uint(0)
        return int(count.value) if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0 else 0
    finally:
        library.nvmlShutdown()
