from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_engine import FakeEngine

from octavo.gateway.api.engine_protocol import EngineLike
from octavo.gateway.api.held_streams import HeldStreams, HoldLimits
from octavo.gateway.api.http_connection import GatewayRunner
from octavo.gateway.api.server import create_app
from octavo.gateway.api.settings import ServerSettings
from octavo.gateway.api.stream_journal import MAX_ATTEMPTS, StreamJournal
from octavo.gateway.api.stream_resume import hold_streams
from octavo.gateway.generation_config import RequestDefaults
from octavo.messages.sampling import SamplingParams

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


class Served:
    """A server with a journal, and what a client of it hears."""

    def __init__(self, url: str, session: aiohttp.ClientSession, streams: HeldStreams, engine: Any) -> None:
        self.url = url
        self.session = session
        self.streams = streams
        self.engine = engine

    async def read(
        self, path: str, body: dict[str, Any] | None, *, last: str = "", stop_after: int = 0, headers: Any = None
    ) -> list[tuple[str, str]]:
        """Events as `(id, data)`; up to `stop_after` of them, and then the connection is cut."""
        headers = {**({"Last-Event-ID": last} if last else {}), **(headers or {})}
        method = "GET" if body is None else "POST"
        async with self.session.request(method, self.url + path, json=body, headers=headers) as response:
            assert response.status == 200, await response.text()
            events: list[tuple[str, str]] = []
            async for event in read_events(response.content):
                events.append(event)
                if len(events) == stop_after:
                    response.close()
                    break
            return events

    async def error(self, path: str, body: dict[str, Any] | None, *, last: str = "", headers: Any = None) -> Any:
        headers = {**({"Last-Event-ID": last} if last else {}), **(headers or {})}
        method = "GET" if body is None else "POST"
        async with self.session.request(method, self.url + path, json=body, headers=headers) as response:
            return response.status, json.loads(await response.text())["error"]["code"]


async def read_events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[str, str]]:
    event_id, data = "", ""
    async for raw in content:
        line = raw.decode().rstrip("\n")
        if line.startswith("id: "):
            event_id = line[4:]
        elif line.startswith("data: "):
            data = line[6:]
        elif not line:
            yield event_id, data
            event_id = ""


@asynccontextmanager
async def serving(folder: Path, engine: EngineLike | None = None, **limits: Any) -> AsyncIterator[Served]:
    engine = engine or FakeEngine()
    app = create_app(engine, ServerSettings(log_requests=False))
    streams = hold_streams(app, folder, HoldLimits(**limits))
    runner = GatewayRunner(app)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Served(f"http://127.0.0.1:{runner.addresses[0][1]}", session, streams, engine)
    finally:
        await runner.cleanup()


async def accepted(served: Served) -> None:
    """Until the engine has a request, and the journal names its stream: its first event may leave."""
    await served.engine.was_submitted.wait()
    while not all(held._noted is None or held._noted.done() for held in served.streams._streams.values()):
        await asyncio.sleep(0)


def chat(**fields: Any) -> dict[str, Any]:
    return {
        "model": "fake/bytes",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "max_tokens": 40,
        **fields,
    }


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "fake/bytes", "prompt": "Hello", "stream": True, "max_tokens": 40, **fields}


