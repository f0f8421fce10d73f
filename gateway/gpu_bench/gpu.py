"""The GPU that is measured: whether there is one, and what its figures have to be told with."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PACKAGES = ("octavo", "torch", "triton", "numpy", "transformers", "flashinfer-python", "vllm", "minisgl", "nano-vllm")
_STATE = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """What ran, for whoever reads the figures.

    Attributes:
        commit: of the checkout; empty where there is none.
    """

    gpu: str
    driver: str
    python: str
    versions: dict[str, str]
    commit: str = ""


def why_no_gpu() -> str:
    """Empty, or one line on why nothing can be measured here and what to do."""
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a build for it, on a machine with a GPU"
    return f"torch {torch.__version__} finds no GPU that it can use: run this on a machine with an NVIDIA GPU"


def gpu_facts() -> GpuFacts:
    """Name, driver and versions; never raises."""
    return GpuFacts(
        gpu=_gpu_name(),
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        python=platform.python_version(),
        versions=_versions(),
        commit=_said("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    )


def gpu_state() -> str:
    """Clocks, temperature and power now, and why clocks are held down if they are; empty where nobody can say."""
    return _said("nvidia-smi", f"--query-gpu={_STATE}", "--format=csv,noheader")


def _gpu_name() -> str:
    import torch

    try:
        return torch.cuda.get_device_name()
    except Exception as error:  # noqa: BLE001,RUF100 - a device that is there and does not answer has parts that say so
        return f"a GPU without a name ({type(error).__name__})"


def _said(*command: str) -> str:
    """The first line of what a program says; empty if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603 - as above
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.splitlines()[0].strip() if done.stdout else ""


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    import torch

    return {**found, "cuda": str(torch.version.cuda)}
