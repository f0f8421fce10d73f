"""Tests here run Triton kernels in its interpreter, on CPU tensors; `sm90` compiles them in a process of its own.

The variable must be set before triton is first imported, and pytest imports this file before any test module beside it.
Nothing else in the tree imports triton on a CPU, so tests elsewhere are not affected.
"""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `import sm90`


def patch_each_module_once() -> None:
    """Triton's interpreter replaces all of `triton.language` at each call of a function by a kernel, though it has been
    replaced already: a fifth of the time of these tests. That is left out where `load` is not the original."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(fn: Any) -> Any:
        modules = [value for value in fn.__globals__.values() if isinstance(value, ModuleType)]
        if any(tl.core.is_builtin(module.load) for module in modules if module in (tl, tl.core)):
            return patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not


patch_each_module_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter makes Python integers of one-element arrays, which numpy deprecates."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
