"""`octavo bench serve`: streams against a running server; figures as vLLM's benchmark prints them."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time

import aiohttp
import msgspec
from tqdm import tqdm

from ..messages.errors import OctavoError
from .latency import RequestTiming, print_report, summarise, write_json


def bench_serve(arguments: argparse.Namespace) -> int:
    """Send the workload, print the table; returns 1 if any request failed."""
    return asyncio.run(_bench(arguments))


async def _bench(arguments: argparse.Namespace) -> int:
    chance = random.Random(arguments.workload_seed)  # noqa: S311  # a workload, not a secret
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    base = arguments.base_url.rstrip("/").removesuffix("/v1")
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(base, headers=headers, connector=connector, timeout=timeout) as session:
        model, vocab_size = await _served_model(session, arguments.model)
        seats = asyncio.Semaphore(arguments.max_concurrency)
        bodies = [
            msgspec.json.encode(
                {
                    "model": model,
                    "prompt": [chance.randrange(vocab_size) for _ in range(arguments.input_len)],
                    "max_tokens": arguments.output_len,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            )
            for _ in range(arguments.num_prompts)
        ]
        started = time.perf_counter()
        with tqdm(total=len(bodies), desc="requests", unit="req") as bar:
            tasks = []
            for body in bodies:
                tasks.append(asyncio.create_task(_stream_one(session, body, seats, bar)))
                if math.isfinite(arguments.request_rate):
                    await asyncio.sleep(chance.expovariate(arguments.request_rate))
            results = await asyncio.gather(*tasks)
        duration_s = time.perf_counter() - started
    timings = [result for result in results if isinstance(result, RequestTiming)]
    failures = [result for result in results if isinstance(result, str)]
    report = summarise(timings, num_failed=len(failures), duration_s=duration_s)
    print_report(report, f"octavo bench serve: {model}, {arguments.input_len} in, {arguments.output_len} out")
    if failures:
        print(f"first failure: {failures[0]}")
    write_json(report, arguments.json)
    return int(bool(failures))


async def _served_model(session: aiohttp.ClientSession, wanted: str | None) -> tuple[str, int]:
    """Name to ask for, and a vocabulary size that prompts of random ids may use."""
    try:
        async with session.get("/v1/models") as response:
            if response.status != 200:
                raise OctavoError(
                    f"the server answered {response.status} to /v1/models: {(await response.text())[:200]}"
                )
            models = msgspec.json.decode(await response.read())
    except aiohttp.ClientError as error:
        raise OctavoError(f"no server answers at this --base-url ({error}): start one with `octavo serve`") from error
    name = wanted or models["data"][0]["id"]
    async with session.post("/tokenize", json={"model": name, "prompt": "The quick brown fox"}) as response:
        tokens = msgspec.json.decode(await response.read()).get("tokens", [100])
    return name, max(256, *tokens)


async def _stream_one(
    session: aiohttp.ClientSession, body: bytes, seats: asyncio.Semaphore, bar: tqdm
) -> RequestTiming | str:
    async with seats:
        sent = time.perf_counter()
        times: list[float] = []
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        try:
            async with session.post(
                "/v1/completions", data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status != 200:
                    return f"{response.status}: {(await response.text())[:200]}"
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = msgspec.json.decode(line[6:])
                    if "error" in event:
                        return str(event["error"])
                    if event.get("usage"):
                        usage = event["usage"]
                    if event["choices"]:
                        times.append(time.perf_counter())
        except aiohttp.ClientError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            bar.update(1)
        if not times:
            return "the stream ended without a token"
        return RequestTiming(sent, tuple(times), usage["prompt_tokens"], usage["completion_tokens"])
