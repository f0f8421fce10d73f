"""What every executor on a CPU needs, imported and loaded once by the process that forks them."""

from __future__ import annotations

from ...kernels import cpu_build
from . import process

__all__ = ["process"]

# Loading starts no thread and computes nothing; building, after an update, takes a minute that no restart should wait.
cpu_build.library()