def texts(events: list[tuple[str, str]]) -> dict[int, str]:
    """Each choice's text, by the events' data."""
    found: dict[int, str] = {}
    for _, data in events:
        if data != "[DONE]":
            for choice in json.loads(data)["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                found[choice["index"]] = found.get(choice["index"], "") + text
    return found


async def _settle(streams: HeldStreams) -> None:
    """Until the last stream was handed to the system in whole."""
    while streams.journal.num_unfinished:
        await asyncio.sleep(0)


def test_notes_of_streams_that_could_not_be_written_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def told(served: Served) -> list[str]:
        async with served.session.get(served.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return [line.split()[-1] for line in lines if line.startswith("octavo:stream_journal_failed_writes_total{")]

    async def main() -> None:
        async with serving(tmp_path) as served:
            assert await told(served) == ["0.0"]
            monkeypatch.setattr(served.streams.journal._file, "_fd", 1 << 30)  # nothing is open there
            await served.read(CHAT, chat())
            assert await asyncio.to_thread(served.streams.journal.flush)
            assert float((await told(served))[0]) >= 1.0
            monkeypatch.undo()

    asyncio.run(main())


def test_events_are_numbered_only_where_a_journal_is_kept_and_its_stream_ends_with_its_last_byte(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with serving(tmp_path) as served:
            events = await served.read(CHAT, chat())
            response_id = json.loads(events[0][1])["id"]
            assert [event_id for event_id, _ in events] == [f"{response_id}:{n + 1}" for n in range(len(events))]
            assert events[-1][1] == "[DONE]"
            await _settle(served.streams)
        assert StreamJournal.unfinished(tmp_path) == []

    asyncio.run(main())


@pytest.mark.parametrize("how", ["post", "get"])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_lost_its_connection_goes_on_behind_its_last_event(tmp_path: Path, path: str, how: str) -> None:
    async def main() -> None:
        body = chat() if path == CHAT else completion()
        async with serving(tmp_path) as served:
            whole = await served.read(path, body)
            for n in (1, 2, 17, len(whole) - 1):
                first = await served.read(path, body, stop_after=n)
                last = first[-1][0]
                response_id = last.rpartition(":")[0]
                if how == "post":
                    rest = await served.read(path, body, last=last)
                else:
                    rest = await served.read(f"/v1/responses-stream/{response_id}", None, last=last)
                numbers = [int(event_id.rpartition(":")[2]) for event_id, _ in first + rest]
                assert numbers == list(range(1, len(whole) + 1))
                assert texts(first + rest) == texts(whole)
                await _settle(served.streams)
            assert served.streams.num_resumed == 4

    asyncio.run(main())


def test_choices_that_interleave_in_another_order_are_each_gone_on_with_where_they_were(tmp_path: Path) -> None:
    async def main() -> None:
        body = completion(n=2, prompt=["Hello", "world"], stream_options={"include_usage": True})
        async with serving(tmp_path / "a") as served:
            whole = texts(await served.read(COMPLETIONS, body))
            assert sorted(whole) == [0, 1, 2, 3]
        heard: list[tuple[str, str]] = []
        seeds: list[list[int | None]] = []
        # Three servers, whose engines serve the choices in an order of their own, and each dies early.
        for seed, stop_after in enumerate((30, 3, 20)):
            async with serving(tmp_path, FakeEngine(by_hand=True)) as served:
                rng = random.Random(seed)
                last = heard[-1][0] if heard else ""
                reading = asyncio.ensure_future(served.read(COMPLETIONS, body, last=last, stop_after=stop_after))
                await accepted(served)
                served.engine.step(0)
                while not reading.done():
                    if live := list(served.engine._live.values()):
                        served.engine._advance(rng.choice(live))
                    await asyncio.sleep(0)
                heard += await reading
                seeds.append([params.seed for params in served.engine.submitted])
            assert re.fullmatch(r"cmpl-[0-9a-f]{32}:\d+(\.\d+){0,3}", heard[-1][0])
        assert len(set(map(len, texts(heard).values()))) > 1, "some are further than others"
        assert seeds[0][0] != seeds[0][1], "prompts that are the same do not get the same answer"
        assert seeds[1:] == seeds[:1] * 2
        async with serving(tmp_path) as served:
            heard += await served.read(COMPLETIONS, body, last=heard[-1][0])
            assert texts(heard) == whole
            assert json.loads(heard[-2][1])["usage"]["completion_tokens"] == 160
            assert heard[-1][1] == "[DONE]"

    asyncio.run(main())


@pytest.mark.parametrize(
    "fields",
    [{"request_id": "taken"}, {"n": 16, "prompt": ["a", "b", "c", "d", "e"]}],
    ids=["an id that is in use", "very many choices"],
)
def test_a_stream_whose_events_cannot_be_numbered_is_sent_as_it_would_be_without_a_journal(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    async def main() -> None:
        async with serving(tmp_path) as served:
            first = await served.read(COMPLETIONS, completion(request_id="taken"))
            assert first[0][0] == "cmpl-taken:1"
            events = await served.read(COMPLETIONS, completion(**fields))
            assert {event_id for event_id, _ in events} == {""}
            assert events[-1][1] == "[DONE]"
            assert await served.read("/v1/responses-stream/cmpl-taken", None) == first

    asyncio.run(main())


def test_a_stream_that_gets_further_under_each_server_is_taken_up_however_many_of_them_die(tmp_path: Path) -> None:
    async def main() -> None:
        body = completion(max_tokens=40)
        async with serving(tmp_path / "a") as served:
            whole = texts(await served.read(COMPLETIONS, body))
        heard: list[tuple[str, str]] = []
        for _ in range(2 * MAX_ATTEMPTS):
            async with serving(tmp_path, FakeEngine(by_hand=True)) as served:
                last = heard[-1][0] if heard else ""
                reading = asyncio.ensure_future(served.read(COMPLETIONS, body, last=last, stop_after=3))
                await accepted(served)
                while not reading.done():
                    served.engine.step()
                    await asyncio.sleep(0)
                heard += await reading
        async with serving(tmp_path) as served:
            heard += await served.read(COMPLETIONS, body, last=heard[-1][0])
            assert texts(heard) == whole

    asyncio.run(main())


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_keeps_the_defaults_that_it_began_with_though_the_next_server_has_others(
    tmp_path: Path, path: str
) -> None:
    async def main() -> None:
        body = chat(max_tokens=None) if path == CHAT else completion(max_tokens=None)
        submitted = []
        heard: list[tuple[str, str]] = []
        for temperature, stop_after in ((0.25, 3), (1.75, 0)):
            engine = FakeEngine(by_hand=True)
            own = SamplingParams(temperature=temperature, top_k=9, max_tokens=12, clip_max_tokens=True)
            engine.request_defaults = RequestDefaults(params=own)
            async with serving(tmp_path, engine) as served:
                last = heard[-1][0] if heard else ""
                reading = asyncio.ensure_future(served.read(path, body, last=last, stop_after=stop_after))
                await accepted(served)
                while not reading.done():
                    engine.step()
                    await asyncio.sleep(0)
                heard += await reading
            submitted += engine.submitted
        assert [(params.temperature, params.top_k) for params in submitted] == [(0.25, 9)] * 2
        assert submitted[0] == submitted[1] and heard[-1][1] == "[DONE]"

    asyncio.run(main())


def test_what_nobody_reads_is_left_to_the_next_server_when_this_one_drains(tmp_path: Path) -> None:
    async def main() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(tmp_path, engine) as served:
            gone = asyncio.ensure_future(served.read(CHAT, chat(), stop_after=3))
            await accepted(served)
            while not gone.done():
                engine.step()
                await asyncio.sleep(0)
            reading = asyncio.ensure_future(served.read(CHAT, chat()))
            while sorted(held.num_readers for held in served.streams._streams.values()) != [0, 1]:
                engine.step()
                await asyncio.sleep(0)
            served.streams.leave_unread()
            assert engine.num_live == 1
            while not reading.done():
                engine.step()
                await asyncio.sleep(0)
        (left,) = StreamJournal.unfinished(tmp_path)
        assert left.response_id == (await gone)[0][0].rpartition(":")[0]

    asyncio.run(main())


def test_a_server_that_is_started_again_goes_on_for_clients_that_come_back_and_for_none_twice(tmp_path: Path) -> None:
    async def main() -> None:
        body = chat(max_tokens=60, logprobs=True, top_logprobs=1)
        async with serving(tmp_path / "a") as served:
            whole = await served.read(CHAT, body)
        async with serving(tmp_path, FakeEngine(by_hand=True)) as served:
            reading = asyncio.ensure_future(served.read(CHAT, body, stop_after=20))
            await accepted(served)
            while not reading.done():
                served.engine.step()
                await asyncio.sleep(0)
            first = await reading
        (left,) = StreamJournal.unfinished(tmp_path)
        assert left.response_id == first[-1][0].rpartition(":")[0]
        async with serving(tmp_path, FakeEngine(by_hand=True)) as served:
            assert served.engine.submitted[0].seed == left.seeds[0], "drawn by the first server"
            served.engine.step(5)  # it has not yet got as far as the client
            reading = asyncio.ensure_future(served.read(CHAT, body, last=first[-1][0]))
            while not reading.done():
                served.engine.step()
                await asyncio.sleep(0)
            both = first + await reading
            assert [event_id for event_id, _ in both] == [f"{left.response_id}:{n + 1}" for n in range(len(whole))]
            assert texts(both) == texts(whole)
            heads = [{**json.loads(data), "choices": []} for _, data in both[:-1]]
            assert all(head == heads[0] for head in heads), "id, time and model are those of the first answer"
        assert StreamJournal.unfinished(tmp_path) == []

    asyncio.run(main())


def test_only_who_asked_may_go_on_with_the_same_request_and_ids_must_be_ours(tmp_path: Path) -> None:
    async def main() -> None:
        key = {"Authorization": "Bearer mine"}
        async with serving(tmp_path) as served:
            events = await served.read(CHAT, chat(), stop_after=3, headers=key)
            last = events[-1][0]
            response_id = last.rpartition(":")[0]
            path = f"/v1/responses-stream/{response_id}"
            assert await served.error(path, None, last=last) == (404, "stream_not_found")
            assert await served.error(path, None, headers={"Authorization": "Bearer other"}) == (
                404,
                "stream_not_found",
            )
            assert await served.error(CHAT, chat(max_tokens=5), last=last, headers=key) == (400, "another_request")
            assert await served.error(path, None, last="chatcmpl-x:3", headers=key) == (400, "invalid_event_id")
            assert await served.error(CHAT, chat(), last="17", headers=key) == (400, "invalid_event_id")
            assert await served.error(CHAT, chat(), last=f"{response_id}:{'9' * 40}") == (400, "invalid_event_id")
            assert await served.error(CHAT, chat(), last="chatcmpl-never:3") == (404, "stream_not_found")
            whole = await served.read(path, None, headers=key)
            assert (whole[:3], whole[-1][1]) == (events, "[DONE]")

    asyncio.run(main())


def test_a_stream_that_nobody_comes_back_for_is_cancelled_after_a_while(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, FakeEngine(by_hand=True), grace_s=0.0) as served:
            reading = asyncio.ensure_future(served.read(CHAT, chat(), stop_after=3))
            await accepted(served)
            while not served.engine.cancelled:
                served.engine.step()
                await asyncio.sleep(0)
            last = (await reading)[-1][0]
            assert await served.error(CHAT, chat(), last=last) == (404, "stream_not_found")
            assert (len(served.streams), served.streams.journal.num_unfinished) == (0, 0)

    asyncio.run(main())


@contextmanager
def stalled_disk(streams: HeldStreams, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The journal's disk takes nothing until the event is set."""
    write, goes_on = os.write, threading.Event()

    def stall(fd: int, data: bytes) -> int:
        if fd == streams.journal._file._fd:
            goes_on.wait()
        return write(fd, data)

    with monkeypatch.context() as still:
        still.setattr(os, "write", stall)
        try:
            yield goes_on
        finally:
            goes_on.set()
        assert streams.journal.flush()


def test_f_44_a_journal_on_a_disk_that_stands_still_holds_up_no_stream_but_those_that_it_has_yet_to_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(tmp_path, engine, note_s=1000.0) as served:
            before = asyncio.ensure_future(served.read(CHAT, chat(request_id="before")))
            await accepted(served)
            while not served.streams.pump.num_open:
                engine.step()
                await asyncio.sleep(0)
            with stalled_disk(served.streams, monkeypatch) as goes_on:
                waits = asyncio.ensure_future(served.read(CHAT, chat(request_id="waits")))
                plain = asyncio.ensure_future(served.read(COMPLETIONS, completion(n=16, prompt=["a"] * 5)))
                while not (before.done() and plain.done()):
                    engine.step()
                    await asyncio.sleep(0)
                assert (await before)[-1][1] == (await plain)[-1][1] == "[DONE]"
                async with served.session.get(served.url + "/health") as response:
                    assert response.status == 200
                assert engine.num_live == 0, "its tokens are there, and wait"
                held = served.streams._streams["chatcmpl-waits"]
                assert held._client is None and not waits.done()
                assert "chatcmpl-waits" not in [left.response_id for left in StreamJournal.unfinished(tmp_path)]
                goes_on.set()
                assert (await waits)[-1][1] == "[DONE]"
            assert served.streams.journal.num_failed_writes == 0
            await _settle(served.streams)
        assert StreamJournal.unfinished(tmp_path) == []

    asyncio.run(main())


def test_f_44_a_disk_that_stands_still_for_long_costs_a_stream_its_place_in_the_journal_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(tmp_path, note_s=0.0) as served:
            with stalled_disk(served.streams, monkeypatch):
                for number in range(1, 4):
                    assert (await served.read(CHAT, chat()))[-1][1] == "[DONE]"
                    assert served.streams.journal.num_failed_writes == number
            await _settle(served.streams)
        assert StreamJournal.unfinished(tmp_path) == []

    asyncio.run(main())


class SkippedTime:
    """Lets an event loop's clock jump."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._time = loop.time
        self.seconds = 0.0
        loop.time = lambda: self._time() + self.seconds  # type: ignore[method-assign]

    async def skip(self, seconds: float) -> None:
        self.seconds += seconds
        for _ in range(5):
            await asyncio.sleep(0)


async def _leave_unfinished(folder: Path, num_events: int = 3) -> str:
    """Have a server die with a stream of its; returns the last event that the client had."""
    async with serving(folder, FakeEngine(by_hand=True)) as served:
        reading = asyncio.ensure_future(served.read(CHAT, chat(), stop_after=num_events))
        await accepted(served)
        while not reading.done():
            served.engine.step()
            await asyncio.sleep(0)
        return (await reading)[-1][0]


def test_a_stream_that_was_taken_up_and_that_nobody_comes_back_for_is_cancelled_after_a_longer_while(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        last = await _leave_unfinished(tmp_path)
        engine = FakeEngine(by_hand=True)
        async with serving(tmp_path, engine, grace_s=1.0, hold_s=1000.0) as served:
            time = SkippedTime(asyncio.get_running_loop())
            engine.step(5)
            await time.skip(500.0)
            engine.step(5)
            assert (engine.num_live, engine.cancelled) == (1, [])
            await time.skip(501.0)
            assert (engine.num_live, len(engine.cancelled)) == (0, 1)
            assert (len(served.streams), served.streams.journal.num_unfinished) == (0, 0)
            assert await served.error(CHAT, chat(), last=last) == (404, "stream_not_found")
        assert StreamJournal.unfinished(tmp_path) == []

    asyncio.run(main())


def test_a_stream_that_was_taken_up_goes_on_for_as_long_as_its_client_reads(tmp_path: Path) -> None:
    async def main() -> None:
        last = await _leave_unfinished(tmp_path)
        engine = FakeEngine(by_hand=True)
        async with serving(tmp_path, engine, grace_s=1.0, hold_s=20.0) as served:
            time = SkippedTime(asyncio.get_running_loop())
            reading = asyncio.ensure_future(served.read(CHAT, chat(), last=last))
            (held,) = served.streams._streams.values()
            while held._client is None:
                await asyncio.sleep(0)
            await time.skip(25.0)
            assert engine.num_live == 1
            while not reading.done():
                engine.step()
                await asyncio.sleep(0)
            assert (await reading)[-1][1] == "[DONE]"

    asyncio.run(main())


def test_a_stream_whose_client_left_before_its_first_event_is_cancelled_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        raise ConnectionResetError("the client is gone")

    async def main() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(tmp_path, engine, grace_s=100.0) as served:
            time = SkippedTime(asyncio.get_running_loop())
            monkeypatch.setattr("octavo.gateway.api.respond.EventStream.open", gone)
            answering = asyncio.ensure_future(served.session.post(served.url + CHAT, json=chat()))
            await accepted(served)
            engine.step()
            await answering  # by an error that would reach nobody
            (held,) = served.streams._streams.values()
            while held.num_readers:
                await asyncio.sleep(0)
            await time.skip(40.0)
            assert engine.num_live == 1
            await time.skip(61.0)
            assert (engine.num_live, len(served.streams)) == (0, 0)

    asyncio.run(main())


def test_events_that_take_too_much_room_are_dropped_and_a_client_that_wants_them_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, max_stream_bytes=2000) as served:
            events = await served.read(CHAT, chat())
            await _settle(served.streams)
            response_id, _, number = events[-4][0].rpartition(":")
            assert await served.error(CHAT, chat(), last=f"{response_id}:2") == (410, "events_gone")
            assert await served.read(CHAT, chat(), last=f"{response_id}:{number}") == events[-3:]

    asyncio.run(main())


def test_finished_streams_are_held_within_a_bound_and_the_oldest_go_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path, max_finished_bytes=20_000) as served:
            lasts = [(await served.read(CHAT, chat()))[-2][0] for _ in range(12)]
            await _settle(served.streams)
            assert 0 < len(served.streams) < 12
            assert await served.error(CHAT, chat(), last=lasts[0]) == (404, "stream_not_found")
            assert [data for _, data in await served.read(CHAT, chat(), last=lasts[-1])] == ["[DONE]"]

    asyncio.run(main())


def test_an_error_in_a_stream_has_no_number_and_want_of_an_engine_leaves_it_to_the_next_server(tmp_path: Path) -> None:
    async def main() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(tmp_path, engine) as served:
            reading = asyncio.ensure_future(served.read(CHAT, chat()))
            await accepted(served)
            engine.step(3)
            await asyncio.sleep(0)
            while not served.streams.pump.num_open:
                await asyncio.sleep(0)
            for sequence in list(engine._live.values()):
                engine._end(sequence, "error", error=("executor_lost", "gone"))
            *before, error, done = await reading
            assert (error[0], json.loads(error[1])["error"]["code"]) == ("", "executor_lost")
            assert done == ("", "[DONE]")
        assert len(StreamJournal.unfinished(tmp_path)) == 1
        async with serving(tmp_path) as served:
            rest = await served.read(CHAT, chat(), last=before[-1][0])
            assert len(texts(before + rest)[0].encode("utf-8", "replace")) >= 30
            assert rest[-1][1] == "[DONE]"
            assert rest[0][0].endswith(f":{len(before) + 1}")

    asyncio.run(main())


def test_a_request_that_is_refused_is_answered_as_ever_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.refuse_with = ("context_length_exceeded", "too long")
        async with serving(tmp_path, engine) as served:
            assert await served.error(CHAT, chat()) == (400, "context_length_exceeded")
            assert len(served.streams) == 0
        assert StreamJournal.unfinished(tmp_path) == []
        async with serving(tmp_path, FakeEngine(max_live=0)) as served:
            assert await served.error(CHAT, chat()) == (429, "queue_full")
        assert StreamJournal.unfinished(tmp_path) == []

    asyncio.run(main())


def test_a_full_engine_gets_the_streams_of_before_when_it_has_room_and_clients_are_told_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.gateway.api.stream_resume.RETRY_S", 0.0)

    async def main() -> None:
        async with serving(tmp_path, FakeEngine(by_hand=True)) as served:
            reading = asyncio.ensure_future(served.read(CHAT, chat(), stop_after=3))
            await accepted(served)
            while not reading.done():
                served.engine.step()
                await asyncio.sleep(0)
            last = (await reading)[-1][0]
        engine = FakeEngine(max_live=0)
        async with serving(tmp_path, engine) as served:
            assert await served.error(CHAT, chat(), last=last) == (503, "stream_not_ready")
            engine._max_live = 1
            while not engine.submitted:
                await asyncio.sleep(0)
            rest = await served.read(CHAT, chat(), last=last)
            assert (rest[0][0].rpartition(":")[2], rest[-1][1]) == ("4", "[DONE]")

    asyncio.run(main())


def test_who_comes_back_first_is_cut_off_when_somebody_else_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(tmp_path, engine) as served:
            first = asyncio.ensure_future(served.read(CHAT, chat(request_id="mine")))
            await accepted(served)
            engine.step(3)
            while not served.streams.pump.num_open:
                await asyncio.sleep(0)
            second = asyncio.ensure_future(served.read("/v1/responses-stream/chatcmpl-mine", None))
            with pytest.raises(aiohttp.ClientError):
                await first
            while not second.done():
                engine.step()
                await asyncio.sleep(0)
            events = await second
            assert [int(event_id.rpartition(":")[2]) for event_id, _ in events] == list(range(1, len(events) + 1))
            assert not engine.cancelled

    asyncio.run(main())


_SERVER = """
import asyncio, pathlib, sys
from aiohttp import web
from octavo.gateway.engine import Engine
from octavo.gateway.api.http_connection import GatewayRunner
from octavo.gateway.api.server import create_app
from octavo.gateway.api.settings import ServerSettings
from octavo.gateway.api.stream_resume import hold_streams
from octavo.messages.sampling import SamplingParams

async def main():
    async with Engine(num_blocks=64, max_model_len=256, num_threads=1) as engine:
        app = create_app(engine, ServerSettings(log_requests=False))
        hold_streams(app, pathlib.Path(sys.argv[1]))
        runner = GatewayRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print("port", runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def server_process(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _SERVER,
        str(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        while not (line := await process.stdout.readline()).startswith(b"port "):
            assert line, "the server did not start"
        yield process, f"http://127.0.0.1:{int(line.split()[1])}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def test_a_server_killed_with_the_real_engine_loses_no_token_of_a_stream_that_was_sampled(tmp_path: Path) -> None:
    async def main() -> None:
        body = {"prompt": "The first", "stream": True, "max_tokens": 100, "temperature": 1.0, "ignore_eos": True}
        async with aiohttp.ClientSession() as session:
            async with server_process(tmp_path) as (process, url):
                served = Served(url, session, None, None)  # type: ignore[arg-type]
                first = await served.read(COMPLETIONS, body, stop_after=8)
                process.send_signal(signal.SIGKILL)
                await process.wait()
            (left,) = StreamJournal.unfinished(tmp_path)
            async with server_process(tmp_path) as (process, url):
                served = Served(url, session, None, None)  # type: ignore[arg-type]
                rest = await served.read(COMPLETIONS, body, last=first[-1][0])
                numbers = [int(event_id.rpartition(":")[2]) for event_id, _ in first + rest]
                assert numbers == list(range(1, len(numbers) + 1))
                again = await served.read(COMPLETIONS, {**body, "seed": left.seeds[0]})
                assert texts(first + rest) == texts(again)
                assert len(again) == len(numbers)

    asyncio.run(main())
