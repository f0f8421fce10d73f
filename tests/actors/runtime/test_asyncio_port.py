"""A port on an event loop: nothing that came is overlooked, and the loop's other work has its turn."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from port_tools import PATIENCE_S, cancel, open_port

from octavo.actors.runtime.asyncio_port import attach
from octavo.actors.runtime.port import MAX_BATCH, LinkEvent
from octavo.actors.runtime.port_limits import PortLimits
from octavo.messages.base import Message


def test_ping_and_pong_between_two_ports_of_a_loop_never_stall(tmp_path: Path) -> None:
    """Sending can swallow the edge that announces an arrival: the classic way to hang."""
    tmp_path.chmod(0o700)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        limits = PortLimits(window=8)
        engine = open_port("engine", peers=("edge",), limits=limits)
        edge = open_port("edge 0", peers=("engine",), limits=limits)
        engine.connect("edge 0", 1, edge.bind(f"ipc://{tmp_path}/edge"))
        edge.connect("engine", 1, engine.bind(f"ipc://{tmp_path}/engine"))
        left = 3000

        def echo(messages: list[tuple[str, Message]]) -> None:
            for peer, message in messages:
                at_engine.send(peer, message)

        def count(messages: list[tuple[str, Message]]) -> None:
            nonlocal left
            left -= len(messages)
            for peer, message in messages:
                at_edge.send(peer, message)
            if left <= 0 and not done.done():
                done.set_result(None)

        at_engine = attach(loop, engine, echo)
        at_edge = attach(loop, edge, count)
        for number in range(3):  # as many in flight
            at_edge.send("engine", cancel(number))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await done
        finally:
            at_engine.close()
            at_edge.close()
            at_edge.close()
            engine.close()
            edge.close()

    asyncio.run(main())


def test_a_flood_is_taken_in_turns_with_the_loops_other_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        engine, edge = open_port(), open_port("edge 0")
        edge.connect("engine", 1, engine.bind(f"ipc://{tmp_path}/engine"))
        batches: list[int] = []
        at_edge = attach(loop, edge, lambda _: None)
        at_engine = attach(loop, engine, lambda messages: batches.append(len(messages)))
        for number in range(4000):
            assert at_edge.send("engine", cancel(number))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while sum(batches) < 4000:
                    await asyncio.sleep(0)
        finally:
            at_edge.close()
            at_engine.close()
            edge.close()
            engine.close()
        assert max(batches) <= MAX_BATCH

    asyncio.run(main())


@pytest.mark.parametrize("hears", [True, False])
def test_what_happens_to_a_link_is_told(tmp_path: Path, hears: bool) -> None:
    tmp_path.chmod(0o700)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[LinkEvent] = loop.create_future()
        engine, edge = open_port(peers=("edge",) if hears else ()), open_port("edge 0")
        edge.connect("engine", 1, engine.bind(f"ipc://{tmp_path}/engine"))
        at_edge = attach(loop, edge, lambda _: None, told.set_result)
        at_engine = attach(loop, engine, lambda _: None)
        try:
            async with asyncio.timeout(PATIENCE_S):
                event = await told
        finally:
            at_edge.close()
            at_engine.close()
            edge.close()
            engine.close()
        assert (event.peer, event.what) == ("engine", "up" if hears else "refused")

    asyncio.run(main())


def test_grants_held_back_for_a_peers_rate_come_when_their_time_has_come(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        limits = PortLimits(window=8, max_messages_per_s=2000, burst_s=0.001)
        engine, edge = open_port(limits=limits), open_port("edge 0")
        edge.connect("engine", 1, engine.bind(f"ipc://{tmp_path}/engine"))
        received: list[object] = []
        done: asyncio.Future[None] = loop.create_future()

        def take(messages: list[tuple[str, Message]]) -> None:
            received.extend(messages)
            if len(received) == 200:
                done.set_result(None)

        at_edge = attach(loop, edge, lambda _: None)
        at_engine = attach(loop, engine, take)
        for number in range(200):
            at_edge.send("engine", cancel(number))
        try:
            async with asyncio.timeout(PATIENCE_S):
                await done
        finally:
            at_edge.close()
            at_engine.close()
            edge.close()
            engine.close()
        assert engine.counters["held_back"] > 0

    asyncio.run(main())


@pytest.mark.parametrize("raises_in", ["on_messages", "on_event", "receive"])
def test_f_13_what_escapes_a_callback_is_told_once_and_nothing_is_read_after_it(
    tmp_path: Path, raises_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[Exception] = loop.create_future()
        engine, edge = open_port(), open_port("edge 0")
        edge.connect("engine", 1, engine.bind(f"ipc://{tmp_path}/engine"))
        calls: list[str] = []

        def called(name: str) -> None:
            calls.append(name)
            if name == raises_in:
                raise LookupError("a defect")

        receive = engine.receive

        def receive_or_raise() -> list[tuple[str, Message]]:
            found = receive()
            if found:
                called("receive")
            return found

        monkeypatch.setattr(engine, "receive", receive_or_raise)
        at_edge = attach(loop, edge, lambda _: None)
        at_engine = attach(
            *(loop, engine, lambda _: called("on_messages"), lambda _: called("on_event")),
            on_failure=failed.set_result,  # a second call would raise
        )
        at_edge.send("engine", cancel(0))
        try:
            async with asyncio.timeout(PATIENCE_S):
                assert isinstance(await failed, LookupError)
                num_calls = len(calls)
                for number in range(1, 50):
                    at_edge.send("engine", cancel(number))
                    await asyncio.sleep(0)
        finally:
            at_edge.close()
            at_engine.close()
            edge.close()
            engine.close()
        assert calls.count(raises_in) == 1 and len(calls) == num_calls

    asyncio.run(main())
