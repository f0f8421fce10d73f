"""The GPU that is measured: whether there is one, and what its figures have to be told with."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata

import msgspec

_PACKAGES = ("octavo", "torch", "triton", "transformers", "flashinfer-python", "vllm", "minisgl", "nano-vllm")


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What ran, for whoever reads the figures."""

    gpu: str
    driver: str
    python: str
    versions: dict[str, str]


def why_no_gpu() -> str:
    """Empty, or one line on why nothing can be measured here and what to do."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a build for it, on a machine with a GPU"
    return f"torch {torch.__version__} finds no GPU that it can use: run this on a machine with an NVIDIA GPU"


def gpu_facts() -> GpuFacts:
    """Name, driver and versions."""
    import torch

    return GpuFacts(
        gpu=torch.cuda.get_device_name(), driver=_driver(), python=platform.python_version(), versions=_versions()
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603 - as above
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout else "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
