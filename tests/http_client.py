"""A server on a free port, and a client that keeps everything an answer says."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from fake_engine import FakeEngine

from octavo.gateway.api.engine_protocol import EngineLike
from octavo.gateway.api.server import RunningServer, start_http
from octavo.gateway.api.settings import ServerSettings


class Answer(msgspec.Struct):
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which must have exactly the four fields that clients know."""
        assert set(self.json) == {"error"}, self.body
        error: dict[str, Any] = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"], error
        assert isinstance(error["message"], str) and error["message"]
        assert isinstance(error["type"], str) and isinstance(error["code"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        return error

    @property
    def events(self) -> list[Any]:
        return parse_events(self.body)


def parse_events(body: bytes) -> list[Any]:
    """The JSON of each event; the framing must be exact and the last event the end mark."""
    frames = body.split(b"\n\n")
    assert frames.pop() == b"", body[-100:]
    assert all(frame.startswith(b"data: ") and b"\n" not in frame for frame in frames), frames
    assert frames.pop() == b"data: [DONE]"
    # As strict as the strictest client: no line may end where another alphabet ends lines.
    assert all(len(frame.decode().splitlines()) == 1 for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


class Client:
    def __init__(self, server: RunningServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{server.port}"
        self.session = session

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    async def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        return await self.request(
            "POST", path, data=data, headers={"Content-Type": "application/json", **(headers or {})}
        )

    async def complete(self, **body: Any) -> Answer:
        return await self.post("/v1/completions", {"prompt": "hello", "max_tokens": 20, **body})

    async def chat(self, **body: Any) -> Answer:
        return await self.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, **body}
        )

    async def raw(self, data: bytes) -> bytes:
        """Send bytes, return what comes until the server closes."""
        reader, writer = await self.connect(data)
        answer = await asyncio.wait_for(reader.read(), 180)
        writer.close()
        return answer

    async def connect(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        writer.write(data)
        await writer.drain()
        return reader, writer


def http_post(path: str, body: dict[str, Any], *, version: str = "1.1", close: bool = True) -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if close and version == "1.1":
        head += "Connection: close\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@asynccontextmanager
async def serving(engine: EngineLike | None = None, **settings: Any) -> AsyncIterator[Client]:
    """A running server; everything is closed at the end, whatever happened."""
    server = await start_http(engine or FakeEngine(), ServerSettings(**{"log_requests": False, **settings}), port=0)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
            yield Client(server, session)
    finally:
        await server.close()
