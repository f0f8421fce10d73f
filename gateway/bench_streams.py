"""What a stream costs the gateway: microseconds of CPU for each token, kilobytes for each open response.

    python -m octavo.gateway.bench_streams --streams 2000 --tokens 50
    python -m octavo.gateway.bench_streams --streams 10000 --tokens 20 --interval-ms 1000

Server and clients are two processes. The engine gives every stream a token at each step and costs nothing else, unless
`--model` names a real one; its microsecond is in the figures.

What is whose: `us_per_token` is all CPU time of the server's thread; `us_per_token_ours` and `us_per_token_kernel` are
its user and system time as the kernel samples them at its tick. The kernel's is one `send` of a small packet for each
token of each stream, on one host with its delivery to the client. `us_per_token_floor` is all CPU time of the least
that could be done on the same event loop, measured in the same run: the same packets, made beforehand, to as many
sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from ..messages.errors import InvalidRequestError
from ..messages.ids import RequestId
from ..messages.request import ChatPrompt, PromptReady, RequestEnded, TextDelta
from ..messages.sampling import SamplingParams
from .api.engine_protocol import EngineLike, Sink
from .api.server import start_http
from .api.settings import ServerSettings
from .config import EngineConfig
from .generation_config import RequestDefaults
from .stats import EngineStats

WORD = " token"


class _Sequence:
    """A sequence of the paced engine."""

    __slots__ = ("num_left", "request_id", "sink")

    def __init__(self, request_id: RequestId, sink: Sink, num_left: int) -> None:
        self.request_id = request_id
        self.sink = sink
        self.num_left = num_left


class PacedEngine:
    """Gives one token to every live sequence each time it is told to."""

    def __init__(self) -> None:
        self.config = EngineConfig(max_num_queued_requests=1_000_000)
        self.model_name = "paced"
        self.max_model_len = 1_000_000
        self.vocab_size = 1000
        self.created = int(time.time())
        self.num_blocks = 1
        self.request_defaults = RequestDefaults()
        self.is_ready = True
        self.why_not_ready = ""
        self.is_broken = False
        self.special_token_ids: frozenset[int] = frozenset()
        self.num_cancelled = 0
        self._live: dict[RequestId, _Sequence] = {}
        self._next_id = 0

    @property
    def num_live(self) -> int:
        return len(self._live)

    def submit(
        self,
        prompt: str | Sequence[int] | ChatPrompt,
        params: SamplingParams,
        sink: Sink,
        *,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int = 0,
        timeout_s: float | None = None,
    ) -> tuple[RequestId, ...]:
        """Answers come from `step`; the prompt and the options make no difference."""
        ids = tuple(RequestId(self._next_id + index) for index in range(params.n))
        self._next_id += params.n
        sink(PromptReady(ids, (1,), params))
        for request_id in ids:
            self._live[request_id] = _Sequence(request_id, sink, params.max_tokens or 1)
        return ids

    def step(self) -> None:
        """One token for everybody."""
        for sequence in list(self._live.values()):
            request_id = sequence.request_id
            sequence.num_left -= 1
            if sequence.num_left:
                sequence.sink(TextDelta(request_id, WORD, (1,)))
            elif self._live.pop(request_id, None) is not None:
                ended = RequestEnded(request_id, "length", num_output_tokens=1)
                sequence.sink(TextDelta(request_id, WORD, (1,), finish_reason="length", ended=ended))

    def cancel(self, request_id: RequestId) -> None:
        if self._live.pop(request_id, None) is not None:
            self.num_cancelled += 1

    async def tokenize(self, prompt: str | ChatPrompt, add_special_tokens: bool = True) -> list[int]:
        return [1]

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        if any(not 0 <= token_id < self.vocab_size for token_id in token_ids):
            raise InvalidRequestError("token id outside the vocabulary", param="tokens")
        return WORD * len(token_ids)

    def token_text(self, token_id: int) -> str:
        return WORD

    def token_bytes(self, token_id: int) -> bytes:
        return WORD.encode()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._live),
            num_waiting=0,
            num_live=len(self._live),
            kv_cache_usage=0.0,
            num_preemptions=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prompt_tokens=0,
            generation_tokens=0,
            num_steps=0,
            num_dropped_messages=0,
        )

    async def drain(self) -> None:
        self._live.clear()


def make_event() -> bytes:
    """An event of one token as `/v1/completions` sends it, in HTTP's chunked coding."""
    event = (
        b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
        b'"model":"paced","choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null,'
        b'"stop_reason":null}]}\n\n'
    )
    return b"%x\r\n%b\r\n" % (len(event), event)


class _BareStream(asyncio.Protocol):
    """Answers any request with the head of a response, and leaves the rest to `measure_floor`."""

    def __init__(self, is_open: Callable[[asyncio.Transport], None]) -> None:
        self._is_open = is_open
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self._is_open(self._transport)
            self._transport = None  # the request may come in two pieces


async def measure_floor(num_streams: int, num_tokens: int, interval_s: float) -> float:
    """CPU microseconds a token where nothing is done but to write ready bytes to every socket."""
    transports: list[asyncio.Transport] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _BareStream(transports.append), "127.0.0.1", 0)
    clients = await _start_clients(server.sockets[0].getsockname()[1], num_streams, num_tokens)
    while len(transports) < num_streams:
        await asyncio.sleep(0.01)
    event = make_event()
    started = time.thread_time()
    for _ in range(num_tokens):
        begun = time.perf_counter()
        for transport in transports:
            transport.write(event)
        await asyncio.sleep(max(0.0, interval_s - (time.perf_counter() - begun)))
    spent = time.thread_time() - started
    for transport in transports:
        transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        transport.close()
    await clients.communicate()
    server.close()
    return spent / (num_streams * num_tokens) * 1e6


