"""Least squares with coefficients that are not negative."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def nnls(matrix: Floats, target: Floats) -> Floats:
    """Minimise |matrix @ x - target| over x >= 0.

    The active-set method on the normal equations, columns scaled to unit length; the same input gives the same result.

    Source: Lawson and Hanson 1974, chapter 23; Bro and de Jong 1997.

    Args:
        matrix: `[num_rows, num_columns]`; a column of zeros gets 0.
        target: `[num_rows]`.

    Returns:
        `[num_columns]`.
    """
    scale = np.sqrt((matrix * matrix).sum(axis=0))
    usable = scale > 0.0
    scale = np.where(usable, scale, 1.0)
    scaled = matrix / scale
    gram, right = scaled.T @ scaled, scaled.T @ target
    num_columns = matrix.shape[1]
    x = np.zeros(num_columns)
    free = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.abs(right).max(initial=0.0)))
    for _ in range(10 * num_columns + 10):
        gradient = right - gram @ x
        wanted = np.where(free | ~usable, -np.inf, gradient)
        best = int(np.argmax(wanted)) if num_columns else 0
        if not num_columns or wanted[best] <= tolerance:
            break
        free[best] = True
        while True:
            trial = np.zeros(num_columns)
            trial[free] = _solve(gram[np.ix_(free, free)], right[free])
            if (trial[free] > 0.0).all():
                x = trial
                break
            # Go towards the trial until the first coefficient reaches 0, and fix it there.
            falling = free & (trial <= 0.0)
            steps = x[falling] / np.maximum(x[falling] - trial[falling], 1e-300)
            x = x + float(steps.min()) * (trial - x)
            free &= ~(falling & (x <= 1e-15))
            if not free.any():
                x = np.zeros(num_columns)
                break
            x = np.where(free, x, 0.0)
    result: Floats = x / scale
    return result


def _solve(gram: Floats, right: Floats) -> Floats:
    """Solve for the free coefficients; columns that are nearly the same share the work rather than blow up."""
    ridge = 1e-10 * np.eye(len(right))
    return np.asarray(np.linalg.solve(gram + ridge, right), dtype=np.float64)
