from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import struct
from asyncio.subprocess import PIPE
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from http_client import http_post, parse_events, serving
from structlog.testing import capture_logs

from octavo.gateway.api.server import serve_http
from octavo.gateway.api.settings import ServerSettings

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 400, "stream": True}
TIMEOUT_S = 180


async def wait(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), TIMEOUT_S)
    event.clear()


def test_models_are_named_also_with_slashes() -> None:
    async def run() -> None:
        async with serving(served_model_names=("org/model", "short")) as client:
            listed = (await client.get("/v1/models")).json
            assert [card["id"] for card in listed["data"]] == ["org/model", "short"]
            card = (await client.get("/v1/models/org/model")).json
            assert card == listed["data"][0]
            assert card["object"] == "model" and card["max_model_len"] == 512 and card["root"] == "fake/bytes"
            missing = await client.get("/v1/models/org")
            assert (missing.status, missing.error["code"]) == (404, "model_not_found")
            assert (await client.complete(model="short")).json["model"] == "short"
            assert (await client.complete()).json["model"] == "org/model"
            unknown = await client.complete(model="../../etc/passwd")
            assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")

    asyncio.run(run())


def test_tokens_and_texts_are_turned_into_each_other() -> None:
    async def run() -> None:
        async with serving() as client:
            answer = (await client.post("/tokenize", {"prompt": "hi", "return_token_strs": True})).json
            assert answer == {
                "count": 3,
                "max_model_len": 512,
                "tokens": [256, 104, 105],
                "token_strs": ["<256>", "h", "i"],
            }
            bare = (await client.post("/tokenize", {"prompt": "hi", "add_special_tokens": False})).json
            assert bare["tokens"] == [104, 105]
            chat = (await client.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})).json
            assert bytes(chat["tokens"]) == b"<user>hi\n<assistant>"
            marked = {"messages": [{"role": "user", "content": "hi"}], "add_special_tokens": True}
            assert (await client.post("/tokenize", marked)).json["tokens"] == [256, *chat["tokens"]]
            text = (await client.post("/detokenize", {"tokens": [104, 105]})).json
            assert text == {"prompt": "hi"}

    asyncio.run(run())


def test_health_follows_the_engine_and_life_does_not() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine, ready_grace_s=0) as client:
            for _ in range(2):  # there and back again
                for path in ("/health", "/ready", "/ping"):
                    assert (await client.get(path)).status == 200
                engine.is_ready, engine.why_not_ready = False, "the executor is starting"
                for path in ("/health", "/ready", "/ping"):
                    answer = await client.get(path)
                    assert (answer.status, answer.error["code"]) == (503, "not_ready")
                    assert "executor is starting" in answer.error["message"]
                assert (await client.get("/live")).status == 200
                engine.is_ready, engine.why_not_ready = True, ""

    asyncio.run(run())


def test_a_replacement_that_is_quick_leaves_the_server_ready_and_one_beyond_repair_ends_its_life() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine, ready_grace_s=1000) as client:
            assert (await client.get("/ready")).status == 200
            engine.is_ready, engine.why_not_ready = False, "the executor is starting"
            assert (await client.get("/ready")).status == 200
            assert (await client.get("/live")).status == 200
            engine.is_broken = True
            assert (await client.get("/live")).error["code"] == "engine_broken"
            assert (await client.get("/ready")).error["code"] == "not_ready"

    asyncio.run(run())


def test_work_that_does_not_go_on_makes_the_server_not_ready_until_it_does() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine, stall_s=0.0) as client:
            assert (await client.get("/ready")).status == 200
            stream = asyncio.ensure_future(client.chat(stream=True, max_tokens=50))
            await wait(engine.was_submitted)
            async with asyncio.timeout(TIMEOUT_S):
                while (answer := await client.get("/ready")).status == 200:
                    pass
            assert "no step has ended" in answer.error["message"]
            assert (await client.get("/live")).status == 200
            engine.step(100)  # to its end: with nothing to do there is nothing to wait for
            assert (await client.get("/ready")).status == 200
            await stream

    asyncio.run(run())


