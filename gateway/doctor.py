"""`octavo doctor`: what this machine offers and what octavo would do with it."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from .. import __version__
from .host import usable_cores

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "msgspec", "aiohttp", "huggingface_hub", "triton")


def doctor() -> int:
    """Print the findings; returns 1 if something would keep octavo from serving."""
    console = Console()
    rows = [*_installation(), *_machine(), *_torch(), *_hub()]
    table = Table("what", "found", "", title=f"octavo {__version__}", title_justify="left", show_lines=False)
    for what, found, verdict in rows:
        table.add_row(what, found, {"ok": "[green]ok", "bad": "[red]problem"}.get(verdict, verdict))
    console.print(table)
    return int(any(verdict == "bad" for _, _, verdict in rows))


def _installation() -> list[tuple[str, str, str]]:
    rows = [("python", platform.python_version(), "ok")]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package), "ok"))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed", "only for GPUs" if package == "triton" else "bad"))
    return rows


def _machine() -> list[tuple[str, str, str]]:
    memory = psutil.virtual_memory()
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    return [
        ("processor", f"{_processor()}, {usable_cores()} cores usable", "ok"),
        ("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB", "ok"),
        ("C compiler", compiler or "none", "ok" if compiler else "attention on the CPU falls back to torch"),
    ]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _torch() -> list[tuple[str, str, str]]:
    import torch

    rows = [
        ("torch threads", str(torch.get_num_threads()), "ok"),
        ("vector instructions", torch.backends.cpu.get_cpu_capability(), "ok"),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            rows.append((f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB", "ok"))
    else:
        rows.append(("GPU", "none that torch can use", "the CPU serves"))
    return rows


def _hub() -> list[tuple[str, str, str]]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(cache if cache.exists() else Path.home()).free
    return [
        ("hub cache", f"{cache} ({free / 2**30:.0f} GiB free)", "ok"),
        ("hub", "offline" if constants.HF_HUB_OFFLINE else "downloads on demand", "ok"),
    ]
