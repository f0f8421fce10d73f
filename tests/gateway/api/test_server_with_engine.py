"""The same server in front of the real engine and the model that is shipped."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import openai
from http_client import Client, http_post, serving

from octavo.gateway.engine import Engine

ASKED: list[Any] = [{"role": "user", "content": "What is a list?"}]


async def _ready_engine(engine: Engine) -> None:
    while not engine.is_ready:
        await asyncio.sleep(0.01)


async def _free(engine: Engine) -> None:
    while engine.stats().num_live or engine.stats().num_running or engine.stats().num_waiting:
        await asyncio.sleep(0.01)


async def check_streams(client: Client, api: openai.AsyncOpenAI) -> None:
    whole = await api.chat.completions.create(
        model="leaf", messages=ASKED, max_tokens=24, temperature=0, n=2, logprobs=True, top_logprobs=2
    )
    stream = await api.chat.completions.create(
        model="leaf",
        messages=ASKED,
        max_tokens=24,
        temperature=0,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, usage = ["", ""], None
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and texts[0]
    assert usage is not None and whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


async def check_scores(client: Client) -> None:
    text = "The quick brown fox"
    tokens = (await client.post("/tokenize", {"prompt": text})).json["tokens"]
    answer = (await client.complete(prompt=text, echo=True, max_tokens=0, logprobs=1)).json
    choice = answer["choices"][0]
    assert choice["text"] == text and answer["usage"]["completion_tokens"] == 0
    starts = [*choice["logprobs"]["text_offset"], len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(starts)]
    assert pieces == choice["logprobs"]["tokens"] and len(pieces) == len(tokens)
    longer = (
        await client.complete(prompt=text, echo=True, max_tokens=4, logprobs=1, temperature=0, stream=True)
    ).events
    offsets = [offset for event in longer for offset in event["choices"][0]["logprobs"]["text_offset"]]
    spoken = "".join(event["choices"][0]["text"] for event in longer)
    named = [token for event in longer for token in event["choices"][0]["logprobs"]["tokens"]]
    assert [spoken[start : start + len(token)] for start, token in zip(offsets, named, strict=True)] == named


async def check_disconnect(client: Client, engine: Engine) -> None:
    body = {"messages": ASKED, "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 4}
    reader, writer = await client.connect(http_post("/v1/chat/completions", body))
    await asyncio.wait_for(reader.readuntil(b"\n\n"), 180)
    writer.transport.abort()
    await asyncio.wait_for(_free(engine), 180)


async def check_edges_of_sampling(client: Client) -> None:
    """What a client may ask for at the edge of its range gives numbers that a token can be chosen by."""
    for temperature in (0, 1.1e-5, 2):
        for fields in (
            {"repetition_penalty": 1e-4},
            {"repetition_penalty": 10},
            {"presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 1e-4},
            {"logit_bias": {str(token_id): 1000 for token_id in range(1000)}, "top_p": 1e-300},
            {"logit_bias": {str(token_id): -1000 for token_id in range(1000)}, "min_p": 1},
            {"allowed_token_ids": [300], "ignore_eos": True, "top_k": 1},
        ):
            answer = await client.complete(temperature=temperature, max_tokens=4, seed=-5, **fields)
            assert answer.status == 200, (fields, answer.body)
    for fields in (
        {"repetition_penalty": 1e-38},
        {"allowed_token_ids": [2], "min_tokens": 1},
        {"allowed_token_ids": [300], "stop_token_ids": [300], "min_tokens": 1},
    ):
        answer = await client.complete(**fields)
        assert answer.status == 400 and answer.error["param"] == next(iter(fields)), answer.body


async def check_refusals(client: Client) -> None:
    for stream in (False, True):
        answer = await client.complete(prompt="word " * 2000, stream=stream)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert answer.error["param"] == "prompt"
        answer = await client.chat(messages=[{"role": "user", "content": "x " * 2000}], max_tokens=None, stream=stream)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert answer.error["param"] == "messages"


def test_the_shipped_model_is_served() -> None:
    async def run() -> None:
        async with Engine(served_model_names=("leaf",), max_model_len=256, num_blocks=256) as engine:
            await asyncio.wait_for(_ready_engine(engine), 300)
            async with serving(engine) as client:
                async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as api:
                    await check_streams(client, api)
                await check_scores(client)
                await check_edges_of_sampling(client)
                await check_refusals(client)
                await check_disconnect(client, engine)
                await asyncio.wait_for(client.server.drain(), 180)

    asyncio.run(run())
