"""Tests here run Triton kernels in its interpreter, on CPU tensors; `sm90` compiles them in a process of its own.

The variable must be set before triton is first imported, and pytest imports this file before any test module beside it.
Nothing else in the tree imports triton on a CPU, so tests elsewhere are not affected.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `import sm90`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter makes Python integers of one-element arrays, which numpy deprecates."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))
