"""Telling an exception that only means that there is no memory left."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether a smaller step might have been computed; torch has a class of its own for devices, and none for a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
