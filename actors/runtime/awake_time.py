"""Limits on how long others take, by the time for which this process itself went on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

SLICE_S = 0.1
"""What a standstill costs at most of the time that is given."""


async def wait_awake(awaited: Awaitable[T], timeout_s: float) -> T:
    """`asyncio.wait_for`, but while this process stood still, with its host or because it was stopped, no time passed.

    Whoever it waits for stood still with the host. A timer would be due at once afterwards, before anybody can answer.

    Raises:
        TimeoutError: it took longer; it was cancelled.
    """
    future = asyncio.ensure_future(awaited)
    num_slices = max(1, math.ceil(timeout_s / SLICE_S))
    try:
        for _ in range(num_slices):
            if (await asyncio.wait([future], timeout=timeout_s / num_slices))[0]:
                return await future
    finally:
        future.cancel()
    raise TimeoutError
