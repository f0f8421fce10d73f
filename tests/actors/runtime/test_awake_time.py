from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from octavo.actors.runtime.awake_time import SLICE_S, wait_awake

LIMIT_S = 2 * SLICE_S


def stand_still() -> None:
    """For longer than the limit, as a process does whose host gives it no time."""
    time.sleep(2 * LIMIT_S)


def after_turns(number: int, then: Callable[[], None]) -> None:
    """Do something in a later turn of the loop, as whoever stood still as well can answer only then."""
    loop = asyncio.get_running_loop()
    if number:
        loop.call_soon(after_turns, number - 1, then)
    else:
        then()


def test_a_standstill_of_this_process_is_no_time_that_others_took() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[int] = loop.create_future()

        def stand_still_and_go_on() -> None:
            stand_still()
            after_turns(5, lambda: answer.set_result(7))

        loop.call_soon(stand_still_and_go_on)
        assert await wait_awake(answer, LIMIT_S) == 7

    asyncio.run(run())


def test_who_takes_longer_is_waited_for_no_more_and_cancelled() -> None:
    async def run() -> None:
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for limit_s in (0.0, 0.01, LIMIT_S):
            with pytest.raises(TimeoutError):
                await wait_awake(asyncio.shield(never), limit_s)
        waiting = asyncio.ensure_future(wait_awake(never, 1e6))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled() and never.cancelled()

    asyncio.run(run())


def test_what_the_other_raises_is_raised() -> None:
    async def fail() -> None:
        raise LookupError("it failed")

    with pytest.raises(LookupError, match="it failed"):
        asyncio.run(wait_awake(fail(), 60.0))