def test_unknown_paths_and_methods_get_errors_in_the_same_shape() -> None:
    async def run() -> None:
        async with serving() as client:
            for path in ("/nope", "//v1/models", "/v1/completions/", "/v1/%2e%2e/x"):
                answer = await client.get(path)
                assert (answer.status, answer.error["code"]) == (404, "not_found"), path
            for method in ("GET", "PUT", "DELETE", "TRACE", "PROPFIND", "OPTIONS"):
                answer = await client.request(method, "/v1/completions")
                assert (answer.status, answer.error["code"]) == (405, "method_not_allowed"), method
                assert answer.headers["Allow"] == "POST"
            assert (await client.request("HEAD", "/v1/completions")).status == 405

    asyncio.run(run())


def test_a_request_id_is_kept_if_it_is_harmless_and_made_otherwise() -> None:
    async def run() -> None:
        async with serving() as client:
            kept = await client.get("/version", headers={"X-Request-Id": "abc-1"})
            assert kept.headers["x-request-id"] == "abc-1"
            for bad in ("a" * 129, "a b", "é"):
                made = (await client.get("/version", headers={"X-Request-Id": bad})).headers["x-request-id"]
                assert made != bad and len(made) == 32
            for answer in (await client.complete(stream=True), await client.get("/nope"), await client.complete(n=0)):
                assert len(answer.headers["x-request-id"]) == 32
                assert answer.headers["Server"] == "octavo"

    asyncio.run(run())


@pytest.mark.parametrize("asks_to_stay", [False, True])
def test_an_http_1_0_client_gets_a_stream_without_chunks_that_ends_with_the_connection(asks_to_stay: bool) -> None:
    async def run() -> None:
        async with serving() as client:
            data = http_post("/v1/chat/completions", {**CHAT, "max_tokens": 20}, version="1.0")
            if asks_to_stay:
                data = data.replace(b"\r\n", b"\r\nConnection: keep-alive\r\n", 1)
            answer = await client.raw(data)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.0 200") and b"transfer-encoding" not in head.lower()
            assert len(parse_events(body)) > 5

    asyncio.run(run())


def test_an_http_1_0_client_need_not_name_the_host() -> None:
    async def run() -> None:
        async with serving() as client:
            assert (await client.raw(b"GET /v1/models HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.0 200 ")

    asyncio.run(run())


def test_a_head_tells_what_a_get_would_without_its_body() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine, ready_grace_s=0) as client:
            for path in ("/", "/health", "/v1/models", "/metrics"):
                answer = await client.request("HEAD", path)
                assert (answer.status, answer.body) == (200, b"") and int(answer.headers["Content-Length"]) > 0
            engine.is_ready, engine.why_not_ready = False, "the executor is starting"
            assert (await client.request("HEAD", "/health")).status == 503

    asyncio.run(run())


def test_bodies_to_be_tokenized_count_among_the_bytes_of_open_requests() -> None:
    async def run() -> None:
        async with serving(max_open_bytes=1000) as client:
            open_request = http_post("/tokenize", {"prompt": "x" * 900}, close=False)
            reader, writer = await client.connect(open_request[:-1])
            async with asyncio.timeout(TIMEOUT_S):
                while (answer := await client.post("/tokenize", {"prompt": "x" * 100})).status == 200:
                    pass  # the other one has not been seen yet
            assert (answer.status, answer.error["code"]) == (429, "queue_full")
            assert int(answer.headers["Retry-After"]) >= 1
            writer.write(open_request[-1:])
            await asyncio.wait_for(reader.readuntil(b"}"), TIMEOUT_S)
            writer.close()
            assert (await client.post("/tokenize", {"prompt": "x" * 100})).status == 200

    asyncio.run(run())


