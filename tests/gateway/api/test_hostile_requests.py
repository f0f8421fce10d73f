"""Nothing that a client sends gives a 5xx, or an error in another shape; and the next request is served."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from http_client import Client, http_post, serving

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"prompt": "x", "max_tokens": 2}


def chat(**fields: Any) -> tuple[str, bytes]:
    return "/v1/chat/completions", json.dumps({**CHAT, **fields}).encode()


def text(**fields: Any) -> tuple[str, bytes]:
    return "/v1/completions", json.dumps({**TEXT, **fields}).encode()


def raw(body: bytes) -> tuple[str, bytes]:
    return "/v1/chat/completions", body


def with_raw(name: bytes, value: bytes) -> tuple[str, bytes]:
    return raw(b'{"messages":[{"role":"user","content":"x"}],"' + name + b'":' + value + b"}")


HOSTILE = {
    "empty body": (*raw(b""), None),
    "null": (*raw(b"null"), None),
    "list": (*raw(b"[]"), None),
    "string": (*raw(b'"x"'), None),
    "number": (*raw(b"1"), None),
    "truncated": (*raw(b'{"messages": [{"role"'), None),
    "trailing garbage": (*raw(json.dumps(CHAT).encode() + b"x"), None),
    "two documents": (*raw(json.dumps(CHAT).encode() * 2), None),
    "byte order mark": (*raw(b"\xef\xbb\xbf" + json.dumps(CHAT).encode()), None),
    "utf-16": (*raw(json.dumps(CHAT).encode("utf-16")), None),
    "invalid utf-8": (*raw(b'{"messages":[{"role":"user","content":"\xff"}]}'), None),
    "invalid utf-8 in an ignored field": (*with_raw(b"metadata", b'"\xff"'), None),
    "overlong utf-8": (*with_raw(b"user", b'"\xc0\xaf"'), None),
    "surrogate bytes": (*with_raw(b"user", b'"\xed\xa0\x80"'), None),
    "lone surrogate": (*raw(b'{"messages":[{"role":"user","content":"\\ud800"}]}'), None),
    "reversed surrogates": (*raw(b'{"messages":[{"role":"user","content":"\\udc00\\ud800"}]}'), None),
    "deep nesting in a known field": (*raw(b'{"messages":' + b"[" * 30_000), "messages[0]"),
    "deeper nesting in a known field": (*raw(b'{"messages":' + b"[" * 100_000), None),
    "deep nesting in an ignored field": (*with_raw(b"metadata", b"[" * 100_000 + b"]" * 100_000), None),
    "deep nesting in an unknown field": (*with_raw(b"zzz", b"[" * 30_000 + b"]" * 30_000), "zzz"),
    "deeper nesting in an unknown field": (*with_raw(b"zzz", b"[" * 100_000 + b"]" * 100_000), None),
    "many unknown fields": (*raw(b"{" + b",".join(b'"k%d":1' % i for i in range(20_000)) + b"}"), "k0"),
    "a million unknown fields": (*raw(b"{" + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}"), None),
    "a million lists": (*text(prompt=[[]] * 1_000_000), None),
    "a million objects in an ignored field": (*chat(metadata=[{}] * 1_000_000), None),
    "an option twice": (*with_raw(b"stream_options", b'{"include_usage":true,"include_usage":true}'), "stream_options"),
    "a role twice": (*raw(b'{"messages":[{"role":"user","content":"a","role":"system"}]}'), "messages"),
    "a template variable twice": (*with_raw(b"chat_template_kwargs", b'{"a":1,"\\u0061":2}'), "chat_template_kwargs"),
    "a name twice in an ignored field": (*with_raw(b"metadata", b'{"a":[{"b":1,"b":2}]}'), "metadata"),
    "1e400 in an ignored field": (*with_raw(b"metadata", b'{"a":1e400}'), "metadata"),
    "a field twice": (*with_raw(b"stream", b'true,"stream":false'), None),
    "a field twice, escaped": (*with_raw(b"stream", b'true,"str\\u0065am":false'), None),
    "NaN": (*with_raw(b"temperature", b"NaN"), None),
    "Infinity": (*with_raw(b"temperature", b"-Infinity"), None),
    "1e400": (*with_raw(b"temperature", b"1e400"), "temperature"),
    "number as string": (*chat(temperature="1"), "temperature"),
    "bool as int": (*chat(n=True), "n"),
    "float as int": (*chat(n=1.0), "n"),
    "int as bool": (*chat(stream=1), "stream"),
    "string as bool": (*chat(stream="true"), "stream"),
    "integer of a million digits": (*with_raw(b"n", b"9" * 1_000_000), "n"),
    "n of 2**70": (*chat(n=2**70), "n"),
    "n of 0": (*chat(n=0), "n"),
    "n below 0": (*chat(n=-1), "n"),
    "n above the cap": (*chat(n=17), "n"),
    "n of a million": (*chat(n=1_000_000), "n"),
    "best_of": (*text(best_of=2), "best_of"),
    "beam search": (*chat(use_beam_search=True), "use_beam_search"),
    "suffix": (*text(suffix="x"), "suffix"),
    "misspelt parameter": (*chat(max_token=5), "max_token"),
    "unknown parameter": (*chat(zzz=5), "zzz"),
    "tools": (*chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    "tool_choice": (*chat(tool_choice="required"), "tool_choice"),
    "json schema": (*chat(response_format={"type": "json_schema", "json_schema": {"$ref": "#"}}), "response_format"),
    "response_format of another type": (*chat(response_format=[]), "response_format"),
    "chat_template": (*chat(chat_template="{{ 1 }}"), "chat_template"),
    "reserved template variable": (*chat(chat_template_kwargs={"tokenize": False}), "chat_template_kwargs"),
    "private template variable": (*chat(chat_template_kwargs={"__class__": 1}), "chat_template_kwargs"),
    "nested template variable": (*chat(chat_template_kwargs={"a": {}}), "chat_template_kwargs[...]"),
    "max_tokens of 0": (*chat(max_tokens=0), "max_tokens"),
    "max_tokens below 0": (*chat(max_tokens=-1), "max_tokens"),
    "max_tokens of 2**31": (*chat(max_tokens=2**31), "max_tokens"),
    "max_tokens past the context": (*chat(max_tokens=512), "max_tokens"),
    "max_completion_tokens of 0": (*chat(max_completion_tokens=0), "max_completion_tokens"),
    "min_tokens above max_tokens": (*chat(min_tokens=3), "min_tokens"),
    "min_tokens without max_tokens": (*chat(max_tokens=None, min_tokens=10**6), "min_tokens"),
    "negative temperature": (*chat(temperature=-0.1), "temperature"),
    "huge temperature": (*chat(temperature=1e300), "temperature"),
    "top_p of 0": (*chat(top_p=0), "top_p"),
    "top_p above 1": (*chat(top_p=1.1), "top_p"),
    "top_k below -1": (*chat(top_k=-2), "top_k"),
    "top_k of 2**40": (*chat(top_k=2**40), "top_k"),
    "min_p of 2": (*chat(min_p=2), "min_p"),
    "presence_penalty": (*chat(presence_penalty=1e9), "presence_penalty"),
    "frequency_penalty": (*chat(frequency_penalty=-2.1), "frequency_penalty"),
    "repetition_penalty of 0": (*chat(repetition_penalty=0), "repetition_penalty"),
    "repetition_penalty that divides by next to nothing": (*chat(repetition_penalty=1e-38), "repetition_penalty"),
    "seed below -2**63": (*chat(seed=-(2**63) - 1), "seed"),
    "seed of 2**64": (*chat(seed=2**64), "seed"),
    "seed as float": (*chat(seed=0.5), "seed"),
    "too many logprobs": (*text(logprobs=21), "logprobs"),
    "negative logprobs": (*text(logprobs=-1), "logprobs"),
    "too many top_logprobs": (*chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    "negative top_logprobs": (*chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
    "top_logprobs without logprobs": (*chat(top_logprobs=3), "top_logprobs"),
    "prompt_logprobs in a stream": (*chat(prompt_logprobs=1, stream=True), "prompt_logprobs"),
    "too many prompt_logprobs": (*chat(prompt_logprobs=10**6), "prompt_logprobs"),
    "logit_bias of a million": (*chat(logit_bias={str(i): 1 for i in range(100_000)}), "logit_bias"),
    "logit_bias of many": (*chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias"),
    "logit_bias key below 0": (*chat(logit_bias={"-1": 1}), "logit_bias"),
    "logit_bias key outside": (*chat(logit_bias={"260": 1}), "logit_bias"),
    "logit_bias key as float": (*chat(logit_bias={"1e3": 1}), "logit_bias"),
    "logit_bias key as text": (*chat(logit_bias={"x": 1}), "logit_bias"),
    "logit_bias key of other digits": (*chat(logit_bias={"²": 1}), "logit_bias"),
    "logit_bias key twice": (*with_raw(b"logit_bias", b'{"1": 1, "1": 2}'), "logit_bias"),
    "logit_bias key twice, in two ways": (*chat(logit_bias={"1": 1, "01": 2}), "logit_bias"),
    "logit_bias of null": (*chat(logit_bias={"1": None}), "logit_bias"),
    "logit_bias past every number": (*with_raw(b"logit_bias", b'{"1": 1e400}'), "logit_bias"),
    "logit_bias value as text": (*chat(logit_bias={"1": "NaN"}), "logit_bias"),
    "logit_bias as list": (*chat(logit_bias=[1]), "logit_bias"),
    "too many stops": (*chat(stop=["x"] * 17), "stop"),
    "a long stop": (*chat(stop="x" * 1025), "stop"),
    "an empty stop": (*chat(stop=[""]), "stop"),
    "a stop that is none": (*chat(stop=[1]), "stop[0]"),
    "stop_token_ids outside": (*chat(stop_token_ids=[260]), "stop_token_ids"),
    "stop_token_ids below 0": (*chat(stop_token_ids=[-1]), "stop_token_ids[0]"),
    "allowed_token_ids empty": (*chat(allowed_token_ids=[]), "allowed_token_ids"),
    "allowed_token_ids outside": (*chat(allowed_token_ids=[2**30]), "allowed_token_ids"),
    "bad_words blank": (*chat(bad_words=[" "]), "bad_words"),
    "truncate_prompt_tokens": (*chat(truncate_prompt_tokens=0), "truncate_prompt_tokens"),
    "priority": (*chat(priority=2**40), "priority"),
    "stream_options without stream": (*chat(stream_options={"include_usage": True}), "stream_options"),
    "unknown stream option": (*chat(stream=True, stream_options={"x": 1}), "stream_options.x"),
    "empty cache_salt": (*chat(cache_salt=""), "cache_salt"),
    "cache_salt with a slash": (*chat(cache_salt="a/b"), "cache_salt"),
    "cache_salt with NUL": (*chat(cache_salt="a\0"), "cache_salt"),
    "long cache_salt": (*chat(cache_salt="a" * 129), "cache_salt"),
    "request_id with a line end": (*chat(request_id="a\r\nx: y"), "request_id"),
    "user with NUL": (*chat(user="\0"), "user"),
    "model with NUL": (*chat(model="a\0"), "model"),
    "model of a megabyte": (*chat(model="a" * 1_000_000), "model"),
    "model of another type": (*chat(model=1), "model"),
    "no messages": (*raw(b"{}"), "messages"),
    "empty messages": (*chat(messages=[]), "messages"),
    "too many messages": (*chat(messages=[{"role": "user", "content": ""}] * 2049), "messages"),
    "message without role": (*chat(messages=[{"content": "x"}]), "messages[0].role"),
    "message without content": (*chat(messages=[{"role": "user"}]), "messages[0].content"),
    "unknown role": (*chat(messages=[{"role": "root", "content": "x"}]), "messages[0].role"),
    "tool result": (*chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].role"),
    "tool calls": (
        *chat(messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        "messages[0].tool_calls",
    ),
    "image": (
        *chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}]),
        "messages[0].content[0].type",
    ),
    "text part without text": (
        *chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
        "messages[0].content[0].text",
    ),
    "both prompt ends": (*chat(add_generation_prompt=True, continue_final_message=True), "continue_final_message"),
    "no prompt": (*text(prompt=None), "prompt"),
    "empty prompt": (*text(prompt=""), "prompt"),
    "empty prompt list": (*text(prompt=[]), "prompt"),
    "empty id list": (*text(prompt=[[]]), "prompt"),
    "a prompt among empty ones": (*text(prompt=["x", ""]), "prompt"),
    "mixed prompt": (*text(prompt=["x", 1]), "prompt"),
    "mixed id prompt": (*text(prompt=[1, "x"]), "prompt"),
    "prompt of lists and ids": (*text(prompt=[[1], 1]), "prompt"),
    "prompt id below 0": (*text(prompt=[-1]), "prompt[0]"),
    "prompt id outside": (*text(prompt=[260]), "prompt"),
    "prompt id of 2**40": (*text(prompt=[2**40]), "prompt[0]"),
    "prompt id as bool": (*text(prompt=[True]), "prompt[0]"),
    "prompt id as float": (*text(prompt=[0.5]), "prompt[0]"),
    "too many prompts": (*text(prompt=["x"] * 65), "prompt"),
    "prompt past the context": (*text(prompt="x" * 600), None),
    "prompt far past the context": (*text(prompt=[1] * 100_000), "prompt"),
    "a prompt past the context among others": (*text(prompt=[[1], [1] * 600]), "prompt"),
    "tokenize nothing": ("/tokenize", b"{}", "prompt"),
    "tokenize both": ("/tokenize", b'{"prompt":"x","messages":[]}', "prompt"),
    "detokenize outside": ("/detokenize", b'{"tokens":[260]}', "tokens"),
    "detokenize below 0": ("/detokenize", b'{"tokens":[-1]}', "tokens[0]"),
    "detokenize text": ("/detokenize", b'{"tokens":["1"]}', "tokens[0]"),
}


async def assert_still_serves(client: Client) -> None:
    answer = await client.complete(max_tokens=3)
    assert answer.status == 200, answer.body


def test_every_hostile_body_gets_a_400_that_names_the_field_and_the_server_goes_on() -> None:
    async def run() -> None:
        async with serving() as client:
            wrong = []
            for name, (path, body, param) in HOSTILE.items():
                answer = await client.post(path, body)
                if answer.status != 400 or answer.error["param"] != param or len(answer.body) > 2000:
                    wrong.append((name, answer.status, answer.body[:300]))
                await assert_still_serves(client)
            assert not wrong

    assert len(HOSTILE) >= 60
    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Content-Type": "application/json; charset=utf-16"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Content-Encoding": "zzz"}, 415),
        ({"Expect": "x"}, 417),
        ({"Content-Type": "application/json; charset=UTF-8"}, 200),
        ({"Content-Encoding": "identity"}, 200),
    ],
)
def test_a_body_that_is_not_plain_json_is_refused_by_its_headers(headers: dict[str, str], status: int) -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.post("/v1/completions", {"prompt": "x", "max_tokens": 1}, headers)
            assert answer.status == status
            if status != 200:
                assert answer.error
            await assert_still_serves(client)

    asyncio.run(run())


MALFORMED = {
    "random bytes": b"\x00\x01\x02\xff\xfe\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
    "length and chunks": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "negative length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    "hexadecimal length": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x10\r\n\r\n",
    "NUL in a header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    "huge header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 1000 + b"\r\n",
    "long path": b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown version": b"GET /health HTTP/3.7x\r\nHost: a\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    "bad chunk size": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "huge length": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 1000000000000000000\r\n\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_http_gets_a_4xx_in_the_same_shape_without_the_bytes_that_were_sent(name: str) -> None:
    async def run() -> None:
        async with serving() as client:
            reader, writer = await client.connect(MALFORMED[name])
            if name == "huge length":
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
                body = await asyncio.wait_for(reader.readuntil(b"}}"), 30)
            else:
                head, _, body = (await asyncio.wait_for(reader.read(), 30)).partition(b"\r\n\r\n")
            writer.close()
            assert head.split()[1].startswith(b"4"), head
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert b"aiohttp" not in head + body
            assert b"aaaa" not in body
            await assert_still_serves(client)

    asyncio.run(run())


def test_a_body_over_the_limit_is_refused_whether_or_not_its_length_is_announced() -> None:
    async def run() -> None:
        async with serving(max_body_bytes=1000) as client:

            async def chunks() -> Any:
                for _ in range(100):
                    yield b" " * 100

            announced = await client.post("/v1/completions", b" " * 1001)
            assert (announced.status, announced.error["code"]) == (413, "body_too_large")
            chunked = await client.request(
                "POST", "/v1/completions", data=chunks(), headers={"Content-Type": "application/json"}
            )
            assert (chunked.status, chunked.error["code"]) == (413, "body_too_large")
            await assert_still_serves(client)

    asyncio.run(run())


def test_clients_that_do_not_send_are_not_waited_for() -> None:
    async def run() -> None:
        async with serving(header_timeout_s=0.05, body_timeout_s=0.05) as client:
            assert (await client.raw(b"GET / HT")).startswith(b"HTTP/1.1 408 ")
            unfinished = http_post("/v1/completions", TEXT)[:-3]
            assert (await client.raw(unfinished)).startswith(b"HTTP/1.1 408 ")
            await assert_still_serves(client)

    asyncio.run(run())


def test_a_client_that_leaves_in_the_middle_of_its_body_starts_nothing() -> None:
    async def run() -> None:
        from fake_engine import FakeEngine

        engine = FakeEngine()
        async with serving(engine) as client:
            _, writer = await client.connect(http_post("/v1/completions", TEXT)[:-3])
            writer.close()
            await writer.wait_closed()
            await assert_still_serves(client)
            assert len(engine.submitted) == 1  # the one that was served

    asyncio.run(run())
