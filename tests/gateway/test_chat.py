from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine
from http_client import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.messages.request import ChatPrompt


def answers(text: str) -> FakeEngine:
    return FakeEngine(answer=lambda ids, index: text.encode())


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """The messages that a stream's chunks add up to; each begins with its role and ends with its reason."""
    messages: dict[int, dict[str, Any]] = {}
    for event in events:
        assert event["object"] == "chat.completion.chunk"
        for choice in event["choices"]:
            delta = choice["delta"]
            if choice["index"] not in messages:
                assert delta == {"role": "assistant", "content": ""}
                messages[choice["index"]] = {"content": "", "logprobs": [], "token_ids": [], "finish_reason": None}
                continue
            message = messages[choice["index"]]
            assert message["finish_reason"] is None and "role" not in delta
            message["content"] += delta.get("content", "")
            message["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            message["token_ids"] += choice.get("token_ids", [])
            if choice["finish_reason"] is not None:
                assert delta == {}
                message["finish_reason"] = choice["finish_reason"]
                message["stop_reason"] = choice["stop_reason"]
    return messages


def test_a_conversation_is_answered_with_a_message() -> None:
    async def run() -> None:
        engine = answers("Hi!")
        async with serving(engine) as client:
            body = (await client.chat()).json
            assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
            assert body["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hi!", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                }
            ]
            assert engine.prompts == [
                ChatPrompt(b'[{"role":"user","content":"hello"}]', True, False, b"{}"),
            ]
            assert engine.options[0]["add_special_tokens"] is False

    asyncio.run(run())


def test_a_stream_is_exact_to_the_byte() -> None:
    async def run() -> None:
        async with serving(answers("a\n\u2028é")) as client:
            answer = await client.chat(stream=True, request_id="me", model="fake/bytes")
            assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["Cache-Control"] == "no-cache"
            created = answer.events[0]["created"]
            head = (
                f'data: {{"id":"chatcmpl-me","object":"chat.completion.chunk","created":{created},"model":"fake/bytes",'
                '"choices":[{"index":0,"delta":'
            )
            middle = ',"logprobs":null,"finish_reason":null}]}\n\n'
            deltas = (
                '{"role":"assistant","content":""}',
                '{"content":"a"}',
                '{"content":"\\n"}',
                '{"content":"\\u2028"}',
                '{"content":"é"}',
            )
            expected = "".join(head + delta + middle for delta in deltas)
            expected += head + '{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\ndata: [DONE]\n\n'
            assert answer.body.decode() == expected

    asyncio.run(run())


@settings(max_examples=25, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), max_size=40),
    st.integers(1, 3),
    st.integers(1, 80),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.booleans(),
)
def test_a_streams_messages_equal_the_unstreamed_ones(
    text: str, n: int, max_tokens: int, top_logprobs: int | None, return_token_ids: bool, with_usage: bool
) -> None:
    async def run() -> None:
        data = text.encode()
        async with serving(FakeEngine(answer=lambda ids, index: data[index:] + data[: index + 1])) as client:
            fields: dict[str, Any] = {"n": n, "max_tokens": max_tokens, "return_token_ids": return_token_ids}
            if top_logprobs is not None:
                fields |= {"logprobs": True, "top_logprobs": top_logprobs}
            whole = (await client.chat(**fields)).json
            options = {"include_usage": with_usage}
            events = (await client.chat(**fields, stream=True, stream_options=options)).events
            if with_usage:
                last = events.pop()
                assert last["choices"] == [] and last["usage"] == whole["usage"]
            assert ("prompt_token_ids" in events[0]) == return_token_ids
            assert not any("prompt_token_ids" in event for event in events[1:])
            streamed = joined(events)
            assert sorted(streamed) == list(range(n))
            for choice in whole["choices"]:
                message = streamed[choice["index"]]
                assert message["content"] == choice["message"]["content"]
                assert message["finish_reason"] == choice["finish_reason"]
                assert message["logprobs"] == (choice["logprobs"] or {"content": []})["content"]
                assert message["token_ids"] == choice.get("token_ids", [])

    asyncio.run(run())


