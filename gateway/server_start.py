"""Waits for a server that was started as a process of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp

from ..messages.errors import OctavoError

START_WITHIN_S = 300.0
LOOK_EVERY_S = 0.1


async def until_ready(url: str, process: asyncio.subprocess.Process, why: Callable[[], str]) -> None:
    """Wait until a server answers `/ready` with 200.

    Args:
        url: of the server, with or without `/v1`.
        process: of the server.
        why: asked for what to add to an error: its last words, or where they are.

    Raises:
        OctavoError: it has ended, or takes too long.
    """
    ready_url = url.rstrip("/").removesuffix("/v1") + "/ready"
    ends_s = time.monotonic() + START_WITHIN_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < ends_s:
            if process.returncode is not None:
                raise OctavoError(f"the server did not start (code {process.returncode}): {why()}")
            try:
                async with session.get(ready_url) as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # it does not listen yet
            await asyncio.sleep(LOOK_EVERY_S)
    raise OctavoError(f"the server was not ready within {START_WITHIN_S:.0f} s: {why()}")