def test_a_connection_serves_one_request_after_another() -> None:
    async def run() -> None:
        async with serving() as client:
            data = http_post("/v1/completions", {"prompt": "x", "stream": True}, close=False)
            answer = await client.raw(data + data + http_post("/v1/completions", {"prompt": "x", "n": 0}))
            assert answer.count(b"HTTP/1.1 200 OK") == 2 and answer.count(b"0\r\n\r\n") == 2
            assert answer.count(b"HTTP/1.1 400 ") == 1

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_a_disconnect_cancels_the_request_at_once_wherever_it_is(stream: bool, num_steps: int) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            reader, writer = await client.connect(http_post("/v1/chat/completions", {**CHAT, "stream": stream, "n": 2}))
            await wait(engine.was_submitted)
            engine.step(num_steps)
            if stream and num_steps:
                await asyncio.wait_for(reader.readuntil(b"\n\n"), TIMEOUT_S)
            writer.transport.abort()
            await wait(engine.was_cancelled)
            assert engine.num_live == 0 and len(engine.cancelled) == 2
            assert (await client.get("/metrics")).status == 200

    asyncio.run(run())


def test_f_38_a_client_that_does_not_read_is_cut_off_and_nobody_else_notices() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True, max_model_len=10**6, answer=lambda ids, index: b"x" * 10**6)
        async with serving(engine, stream_buffer_bytes=16 * 1024) as client:
            lazy = socket.socket()
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(lazy, ("127.0.0.1", client.server.port))
            await loop.sock_sendall(lazy, http_post("/v1/chat/completions", {**CHAT, "max_tokens": 900_000}))
            await wait(engine.was_submitted)
            eager = asyncio.ensure_future(client.chat(stream=True, max_tokens=100))
            await wait(engine.was_submitted)
            # Turns of the loop, each with a batch of tokens: far more bytes than all buffers between us and the client.
            for _ in range(20_000):
                engine.step(5)
                await asyncio.sleep(0)
                if engine.cancelled:
                    break
            assert len(engine.cancelled) == 1
            assert len((await eager).events) == 102
            lazy.close()
            metrics = (await client.get("/metrics")).body.decode()
            assert 'octavo:streams_shed_total{engine="0",model_name="fake/bytes"} 1.0' in metrics

    asyncio.run(run())


def test_a_stalled_client_is_cut_off_in_time_even_when_its_stream_is_over() -> None:
    async def run() -> None:
        engine = FakeEngine(max_model_len=10**6, answer=lambda ids, index: b"x" * 3000)
        async with serving(engine, stream_stall_s=0.05, stream_buffer_bytes=8 * 1024 * 1024) as client:
            lazy = socket.socket()
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(lazy, ("127.0.0.1", client.server.port))
            await loop.sock_sendall(lazy, http_post("/v1/chat/completions", {**CHAT, "max_tokens": None, "n": 8}))
            await wait(engine.was_submitted)
            await asyncio.wait_for(client.server.drain(), TIMEOUT_S)  # returns, so the stream is not open for ever
            lazy.close()

    asyncio.run(run())


def test_resets_leave_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            for _ in range(20):
                reader, writer = await client.connect(http_post("/v1/chat/completions", CHAT))
                await wait(engine.was_submitted)
                engine.step(2)
                await asyncio.wait_for(reader.readuntil(b"\n\n"), TIMEOUT_S)
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                engine.step(2)
                await wait(engine.was_cancelled)

    asyncio.run(run())
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err


