"""Matrix products in the interpreter whose bits do not depend on where in a tile a row stands.

The interpreter leaves a `tl.dot` to numpy, and that to a BLAS, which sums the rows at the edge of its register tiles
in another order than those within: what a kernel promises about bits would seem to be broken where it is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def _matmul(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], dtype: Any = None) -> np.ndarray[Any, Any]:
    total = np.zeros((a.shape[0], b.shape[1]), dtype=dtype or a.dtype)
    for k in range(a.shape[1]):
        total += a[:, k : k + 1].astype(total.dtype) * b[k : k + 1].astype(total.dtype)
    return total


@pytest.fixture
def ordered_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of two matrices is summed from the first input to the last."""
    monkeypatch.setattr(np, "matmul", _matmul)
