from __future__ import annotations

import asyncio

import pytest
from fake_engine import FakeEngine
from http_client import http_post, serving

from octavo.gateway import bench_streams
from octavo.gateway.bench_streams import PacedEngine

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "stream": True}


@pytest.mark.parametrize("word", [" token", "x" * 5000, "\u2028 é 👋", *("y" * size for size in range(1880, 1920))])
def test_events_of_any_size_and_alphabet_arrive_whole(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(bench_streams, "WORD", word)
        engine = PacedEngine()
        async with serving(engine) as client:
            answer = asyncio.ensure_future(client.complete(max_tokens=6, n=2, stream=True))
            while not engine.num_live:
                await asyncio.sleep(0)
            while engine.num_live:
                engine.step()
                for _ in range(5):
                    await asyncio.sleep(0)
            events = (await answer).events
        assert [event["choices"][0]["text"] for event in events] == [word] * 12

    asyncio.run(run())


def test_the_headers_of_a_stream_leave_with_its_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            _reader, writer = await client.connect(http_post("/v1/chat/completions", CHAT))
            await engine.was_submitted.wait()
            assert client.server._runner.server is not None
            (connection,) = client.server._runner.server.connections
            transport = connection.transport
            assert transport is not None
            written: list[bytes] = []
            monkeypatch.setattr(connection, "transport", Recording(transport, written))
            engine.step(1)
            while not written:
                await asyncio.sleep(0)
            assert written[0].startswith(b"HTTP/1.1 200 OK\r\n") and b"\r\ndata: {" in written[0]
            monkeypatch.setattr(connection, "transport", transport)
            writer.close()

    asyncio.run(run())


class Recording:
    """A transport that tells what is written to it."""

    def __init__(self, transport: asyncio.Transport, written: list[bytes]) -> None:
        self._transport = transport
        self._written = written

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)