@pytest.mark.parametrize("is_held", [False, True])
def test_a_client_that_is_gone_before_its_headers_is_not_a_crash(is_held: bool, tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        journal = str(tmp_path / "journal") if is_held else ""
        async with serving(engine, log_requests=True, stream_journal=journal) as client:
            _reader, writer = await client.connect(http_post("/v1/chat/completions", CHAT))
            await wait(engine.was_submitted)
            (connection,) = client.server._runner.server.connections
            assert connection.transport is not None
            # The first token wakes the handler, which opens the response before the loop can tell it that nobody is
            # there: `abort` puts `connection_lost` behind the handler in the loop's queue.
            engine.step(1)
            connection.transport.abort()
            if not is_held:  # one that is held goes on: its client may know its id
                await wait(engine.was_cancelled)
            assert (await client.get("/live")).status == 200
            writer.close()

    with capture_logs() as logged:
        asyncio.run(run())
    assert [(entry["event"], entry["log_level"]) for entry in logged if entry["log_level"] != "info"] == []
    assert [entry["status"] for entry in logged if entry["event"] == "request.finished"] == [499]


def test_when_the_queue_is_full_clients_are_told_when_to_come_back() -> None:
    async def run() -> None:
        async with serving(FakeEngine(max_live=1)) as client:
            answer = await client.chat(n=2)
            assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (429, "queue_full", "3")
            assert (await client.chat()).status == 200

    asyncio.run(run())


def test_a_drain_refuses_new_work_in_words_and_lets_open_streams_end() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine) as client:
            # The second connection is open before the drain: it must be told, not dropped.
            assert (await client.get("/ready")).status == 200
            streams = [asyncio.ensure_future(client.raw(http_post("/v1/chat/completions", CHAT))) for _ in range(50)]
            async with asyncio.timeout(TIMEOUT_S):
                while engine.num_live < len(streams):
                    await wait(engine.was_submitted)
            engine.step(2)
            draining = asyncio.ensure_future(client.server.drain())
            await asyncio.sleep(0)
            assert (await client.get("/ready")).status == 503
            assert (await client.get("/live")).status == 200
            for refused in (
                await client.chat(),
                await client.complete(stream=True),
                # A new connection is taken, too: "refused" would not say when to come back.
                await client.complete(),
            ):
                assert (refused.status, refused.error["code"]) == (503, "engine_closed")
                assert "Retry-After" in refused.headers and refused.headers["Connection"] == "close"
            assert not draining.done()
            engine.step(400)
            for stream in streams:
                assert (await stream).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            await asyncio.wait_for(draining, TIMEOUT_S)
            with pytest.raises(OSError, match=r"."):
                await asyncio.open_connection("127.0.0.1", client.server.port)

    asyncio.run(run())


def test_what_is_open_at_the_end_of_a_drain_is_ended_in_words() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine, shutdown_timeout_s=0.0) as client:
            begun = asyncio.ensure_future(client.raw(http_post("/v1/chat/completions", CHAT)))
            await wait(engine.was_submitted)
            engine.step(3)
            reader, writer = await client.connect(http_post("/v1/completions", {"prompt": "x", "stream": True}))
            await wait(engine.was_submitted)
            engine.step(1)
            await asyncio.wait_for(reader.readuntil(b"\n\n"), TIMEOUT_S)
            silent = asyncio.ensure_future(client.complete(stream=True))  # has not had a token
            whole = asyncio.ensure_future(client.chat())
            async with asyncio.timeout(TIMEOUT_S):
                while engine.num_live < 4:
                    await wait(engine.was_submitted)
            await asyncio.wait_for(client.server.drain(), TIMEOUT_S)
            for body in (await begun, await asyncio.wait_for(reader.read(), TIMEOUT_S)):
                assert body.count(b'"code":"server_shutdown"') == 1
                assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            for answer in (await silent, await whole):
                assert (answer.status, answer.error["code"]) == (503, "server_shutdown")
                assert "Retry-After" in answer.headers
            assert engine.num_live == 0
            writer.close()

    asyncio.run(run())


