"""Whether the C kernels must be there: by what is installed, never by whether they can be built.

A mark that asked `cpu_build.library()` would skip every test of them at the moment they no longer compile.
"""

from __future__ import annotations

import os
import shutil

import pytest

_NAMES = os.environ.get("CC", "").split()[:1] or ("cc", "gcc", "clang")
COMPILER = next((found for name in _NAMES if (found := shutil.which(name))), "")
"""The path of a C compiler, or nothing."""

HAS_C = bool(COMPILER) and os.environ.get("OCTAVO_CPU_KERNELS", "1") != "0"
needs_c = pytest.mark.skipif(not HAS_C, reason="no C compiler, or OCTAVO_CPU_KERNELS=0")
