from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

import pytest
from fake_engine import FakeEngine
from http_client import Client, http_post, parse_events, serving

from octavo.gateway.api.connections import ConnectionTable

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 20}
TIMEOUT_S = 180


async def wait(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), TIMEOUT_S)
    event.clear()


async def half_closed(client: Client, data: bytes) -> socket.socket:
    """A socket that has sent `data` and will send no more."""
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", client.server.port))
    await loop.sock_sendall(sock, data)
    sock.shutdown(socket.SHUT_WR)
    return sock


async def read_to_the_end(sock: socket.socket) -> bytes:
    data = b""
    loop = asyncio.get_running_loop()
    while part := await asyncio.wait_for(loop.sock_recv(sock, 65536), TIMEOUT_S):
        data += part
    sock.close()
    return data


async def turns(count: int = 50) -> None:
    """Turns of the event loop, in which the server sees what the sockets of this machine did."""
    for _ in range(count):
        await asyncio.sleep(0)


def join_chunks(body: bytes) -> bytes:
    """The content of a chunked body, sizes read as RFC 9112 has them."""
    content = b""
    while True:
        line, _, body = body.partition(b"\r\n")
        size = int(line, 16)
        if size == 0:
            assert body == b"\r\n"
            return content
        content, end, body = content + body[:size], body[size : size + 2], body[size + 2 :]
        assert end == b"\r\n"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_half_closed_client_gets_its_whole_answer(version: str) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            sock = await half_closed(client, http_post("/v1/chat/completions", CHAT, version=version))
            await wait(engine.was_submitted)
            await turns()
            engine.step(7)
            await turns()
            assert engine.num_live == 1 and not engine.cancelled
            engine.step(20)
            answer = await read_to_the_end(sock)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/{version} 200 OK\r\n".encode())
            assert json.loads(body)["usage"]["completion_tokens"] == 20

    asyncio.run(run())


@pytest.mark.parametrize("steps_before", [0, 1, 5])
def test_a_half_closed_client_gets_its_whole_stream(steps_before: int) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            loop = asyncio.get_running_loop()
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", client.server.port))
            await loop.sock_sendall(sock, http_post("/v1/chat/completions", {**CHAT, "stream": True}))
            await wait(engine.was_submitted)
            engine.step(steps_before)
            await turns()
            sock.shutdown(socket.SHUT_WR)
            await turns()
            engine.step(20)
            head, _, body = (await read_to_the_end(sock)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            events = parse_events(join_chunks(body))
            assert events[-1]["choices"][0]["finish_reason"] == "length" and not engine.cancelled

    asyncio.run(run())


def test_requests_that_wait_their_turn_on_a_half_closed_connection_are_served_too() -> None:
    async def run() -> None:
        async with serving() as client:
            keep = http_post("/v1/chat/completions", CHAT, close=False)
            answer = await read_to_the_end(await half_closed(client, keep * 3))
            assert answer.count(b"HTTP/1.1 200 OK\r\n") == 3 and b"HTTP/HTTP" not in answer
            assert answer.lower().count(b"connection: close") == 1  # on the last one

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
@pytest.mark.parametrize("way", ["close", "reset", "half, then close", "half, then reset"])
def test_a_client_that_is_gone_altogether_frees_its_request_without_a_further_step(
    way: str, num_steps: int, stream: bool
) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            loop = asyncio.get_running_loop()
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", client.server.port))
            await loop.sock_sendall(sock, http_post("/v1/chat/completions", {**CHAT, "stream": stream, "n": 2}))
            await wait(engine.was_submitted)
            engine.step(num_steps)
            await turns()
            if "half" in way:
                sock.shutdown(socket.SHUT_WR)
                await turns()
                assert engine.num_live == 2  # it may still be reading
            elif stream and num_steps:
                assert await loop.sock_recv(sock, 65536)  # with bytes left unread a close is a reset
            if "reset" in way:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            await wait(engine.was_cancelled)
            assert engine.num_live == 0 and len(engine.cancelled) == 2
            await open_connections(client, 1)

    asyncio.run(run())


async def open_connections(client: Client, expected: int) -> None:
    """Until the server has so many, the one that asks among them."""
    async with asyncio.timeout(TIMEOUT_S):
        while f'octavo:open_connections{{engine="0",model_name="fake/bytes"}} {expected}.0' not in await metrics(
            client
        ):
            pass


async def metrics(client: Client) -> str:
    return (await client.get("/metrics")).body.decode()


def test_half_a_request_and_no_more_is_not_waited_for() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            whole = http_post("/v1/chat/completions", CHAT)
            for data in (b"", b"POST /v1/ch", whole[:-5]):
                assert b" 200 " not in await read_to_the_end(await half_closed(client, data))
            assert not engine.submitted
            await open_connections(client, 1)

    asyncio.run(run())


def test_past_a_bound_on_connections_new_ones_are_told_and_open_ones_are_untouched() -> None:
    async def run(bound: str, status: bytes, **settings: Any) -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine, **settings) as client:
            reader, writer = await client.connect(http_post("/v1/chat/completions", {**CHAT, "stream": True}))
            await wait(engine.was_submitted)
            _, idle = await client.connect(b"")
            refused = await client.raw(http_post("/v1/chat/completions", CHAT))
            assert refused.startswith(b"HTTP/1.1 " + status) and b"Retry-After: 5\r\n" in refused
            head, _, body = refused.partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}".encode() in head
            assert json.loads(body)["error"]["code"] == "too_many_connections"
            engine.step(30)
            assert b"[DONE]" in await asyncio.wait_for(reader.read(), TIMEOUT_S)
            assert len(engine.submitted) == 1
            idle.close()
            writer.close()
            page = await metrics(client)
            assert f'octavo:connections_refused_total{{bound="{bound}",engine="0",model_name="fake/bytes"}} 1.0' in page

    asyncio.run(run("all", b"503 Service Unavailable", max_connections=2))
    asyncio.run(run("client", b"429 Too Many Requests", max_connections_per_client=2))


def test_a_refused_client_that_sends_nothing_is_let_go() -> None:
    async def run() -> None:
        async with serving(max_connections=1) as client:
            _, writer = await client.connect(b"")
            await turns()
            assert await client.raw(b"") == b""  # closed by the server, without a word
            writer.close()

    asyncio.run(run())


def test_one_client_has_as_many_addresses_as_its_network_gives_it() -> None:
    table = ConnectionTable(max_total=0, max_per_client=2)
    assert table.admit("2001:db8::1") is None and table.admit("2001:db8::2") is None
    assert table.admit("2001:db8::3") == "client"
    assert table.admit("2001:db8:0:1::3") is None
    assert table.admit("192.0.2.1") is None
    table.release("2001:db8::1")
    assert table.admit("2001:db8::4") is None
    assert table.num_open == 4 and table.num_refused == {"all": 0, "client": 1}


def test_only_the_total_bounds_a_proxy_that_is_trusted() -> None:
    table = ConnectionTable(max_total=4, max_per_client=1, trusted_proxies=["192.0.2.0/28", "::1"])
    assert [table.admit("192.0.2.1") for _ in range(2)] == [None, None]
    assert [table.admit("::1") for _ in range(2)] == [None, None]
    assert table.admit("192.0.2.1") == "all"
    table.release("::1")
    assert table.admit("192.0.2.16") is None
    table.release("::1")
    assert table.admit("192.0.2.16") == "client"