def test_content_parts_are_joined_and_developers_are_systems() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            answer = await client.chat(
                messages=[
                    {"role": "developer", "content": "Be kind."},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                        "name": "me",
                    },
                    {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": None},
                    {"role": "user", "content": "c"},
                ]
            )
            assert answer.status == 200, answer.body
            prompt = engine.prompts[0]
            assert isinstance(prompt, ChatPrompt)
            assert prompt.messages_json == (
                b'[{"role":"system","content":"Be kind."},{"role":"user","content":"a\\nb","name":"me"},'
                b'{"role":"assistant","content":""},{"role":"user","content":"c"}]'
            )

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_final_message_can_be_continued_and_echoed(stream: bool) -> None:
    async def run() -> None:
        engine = answers(" world")
        async with serving(engine) as client:
            answer = await client.chat(
                messages=[{"role": "user", "content": "x"}, {"role": "assistant", "content": "Hello"}],
                add_generation_prompt=False,
                continue_final_message=True,
                echo=True,
                stream=stream,
            )
            message = joined(answer.events)[0] if stream else answer.json["choices"][0]["message"]
            content = message["content"]
            assert content == "Hello world"
            prompt = engine.prompts[0]
            assert isinstance(prompt, ChatPrompt)
            assert prompt.continue_final_message and not prompt.add_generation_prompt

    asyncio.run(run())


def test_template_variables_and_reasoning_effort_reach_the_template() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            answer = await client.chat(chat_template_kwargs={"a": 1, "b": "x", "c": None}, reasoning_effort="none")
            assert answer.status == 200, answer.body
            prompt = engine.prompts[0]
            assert isinstance(prompt, ChatPrompt)
            assert prompt.template_kwargs_json == (
                b'{"a":1,"b":"x","c":null,"reasoning_effort":"none","enable_thinking":false}'
            )

    asyncio.run(run())


def test_special_tokens_are_added_to_the_templates_own_where_asked_for() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            bare = (await client.chat()).json["usage"]["prompt_tokens"]
            assert (await client.chat(add_special_tokens=True)).json["usage"]["prompt_tokens"] == bare + 1
            assert (await client.chat(add_special_tokens=False)).json["usage"]["prompt_tokens"] == bare

    asyncio.run(run())


def test_max_completion_tokens_wins_and_neither_means_all_there_is_room_for() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            await client.chat(max_tokens=9, max_completion_tokens=3)
            await client.chat(max_tokens=None)
            assert [params.max_tokens for params in engine.submitted] == [3, None]

    asyncio.run(run())


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.chat(
                tools=None,
                tool_choice="none",
                parallel_tool_calls=True,
                response_format={"type": "text"},
                modalities=["text"],
                user="me",
                store=False,
                metadata={},
                functions=[],
                logprobs=False,
                top_logprobs=None,
                stream=False,
                stream_options=None,
            )
            assert answer.status == 200, answer.body

    asyncio.run(run())


def test_prompt_logprobs_and_ids_stand_beside_the_choices() -> None:
    async def run() -> None:
        async with serving() as client:
            body = (await client.chat(prompt_logprobs=1, return_token_ids=True, n=2)).json
            assert len(body["prompt_logprobs"]) == len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
            assert body["prompt_logprobs"][0] is None
            assert all(len(choice["token_ids"]) == 20 for choice in body["choices"])

    asyncio.run(run())


def test_running_usage_begins_at_no_tokens() -> None:
    async def run() -> None:
        async with serving(answers("abc")) as client:
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = (await client.chat(stream=True, stream_options=options)).events
            assert [event["usage"]["completion_tokens"] for event in events] == [0, 1, 2, 3, 4, 4, 4]

    asyncio.run(run())


def test_the_openai_client_is_served() -> None:
    async def run() -> None:
        async with serving() as client:
            async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as api:
                asked: list[Any] = [{"role": "user", "content": "hello"}]
                whole = await api.chat.completions.create(
                    model="fake/bytes", messages=asked, max_tokens=30, logprobs=True, top_logprobs=2, n=2
                )
                stream = await api.chat.completions.create(
                    model="fake/bytes",
                    messages=asked,
                    max_tokens=30,
                    n=2,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                texts = ["", ""]
                usage = None
                async for chunk in stream:
                    usage = chunk.usage
                    for choice in chunk.choices:
                        texts[choice.index] += choice.delta.content or ""
                assert texts == [choice.message.content for choice in whole.choices]
                assert usage == whole.usage
                assert [model.id async for model in api.models.list()] == ["fake/bytes"]
                with pytest.raises(openai.BadRequestError) as refused:
                    await api.chat.completions.create(model="fake/bytes", messages=asked, temperature=3)
                assert refused.value.param == "temperature"

    asyncio.run(run())