@pytest.fixture
def heeds_hangup() -> Iterator[None]:
    """SIGHUP as a shell leaves it, though these tests may run under `nohup`, which has it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_f_54_a_signal_to_end_lets_open_responses_end_before_serve_returns(number: signal.Signals) -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        serving_task = asyncio.ensure_future(
            serve_http(engine, ServerSettings(log_requests=False), port=0, on_listening=listening.set_result)
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", await listening)
        writer.write(http_post("/v1/chat/completions", CHAT))
        await wait(engine.was_submitted)
        engine.step(2)
        await asyncio.wait_for(reader.readuntil(b"\n\n"), TIMEOUT_S)
        os.kill(os.getpid(), number)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(serving_task), 0.05)
        engine.step(400)
        rest = await asyncio.wait_for(reader.read(), TIMEOUT_S)
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()
        await asyncio.wait_for(serving_task, TIMEOUT_S)

    asyncio.run(run())


def test_f_54_a_server_that_was_started_to_outlive_its_terminal_does() -> None:
    async def run() -> None:
        engine = FakeEngine()
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        serving_task = asyncio.ensure_future(
            serve_http(engine, ServerSettings(log_requests=False), port=0, stop=stop, on_listening=listening.set_result)
        )
        port = await listening
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(http_post("/v1/chat/completions", CHAT))
        assert (await asyncio.wait_for(reader.read(), TIMEOUT_S)).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        writer.close()
        stop.set()
        await asyncio.wait_for(serving_task, TIMEOUT_S)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_f_61_however_many_probes_come_none_is_work_and_all_are_answered_while_the_engine_stands_still() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True, max_live=1)
        async with serving(engine, stall_s=0.0) as client:
            stream = asyncio.ensure_future(client.chat(stream=True, max_tokens=3))
            await wait(engine.was_submitted)
            async with asyncio.timeout(TIMEOUT_S):
                while (await client.get("/ready")).status == 200:
                    pass
                paths = ("/health", "/ready", "/live", "/metrics", "/load", "/v1/models")
                answers = await asyncio.gather(*(client.get(paths[number % len(paths)]) for number in range(300)))
            assert [answer.status for answer in answers[: len(paths)]] == [503, 503, 200, 200, 200, 200]
            for number, answer in enumerate(answers):
                assert answer.status == answers[number % len(paths)].status
            assert (len(engine.submitted), engine.num_live) == (1, 1)
            assert client.server.num_admitted == 1
            engine.step(100)
            assert (await stream).status == 200
            assert (await client.get("/ready")).status == 200

    asyncio.run(run())


def test_a_second_signal_ends_open_responses_at_once() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        serving_task = asyncio.ensure_future(
            serve_http(engine, ServerSettings(log_requests=False), port=0, on_listening=listening.set_result)
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", await listening)
        writer.write(http_post("/v1/chat/completions", CHAT))
        await wait(engine.was_submitted)
        engine.step(2)
        await asyncio.wait_for(reader.readuntil(b"\n\n"), TIMEOUT_S)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(serving_task, TIMEOUT_S)
        assert engine.num_live == 0
        assert b'"code":"server_shutdown"' in await asyncio.wait_for(reader.read(), TIMEOUT_S)
        writer.close()

    asyncio.run(run())


def test_silence_on_a_stream_is_filled_with_comments_if_asked_for() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        async with serving(engine, sse_keep_alive_s=0.01) as client:
            reader, writer = await client.connect(http_post("/v1/chat/completions", {**CHAT, "max_tokens": 5}))
            await wait(engine.was_submitted)
            engine.step(1)
            await asyncio.wait_for(reader.readuntil(b": keep-alive\n\n"), TIMEOUT_S)
            engine.step(10)
            assert b"[DONE]" in await asyncio.wait_for(reader.read(), TIMEOUT_S)
            writer.close()

    asyncio.run(run())


def test_the_description_names_every_route_and_is_valid_json() -> None:
    async def run() -> None:
        async with serving() as client:
            document = (await client.get("/openapi.json")).json
            assert document["openapi"] == "3.1.0"
            assert {"/v1/completions", "/v1/chat/completions", "/v1/models/{model}", "/tokenize"} <= set(
                document["paths"]
            )
            body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
            reference = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            schema = document["components"]["schemas"][reference]
            assert "messages" in schema["required"] and "temperature" in schema["properties"]

    asyncio.run(run())


def test_the_page_needs_nothing_from_elsewhere() -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.get("/")
            assert answer.headers["Content-Type"].startswith("text/html")
            page = answer.body.decode()
            assert 'fetch("v1/chat/completions"' in page
            assert "http://" not in page and "https://" not in page

    asyncio.run(run())


@pytest.mark.skipif(shutil.which("node") is None, reason="the page's script needs an interpreter")
@pytest.mark.parametrize("is_held", [False, True])
def test_the_page_reads_a_stream_with_and_without_ids(is_held: bool, tmp_path: Path) -> None:
    async def run() -> None:
        journal = str(tmp_path) if is_held else ""
        async with serving(FakeEngine(answer=lambda ids, index: "a\nbü".encode()), stream_journal=journal) as client:
            page = (await client.get("/")).body.decode()
            function = page[page.index("async function* events") : page.index("// What a field says")]
            body = (await client.chat(stream=True)).body
            assert body.startswith(b"id: ") == is_held
        script = (
            f"{function}\n(async () => {{ let text = '';"
            "for await (const event of events(new Blob([require('fs').readFileSync(0)]).stream()))"
            " text += event.choices[0].delta.content ?? ''; process.stdout.write(text); })()"
        )
        node = await asyncio.create_subprocess_exec("node", "-e", script, stdin=PIPE, stdout=PIPE, stderr=PIPE)
        assert await asyncio.wait_for(node.communicate(body), TIMEOUT_S) == ("a\nbü".encode(), b"")

    asyncio.run(run())


def test_metrics_count_what_happened_and_their_labels_do_not_grow_with_what_clients_send() -> None:
    async def run() -> None:
        async with serving(FakeEngine(answer=lambda ids, index: b"abc")) as client:
            await client.chat(n=2)
            await client.complete(stream=True)
            first = (await client.get("/metrics")).body.decode()
            labels = '{engine="0",finished_reason="stop",model_name="fake/bytes"}'
            assert f"vllm:request_success_total{labels} 3.0" in first
            one = '{engine="0",model_name="fake/bytes"}'
            assert f"vllm:time_to_first_token_seconds_count{one} 3.0" in first
            assert f"vllm:inter_token_latency_seconds_count{one} 9.0" in first
            assert f"vllm:generation_tokens_total{one} 12.0" in first
            assert f"vllm:request_max_num_generation_tokens_count{one} 2.0" in first  # of a request, whatever its n
            assert f"vllm:request_max_num_generation_tokens_sum{one} 8.0" in first
            assert f"vllm:request_prefill_kv_computed_tokens_count{one} 3.0" in first
            assert 'http_request_size_bytes_count{handler="/v1/completions"} 1.0' in first
            assert 'http_response_size_bytes_sum{handler="/v1/completions"} 0.0' in first  # a stream announces no size
            assert "\nprocess_resident_memory_bytes " in first and "\npython_info" in first
            assert f"vllm:e2e_request_latency_seconds_count{one} 3.0" in first
            assert "_created" not in first  # vLLM's have none
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"):
                assert f"vllm:{name}{one} 0.0" in first
            await client.request("PATCH", "/v1/completions")
            await client.get("/nope")
            series = len((await client.get("/metrics")).body.splitlines())
            for index in range(20):
                await client.request(("PROPFIND", "PUT", "DELETE")[index % 3], "/v1/completions")
                await client.get(f"/nope{index}")
            assert len((await client.get("/metrics")).body.splitlines()) == series

    asyncio.run(run())


def test_json_errors_of_the_server_itself_tell_nothing_of_its_inside() -> None:
    async def run() -> None:
        engine = FakeEngine()

        def broken(*args: object, **kwargs: object) -> None:
            raise RuntimeError("secret at 0x7f")

        engine.submit = broken  # type: ignore[method-assign,assignment]  # a defect, for once on purpose
        async with serving(engine) as client:
            answer = await client.complete()
            assert (answer.status, answer.error["code"]) == (500, "internal_error")
            assert b"secret" not in answer.body
            assert json.loads(answer.body)["error"]["type"] == "server_error"

    asyncio.run(run())
