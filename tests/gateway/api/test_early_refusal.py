from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import process_family
import pytest
from fake_engine import FakeEngine
from http_client import Client, http_post, serving
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.api.early_refusal import MAX_BODY_BYTES, read_head
from octavo.gateway.config import EngineConfig

TIMEOUT_S = 180
until = partial(process_family.until, every_s=0, timeout_s=TIMEOUT_S)  # the loop waits for nothing else
PLAIN = http_post("/v1/completions", {"prompt": "x"}, close=False)


def with_field(field: str) -> bytes:
    return PLAIN.replace(b"Host: localhost\r\n", b"Host: localhost\r\n" + field.encode() + b"\r\n")


@asynccontextmanager
async def full_server(**settings: object) -> AsyncIterator[tuple[Client, FakeEngine]]:
    """A server that is full."""
    engine = FakeEngine(by_hand=True)
    engine.config = EngineConfig(max_num_seqs=1, max_num_queued_requests=1)
    async with serving(engine, **settings) as client:
        headers = {"Authorization": "Bearer right"} if settings.get("api_keys") else None
        body = {"prompt": "first", "max_tokens": 5}
        taken = [asyncio.ensure_future(client.post("/v1/completions", body, headers=headers)) for _ in range(2)]
        await until(lambda: engine.num_live == 2)
        yield client, engine
        engine.step(5)
        assert [(await each).status for each in taken] == [200, 200]


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    return head, await asyncio.wait_for(reader.readexactly(int(length.split(b":")[1])), TIMEOUT_S)


async def ask_raw(client: Client, data: bytes) -> tuple[bytes, bytes]:
    reader, writer = await client.connect(data)
    try:
        return await read_answer(reader)
    finally:
        writer.close()


def fields_of(head: bytes) -> dict[str, str]:
    lines = head.decode().split("\r\n")[1:-2]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


def was_parsed_by_library(client: Client) -> int:
    """Requests that the HTTP library has seen."""
    server = client.server._runner.server
    assert server is not None
    return server.requests_count


def test_a_refusal_of_a_plain_request_never_reaches_the_library_and_says_the_same() -> None:
    async def run() -> None:
        async with full_server() as (client, _):
            before = was_parsed_by_library(client)
            early_head, early_body = await ask_raw(client, with_field("X-Request-Id: mine"))
            assert was_parsed_by_library(client) == before
            late_head, late_body = await ask_raw(client, with_field("X-Request-Id: mine\r\nContent-Encoding: identity"))
            assert was_parsed_by_library(client) == before + 1
            assert early_body == late_body
            assert early_head.split(b"\r\n")[0] == late_head.split(b"\r\n")[0] == b"HTTP/1.1 429 Too Many Requests"
            early, late = fields_of(early_head), fields_of(late_head)
            early.pop("date"), late.pop("date")
            assert early == late and early["x-request-id"] == "mine" and early["retry-after"] == "1"
            metrics = (await client.get("/metrics")).body.decode()
            assert 'octavo:refusal_seconds_count{engine="0",model_name="fake/bytes"} 2.0' in metrics
            assert 'bound="requests",engine="0",model_name="fake/bytes"} 2.0' in metrics
            assert 'http_requests_total{handler="/v1/completions",method="POST",status="429"} 2.0' in metrics

    asyncio.run(run())


def test_a_connection_goes_on_after_refusals_however_its_bytes_are_cut() -> None:
    async def run() -> None:
        async with full_server() as (client, engine):
            head, _, body = PLAIN.partition(b"\r\n\r\n")
            reader, writer = await client.connect(b"")
            for cuts in ([PLAIN], [head + b"\r\n\r\n", body], [head + b"\r\n\r\n" + body[:5], body[5:]], [PLAIN]):
                before = was_parsed_by_library(client)
                for part in cuts[:-1]:
                    writer.write(part)
                    answer = await read_answer(reader)  # it does not wait for the body
                    assert answer[0].startswith(b"HTTP/1.1 429 ")
                writer.write(cuts[-1])
                if len(cuts) == 1:
                    assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 429 ")
                assert was_parsed_by_library(client) == before
            # What is left of a refused body and the next request, in one piece.
            writer.write(head + b"\r\n\r\n" + body[:5])
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 429 ")
            engine.step(5)
            await until(lambda: not client.server._context.admission.num_open)
            writer.write(body[5:] + PLAIN)
            await until(lambda: engine.num_live == 1)
            engine.step(16)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 ")
            writer.close()

    asyncio.run(run())


