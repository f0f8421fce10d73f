"""Requests as known advisories have them: an id that another has, addresses to call, names of files."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fake_engine import FakeEngine
from http_client import Client, serving

_told: list[list[tuple[str, tuple[object, ...]]]] = []


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    for told in _told:
        told.append((event, arguments))


@contextmanager
def audited() -> Iterator[list[tuple[str, tuple[object, ...]]]]:
    """What the interpreter says that it does, meanwhile."""
    if _listen not in _hooked:
        sys.addaudithook(_listen)  # it cannot be taken away again
        _hooked.append(_listen)
    told: list[tuple[str, tuple[object, ...]]] = []
    _told.append(told)
    try:
        yield told
    finally:
        _told.remove(told)


_hooked: list[object] = []


def test_sec_17_two_requests_of_one_id_at_once_do_not_touch_each_other() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            headers = {"X-Request-Id": "the-same"}
            body = {"max_tokens": 6, "request_id": "the-same"}
            texts = ("one prompt", "and another", "a third one")
            asked = [
                asyncio.create_task(client.post("/v1/completions", {"prompt": text, **body}, headers)) for text in texts
            ]
            while engine.num_live < 3:
                await asyncio.sleep(0)
            # The client of one of them leaves: it is the only one that ends for it.
            asked[1].cancel()
            await asyncio.wait_for(engine.was_cancelled.wait(), 60)
            assert engine.num_live == 2
            for _ in range(8):
                engine.step(1)
                await asyncio.sleep(0)
            answers = [await asked[0], await asked[2]]
            assert [answer.status for answer in answers] == [200, 200]
            assert [answer.headers["x-request-id"] for answer in answers] == ["the-same", "the-same"]
            got = [answer.json["choices"][0]["text"] for answer in answers]
        async with serving(FakeEngine()) as client:
            alone = [(await client.post("/v1/completions", {"prompt": text, **body})).json for text in texts]
            assert got == [alone[0]["choices"][0]["text"], alone[2]["choices"][0]["text"]]

    asyncio.run(run())


ADDRESSES = (
    "http://169.254.169.254/latest/meta-data/",
    "https://example.invalid/x.png",
    "![image](http://127.0.0.1:1/x.png)",
    "file:///etc/passwd",
    "//127.0.0.1:1/",
)


async def ask_everything(client: Client, text: str) -> None:
    """A request with a text in each place that takes one."""
    await client.complete(prompt=text, user=text)
    await client.complete(prompt="x", model=text)
    await client.complete(prompt="x", stop=[text[:100]])
    await client.complete(prompt="x", suffix=text)
    await client.chat(messages=[{"role": "user", "content": text}])
    await client.chat(messages=[{"role": "user", "content": [{"type": "text", "text": text}]}])
    await client.chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": text}}]}])
    await client.chat(messages=[{"role": "user", "content": "x", "name": text}])
    await client.chat(chat_template=text)
    await client.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": text}}})
    await client.post("/tokenize", {"prompt": text})
    await client.get("/v1/models/" + text.replace("?", ""))


@pytest.mark.parametrize("text", ADDRESSES)
def test_sec_37_no_text_of_a_request_makes_the_server_call_anybody(text: str) -> None:
    async def run() -> list[object]:
        async with serving() as client:
            await client.get("/health")
            with audited() as told:
                await ask_everything(client, text)
            port = client.server.port
        called: list[object] = [arguments[1] for event, arguments in told if event == "socket.connect"]
        lookups = ("socket.getaddrinfo", "socket.gethostbyname")
        looked_up = [arguments[0] for event, arguments in told if event in lookups]
        return [
            *(address for address in called if not (isinstance(address, tuple) and address[1] == port)),
            *(name for name in looked_up if name != "127.0.0.1"),
            *(arguments for event, arguments in told if event in ("subprocess.Popen", "os.system", "urllib.Request")),
        ]

    assert asyncio.run(run()) == []


def test_what_is_called_would_be_seen() -> None:
    import socket

    with audited() as told, socket.socket() as probe:
        probe.settimeout(1)
        assert probe.connect_ex(("127.0.0.1", 1))
    assert "socket.connect" in [event for event, _ in told]


NAMES = ("../../../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "file:///etc/passwd", "\\\\host\\share")


@pytest.mark.parametrize("name", NAMES)
def test_sec_39_no_name_of_a_request_is_looked_up_in_the_file_system(name: str) -> None:
    async def run() -> list[str]:
        async with serving() as client:
            await ask_everything(client, name)  # whatever is imported late, is now
            with audited() as told:
                answer = await client.complete(prompt="x", model=name)
                assert (answer.status, answer.error["code"]) == (404, "model_not_found")
                await ask_everything(client, name)
        return [str(arguments[0]) for event, arguments in told if event in ("open", "os.listdir", "os.scandir")]

    assert [path for path in asyncio.run(run()) if "passwd" in path or "share" in path] == []
