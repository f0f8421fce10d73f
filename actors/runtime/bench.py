"""`python -m octavo.actors.runtime.bench`: CPU time of a hop between two actors, beside other ways to carry it."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import anyio

from ...messages.base import Message
from ...messages.step import PlanDue
from .clock import MonotonicClock
from .in_process import InProcessRuntime, Mailbox
from .routes import Routes

NUM_HOPS = 20_000
NUM_ROUNDS = 7


async def mailboxes() -> None:
    """Two actors of ours, one message in flight."""
    routes: Routes = {("scheduler", PlanDue): ("kv_allocator",), ("kv_allocator", PlanDue): ("scheduler",)}
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    runtime = InProcessRuntime(routes, MonotonicClock(), lambda _, error: done.set_exception(error))
    left = NUM_HOPS

    def handle(message: Message, now_ns: int) -> tuple[Message, ...]:
        nonlocal left
        left -= 1
        if left == 0:
            done.set_result(None)
        return (message,) if left > 0 else ()

    runtime.add("scheduler", Mailbox("scheduler", handle, runtime, capacity=8))
    runtime.add("kv_allocator", Mailbox("kv_allocator", handle, runtime, capacity=8))
    runtime.connect()
    runtime.send("scheduler", PlanDue())
    await done


async def queues() -> None:
    """Two tasks and two `asyncio.Queue`s."""
    there: asyncio.Queue[int] = asyncio.Queue(8)
    back: asyncio.Queue[int] = asyncio.Queue(8)

    async def echo() -> None:
        for _ in range(NUM_HOPS // 2):
            await back.put(await there.get())

    task = asyncio.create_task(echo())
    for number in range(NUM_HOPS // 2):
        await there.put(number)
        await back.get()
    await task


async def streams() -> None:
    """Two tasks and two of anyio's memory object streams."""
    send_there, receive_there = anyio.create_memory_object_stream[int](8)
    send_back, receive_back = anyio.create_memory_object_stream[int](8)

    async def echo() -> None:
        for _ in range(NUM_HOPS // 2):
            await send_back.send(await receive_there.receive())

    async with send_there, receive_there, send_back, receive_back, anyio.create_task_group() as group:
        group.start_soon(echo)
        for number in range(NUM_HOPS // 2):
            await send_there.send(number)
            await receive_back.receive()


def main() -> None:
    ways: dict[str, Callable[[], Awaitable[None]]] = {
        "octavo mailbox": mailboxes,
        "asyncio.Queue": queues,
        "anyio memory stream": streams,
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(NUM_ROUNDS):
        for name, way in ways.items():
            started = time.process_time()
            asyncio.run(way())  # type: ignore[arg-type]  # coroutine functions
            rounds[name].append((time.process_time() - started) / NUM_HOPS * 1e6)
    ours = statistics.median(rounds["octavo mailbox"])
    for name, figures in rounds.items():
        median = statistics.median(figures)
        print(f"{name:22} {median:6.2f} us a hop, {median / ours:5.2f}x")


if __name__ == "__main__":
    main()
