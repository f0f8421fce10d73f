from __future__ import annotations

import asyncio

import pytest
from http_client import serving

from octavo.gateway import bench_streams
from octavo.gateway.bench_streams import PacedEngine


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