async def measure_paced(num_streams: int, num_tokens: int, interval_s: float) -> dict[str, Any]:
    """Serve `num_streams` clients of another process a token each per step; all start before the first."""
    engine = PacedEngine()
    server = await start_http(engine, _settings())
    process = psutil.Process()
    memory_before = process.memory_info().rss
    clients = await _start_clients(server.port, num_streams, num_tokens)
    while engine.num_live < num_streams:
        await asyncio.sleep(0.01)
    engine.step()
    while server.num_open_streams < num_streams:
        await asyncio.sleep(0.01)
    memory_open = process.memory_info().rss
    step_seconds = []
    wall, thread, cpu = time.perf_counter(), time.thread_time(), process.cpu_times()
    for _ in range(num_tokens - 2):
        begun = time.perf_counter()
        engine.step()
        await asyncio.sleep(0)  # the pump writes in this turn of the loop
        step_seconds.append(time.perf_counter() - begun)
        await asyncio.sleep(max(0.0, interval_s - step_seconds[-1]))
    wall, thread, cpu_after = time.perf_counter() - wall, time.thread_time() - thread, process.cpu_times()
    engine.step()
    received = json.loads((await clients.communicate())[0])
    await server.close()
    num_measured = num_streams * (num_tokens - 2)
    step_seconds.sort()
    return {
        **received,
        "cancelled": engine.num_cancelled,
        "us_per_token": round(thread / num_measured * 1e6, 2),
        "us_per_token_floor": round(await measure_floor(num_streams, num_tokens, interval_s), 2),
        "us_per_token_ours": round((cpu_after.user - cpu.user) / num_measured * 1e6, 2),
        "us_per_token_kernel": round((cpu_after.system - cpu.system) / num_measured * 1e6, 2),
        "tokens_per_s": round(num_measured / wall),
        "ms_per_step_median": round(step_seconds[len(step_seconds) // 2] * 1e3, 2),
        "kib_per_stream": round((memory_open - memory_before) / num_streams / 1024, 1),
    }


async def measure_model(model: str | None, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """The same clients against a real engine; its own work is in the numbers."""
    from .engine import Engine

    async with Engine(model) as engine:
        while not engine.is_ready:  # readiness is a state, there is nothing to wait on
            await asyncio.sleep(0.01)
        real: EngineLike = engine
        server = await start_http(real, _settings())
        process = psutil.Process()
        memory_before = process.memory_info().rss
        wall = time.perf_counter()
        clients = await _start_clients(server.port, num_streams, num_tokens)
        answered = asyncio.ensure_future(clients.communicate())
        most_memory = most_open = 0
        while not answered.done():
            most_open = max(most_open, server.num_open_streams)
            most_memory = max(most_memory, process.memory_info().rss)
            await asyncio.wait([answered], timeout=0.05)
        wall = time.perf_counter() - wall
        received = json.loads((await answered)[0])
        await server.close()
    return {
        **received,
        "open_at_once": most_open,
        "tokens_per_s": round(num_streams * num_tokens / wall),
        "kib_per_stream": round((most_memory - memory_before) / num_streams / 1024, 1),
    }


def _settings() -> ServerSettings:
    # All clients are one address, and connect before any of them is served.
    return ServerSettings(log_requests=False, header_timeout_s=300.0, max_connections=0, max_connections_per_client=0)


async def _start_clients(port: int, num_streams: int, num_tokens: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __spec__.name if __spec__ else __name__, "--connect", str(port)),
        *("--streams", str(num_streams), "--tokens", str(num_tokens)),
        stdout=asyncio.subprocess.PIPE,
    )


async def run_clients(port: int, num_streams: int, num_tokens: int) -> dict[str, Any]:
    """Open all streams, read each to its end, and tell what arrived."""
    body = json.dumps({"prompt": "x", "max_tokens": num_tokens, "stream": True, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    loop = asyncio.get_running_loop()
    opening = asyncio.Semaphore(200)

    async def one() -> tuple[bool, int]:
        done: asyncio.Future[tuple[bool, int]] = loop.create_future()
        async with opening:
            transport, _ = await loop.create_connection(lambda: _Reader(done.set_result), "127.0.0.1", port)
        transport.write(request)
        return await done

    results = await asyncio.gather(*(one() for _ in range(num_streams)))
    return {
        "streams": num_streams,
        "lost": sum(not is_whole for is_whole, _ in results),
        "events": sum(count for _, count in results),
    }


class _Reader(asyncio.Protocol):
    """Counts a stream's events, and keeps nothing else of it."""

    def __init__(self, done: Callable[[tuple[bool, int]], None]) -> None:
        self._done = done
        self._num_events = 0
        self._tail = b""

    def data_received(self, data: bytes) -> None:
        self._num_events += (self._tail[-8:] + data).count(b"data: {") - self._tail[-8:].count(b"data: {")
        self._tail = (self._tail + data)[-64:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._done((b"data: [DONE]\n\n" in self._tail, self._num_events))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=50, help="tokens of each stream, at least 3")
    parser.add_argument("--interval-ms", type=float, default=20.0, help="time between two steps of the paced engine")
    parser.add_argument("--model", nargs="?", const="", help="a real engine; without a name the model that is shipped")
    parser.add_argument("--connect", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.tokens < 3 or options.streams < 1:
        parser.error("at least 1 stream of 3 tokens is needed")
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    if options.connect is not None:
        work = run_clients(options.connect, options.streams, options.tokens)
    elif options.model is not None:
        work = measure_model(options.model or None, options.streams, options.tokens)
    else:
        work = measure_paced(options.streams, options.tokens, options.interval_ms / 1e3)
    print(json.dumps(asyncio.run(work)))


if __name__ == "__main__":
    main()