def test_several_requests_in_one_piece_are_the_librarys_and_all_are_answered() -> None:
    async def run() -> None:
        async with full_server() as (client, _):
            reader, writer = await client.connect(PLAIN * 3)
            for _ in range(3):
                assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 429 ")
            # Where such a connection's requests begin is not certain any more.
            before = was_parsed_by_library(client)
            writer.write(PLAIN)
            assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 429 ")
            assert was_parsed_by_library(client) == before + 1
            writer.close()

    asyncio.run(run())


def test_bytes_in_the_middle_of_a_request_are_never_taken_for_the_head_of_another() -> None:
    async def run() -> None:
        async with full_server() as (client, engine):
            reader, writer = await client.connect(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Long: ")
            await until(lambda: client.server._context.connections.num_open == 3)
            for _ in range(50):
                await asyncio.sleep(0)
            writer.write(PLAIN)  # it goes on the header's value, and what follows does not make sense
            answer = await asyncio.wait_for(reader.read(), TIMEOUT_S)
            assert answer.count(b"HTTP/1.") == 1 and answer.startswith(b"HTTP/1.0 400 ")
            writer.close()
            assert engine.num_live == 2

    asyncio.run(run())


def test_who_may_not_call_at_all_is_told_so_and_not_how_much_there_is_to_do() -> None:
    async def run() -> None:
        async with full_server(api_keys=("right",)) as (client, _):
            assert (await ask_raw(client, PLAIN))[0].startswith(b"HTTP/1.1 401 ")
            assert (await ask_raw(client, with_field("Authorization: Bearer wrong")))[0].startswith(b"HTTP/1.1 401 ")
            assert (await ask_raw(client, with_field("Authorization: Bearer right")))[0].startswith(b"HTTP/1.1 429 ")
        async with full_server() as (client, _):
            foreign = PLAIN.replace(b"Host: localhost", b"Host: evil.example")
            assert (await ask_raw(client, foreign))[0].startswith(b"HTTP/1.1 403 ")
            assert (await ask_raw(client, with_field("Origin: https://evil.example")))[0].startswith(b"HTTP/1.1 403 ")

    asyncio.run(run())


def test_a_refused_body_that_does_not_come_costs_the_connection_and_nothing_else() -> None:
    async def run() -> None:
        async with full_server(body_timeout_s=0.01) as (client, _):
            head = PLAIN.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            reader, writer = await client.connect(head)
            answer = await asyncio.wait_for(reader.read(), TIMEOUT_S)  # until the server closes
            assert answer.startswith(b"HTTP/1.1 429 ")
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "field",
    [
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
        "Upgrade: websocket",
        "Origin: http://localhost",
        "Content-Length: 15",
        "Host: other",
        "Connection: close",
        " folded: x",
        "no colon",
        "ctl: \x01",
    ],
)
def test_a_head_with_anything_out_of_the_ordinary_is_not_plain(field: str) -> None:
    assert read_head(PLAIN) is not None
    assert read_head(with_field(field)) is None


@pytest.mark.parametrize(
    "data",
    [
        PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0", 1),
        PLAIN.replace(b"\r\nHost", b"\nHost"),
        PLAIN.replace(b"Host: localhost\r\n", b""),
        PLAIN.replace(b"Content-Length: 15", b"Content-Length: +15"),
        PLAIN.replace(b"Content-Length: 15", b"Content-Length: 0x15"),
        PLAIN.replace(b"Content-Length: 15\r\n", b""),
        PLAIN.replace(b"POST ", b"PUT "),
        PLAIN.replace(b" /v1", b" http://x/v1"),
        PLAIN.replace(b"localhost", b"l" * 9000),
        b"",
        PLAIN[:40],
    ],
)
def test_what_is_no_whole_plain_head_is_left_to_the_library(data: bytes) -> None:
    assert read_head(data) is None


@given(st.binary(max_size=200), st.integers(0, len(PLAIN)))
def test_no_bytes_make_the_reader_of_heads_fail(noise: bytes, at: int) -> None:
    head = read_head(PLAIN[:at] + noise + PLAIN[at:])
    if head is not None:
        assert head.num_bytes >= head.num_head_bytes > 0
        assert head.method in ("GET", "POST")


def test_a_long_body_is_refused_by_the_library_which_lets_it_come() -> None:
    async def run() -> None:
        async with full_server() as (client, _):
            before = was_parsed_by_library(client)
            data = http_post("/v1/completions", {"prompt": "x" * (MAX_BODY_BYTES + 1)}, close=False)
            assert (await ask_raw(client, data))[0].startswith(b"HTTP/1.1 429 ")
            assert was_parsed_by_library(client) == before + 1

    asyncio.run(run())
