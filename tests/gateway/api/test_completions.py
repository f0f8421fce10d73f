from __future__ import annotations

import asyncio
import itertools
from typing import Any

import openai
import pytest
from fake_engine import BOS, FakeEngine, answer_for
from http_client import serving
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.gateway.api.openai_completions import read_prompts


def expected_text(prompt: str, num_tokens: int, index: int = 0) -> str:
    return answer_for([BOS, *prompt.encode()], index)[:num_tokens].decode(errors="replace")


def joined(events: list[Any]) -> dict[int, dict[str, Any]]:
    """The whole answer that a stream's chunks add up to."""
    answers: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            whole = answers.setdefault(choice["index"], {"text": "", "token_ids": [], "logprobs": {}})
            whole["text"] += choice["text"]
            whole["token_ids"] += choice.get("token_ids") or []
            for name, values in (choice["logprobs"] or {}).items():
                whole["logprobs"].setdefault(name, []).extend(values)
            assert whole.get("finish_reason") is None
            whole["finish_reason"] = choice["finish_reason"]
            whole["stop_reason"] = choice["stop_reason"]
    return answers


def test_a_prompt_is_answered_with_its_text_and_counts() -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.complete(prompt="hello", max_tokens=20)
            assert answer.status == 200
            body = answer.json
            assert (
                body["id"].startswith("cmpl-") and body["object"] == "text_completion" and body["model"] == "fake/bytes"
            )
            assert body["choices"] == [
                {
                    "index": 0,
                    "text": expected_text("hello", 20),
                    "logprobs": None,
                    "finish_reason": "length",
                    "stop_reason": None,
                }
            ]
            assert body["usage"] == {
                "prompt_tokens": 6,
                "completion_tokens": 20,
                "total_tokens": 26,
                "prompt_tokens_details": {"cached_tokens": 0},
            }

    asyncio.run(run())


def test_max_tokens_is_16_unless_given_and_null_means_not_given() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            await client.post("/v1/completions", {"prompt": "x"})
            await client.post("/v1/completions", {"prompt": "x", "max_tokens": None, "temperature": None, "stop": None})
            assert [params.max_tokens for params in engine.submitted] == [16, 16]
            assert engine.submitted[0] == engine.submitted[1]

    asyncio.run(run())


def test_biases_past_100_mean_100() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            await client.complete(logit_bias={"1": 1000, "2": -100.5, "3": 100})
            assert engine.submitted[0].logit_bias == {1: 100.0, 2: -100.0, 3: 100.0}

    asyncio.run(run())


def test_lists_of_prompts_times_n_are_numbered_in_order() -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.complete(prompt=["ab", "cd", "ef"], n=2, max_tokens=9)
            choices = answer.json["choices"]
            assert [choice["index"] for choice in choices] == list(range(6))
            assert [choice["text"] for choice in choices] == [
                expected_text(prompt, 9, index) for prompt in ("ab", "cd", "ef") for index in range(2)
            ]
            assert answer.json["usage"]["prompt_tokens"] == 9  # each prompt once
            streamed = await client.complete(prompt=["ab", "cd", "ef"], n=2, max_tokens=9, stream=True)
            whole = joined(streamed.events)
            assert [whole[index]["text"] for index in range(6)] == [choice["text"] for choice in choices]

    asyncio.run(run())


def test_token_ids_are_prompts_too() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            one = await client.complete(prompt=[72, 105], max_tokens=3)
            several = await client.complete(prompt=[[72, 105], [33]], max_tokens=3)
            assert one.json["choices"][0]["text"] == several.json["choices"][0]["text"]
            assert engine.prompts == [(72, 105), (72, 105), (33,)]

    asyncio.run(run())


def test_read_prompts_tells_texts_from_ids() -> None:
    assert read_prompts("a", 10, 4) == ["a"]
    assert read_prompts(["a", "b"], 10, 4) == ["a", "b"]
    assert read_prompts([1, 2], 10, 1) == [(1, 2)]
    assert read_prompts([[1], [2, 3]], 10, 4) == [(1,), (2, 3)]


def test_every_parameter_reaches_the_engine() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            fields = {
                "temperature": 0.5,
                "top_k": 7,
                "top_p": 0.9,
                "min_p": 0.1,
                "presence_penalty": 0.2,
                "frequency_penalty": -0.3,
                "repetition_penalty": 1.1,
                "allowed_token_ids": (1, 2),
                "bad_words": ("bad",),
                "max_tokens": 5,
                "min_tokens": 2,
                "stop": ("a", "b"),
                "stop_token_ids": (9,),
                "ignore_eos": True,
                "logprobs": 3,
                "prompt_logprobs": 2,
                "seed": 11,
                "skip_special_tokens": False,
                "spaces_between_special_tokens": False,
                "include_stop_str_in_output": True,
                "n": 2,
            }
            answer = await client.complete(
                **fields,
                logit_bias={"3": -1.5},
                priority=4,
                cache_salt="salt",
                add_special_tokens=False,
                truncate_prompt_tokens=3,
            )
            assert answer.status == 200, answer.body
            params = engine.submitted[0]
            assert {name: getattr(params, name) for name in fields} == fields
            assert params.logit_bias == {3: -1.5}
            assert engine.options == [
                {"priority": 4, "cache_salt": "salt", "add_special_tokens": False, "truncate_prompt_tokens": 3}
            ]

    asyncio.run(run())


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.complete(
                user="me",
                metadata={"a": 1},
                store=True,
                service_tier="auto",
                suffix=None,
                best_of=1,
                use_beam_search=False,
                response_format={"type": "text"},
                guided_json=None,
                vllm_xargs={},
            )
            assert answer.status == 200, answer.body

    asyncio.run(run())


def test_stop_strings_end_the_text_and_are_named() -> None:
    async def run() -> None:
        async with serving(FakeEngine(answer=lambda ids, index: b"one two three")) as client:
            whole = (await client.complete(stop=["two", "x"])).json["choices"][0]
            assert (whole["text"], whole["finish_reason"], whole["stop_reason"]) == ("one ", "stop", "two")
            streamed = joined((await client.complete(stop="two", stream=True)).events)[0]
            assert (streamed["text"], streamed["finish_reason"], streamed["stop_reason"]) == ("one ", "stop", "two")

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first_in_text_logprobs_and_offsets(stream: bool) -> None:
    async def run() -> None:
        async with serving(FakeEngine(answer=lambda ids, index: "ünd".encode())) as client:
            answer = await client.complete(prompt="hß!", echo=True, logprobs=1, max_tokens=4, stream=stream)
            choice = joined(answer.events)[0] if stream else answer.json["choices"][0]
            assert choice["text"] == "hß!ünd"
            logprobs = choice["logprobs"]
            # BOS takes no room; a character's second byte begins where the character does.
            assert logprobs["text_offset"] == [0, 0, 1, 1, 2, 3, 3, 4, 5]
            assert logprobs["tokens"][:2] == ["<256>", "h"]
            assert logprobs["token_logprobs"] == [None, *[-0.5] * 8]
            assert logprobs["top_logprobs"][0] is None and logprobs["top_logprobs"][1] == {"h": -0.5}

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_echo_without_output_scores_the_prompt(stream: bool) -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.complete(
                prompt=[104, 105],
                echo=True,
                logprobs=0,
                max_tokens=0,
                stream=stream,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            )
            assert answer.status == 200, answer.body
            choice = joined(answer.events)[0] if stream else answer.json["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
            assert choice["logprobs"]["tokens"] == ["h", "i"]
            assert choice["logprobs"]["token_logprobs"] == [None, -0.25]
            usage = answer.events[-1]["usage"] if stream else answer.json["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (2, 0)

    asyncio.run(run())


def test_what_is_echoed_is_what_is_left_after_truncation() -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            answer = await client.complete(prompt="abcdef", echo=True, max_tokens=1, truncate_prompt_tokens=2)
            assert answer.json["choices"][0]["text"].startswith("ef")
            assert engine.prompts == [tuple(b"ef")]

    asyncio.run(run())


def test_prompt_logprobs_have_vllms_shape() -> None:
    async def run() -> None:
        async with serving() as client:
            choice = (await client.complete(prompt=[104, 105], prompt_logprobs=2, max_tokens=1)).json["choices"][0]
            assert choice["prompt_logprobs"] == [
                None,
                {
                    "105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
                    "106": {"logprob": -1.5, "rank": 2, "decoded_token": "j"},
                },
            ]

    asyncio.run(run())


def test_tokens_can_be_written_as_ids_and_ids_returned() -> None:
    async def run() -> None:
        async with serving(FakeEngine(answer=lambda ids, index: b"ab")) as client:
            fields = {"prompt": "x", "logprobs": 1, "return_tokens_as_token_ids": True, "return_token_ids": True}
            whole = (await client.complete(**fields)).json["choices"][0]
            assert whole["logprobs"]["tokens"] == ["token_id:97", "token_id:98", "token_id:257"]
            assert whole["token_ids"] == [97, 98, 257]
            assert whole["prompt_token_ids"] == [256, 120]
            events = (await client.complete(**fields, stream=True)).events
            assert joined(events)[0]["token_ids"] == [97, 98, 257]
            with_prompt = [event for event in events if "prompt_token_ids" in event["choices"][0]]
            assert with_prompt == events[:1] and events[0]["choices"][0]["prompt_token_ids"] == [256, 120]

    asyncio.run(run())


texts = st.text(st.characters(codec="utf-8"), max_size=40)


@settings(max_examples=25, deadline=None)
@given(texts, st.integers(1, 3), st.integers(1, 60), st.booleans(), st.booleans(), st.none() | st.integers(0, 2))
def test_a_streams_text_and_logprobs_equal_the_unstreamed_ones(
    text: str, n: int, max_tokens: int, echo: bool, return_ids: bool, logprobs: int | None
) -> None:
    async def run() -> None:
        # Bytes in any order: broken characters too, and separators that some clients take for line ends.
        data = (text + "\u2028\x85\r\n").encode()
        async with serving(FakeEngine(answer=lambda ids, index: data[index:] + data[: index + 1])) as client:
            fields = {
                "n": n,
                "max_tokens": max_tokens,
                "echo": echo,
                "return_token_ids": return_ids,
                "logprobs": logprobs,
            }
            whole = (await client.complete(**fields)).json["choices"]
            streamed = joined((await client.complete(**fields, stream=True)).events)
            for choice in whole:
                other = streamed[choice["index"]]
                assert other["text"] == choice["text"]
                assert other["finish_reason"] == choice["finish_reason"]
                assert other["logprobs"] == (choice["logprobs"] or {})
                assert other["token_ids"] == choice.get("token_ids", [])

    asyncio.run(run())


def test_usage_comes_last_and_alone_and_other_chunks_say_null() -> None:
    async def run() -> None:
        async with serving() as client:
            answer = await client.complete(stream=True, n=2, stream_options={"include_usage": True})
            *others, last = answer.events
            assert all(event["usage"] is None and event["choices"] for event in others)
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 40 and last["usage"]["prompt_tokens"] == 6
            without = await client.complete(stream=True)
            assert all("usage" not in event for event in without.events)

    asyncio.run(run())


def test_continuous_usage_grows_with_every_chunk() -> None:
    async def run() -> None:
        async with serving(FakeEngine(answer=lambda ids, index: b"abcdef")) as client:
            options = {"include_usage": True, "continuous_usage_stats": True}
            events = (await client.complete(stream=True, stream_options=options)).events
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == [1, 2, 3, 4, 5, 6, 7, 7]
            assert all(event["usage"]["prompt_tokens"] == 6 for event in events)

    asyncio.run(run())


def test_a_list_of_prompts_is_admitted_whole_or_refused_whole() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True, max_live=3)
        async with serving(engine) as client:
            answer = await client.complete(prompt=["a", "b", "c", "d"])
            assert (answer.status, answer.error["code"]) == (429, "queue_full")
            assert answer.headers["Retry-After"] == "3"
            assert engine.num_live == 0 and len(engine.cancelled) == 3

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_one_refused_prompt_of_a_list_refuses_all_with_a_plain_error(stream: bool) -> None:
    async def run() -> None:
        engine = FakeEngine()
        async with serving(engine) as client:
            answer = await client.complete(prompt=["a", "b" * 600, "c"], stream=stream)
            assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
            assert answer.headers["Content-Type"] == "application/json"
            assert engine.num_live == 0

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status"), [("queue_full", 429), ("engine_closed", 503), ("executor_lost", 503), ("request_failed", 500)]
)
def test_a_refusal_before_the_first_token_is_a_plain_http_error(stream: bool, code: str, status: int) -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.refuse_with = (code, "why it was refused")
        async with serving(engine) as client:
            answer = await client.complete(stream=stream)
            assert (answer.status, answer.error["code"]) == (status, code)
            assert ("Retry-After" in answer.headers) == (status in (429, 503))

    asyncio.run(run())


def test_a_failure_in_the_middle_of_a_stream_is_an_event_without_internals_then_the_end() -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.fail_after = 3
        async with serving(engine) as client:
            answer = await client.complete(stream=True, n=2, prompt="x")
            assert answer.status == 200
            *chunks, error = answer.events
            assert chunks and all("choices" in chunk for chunk in chunks)
            assert error["error"]["code"] == "request_failed" and b"secret" not in answer.body
            assert engine.num_live == 0
            whole = await client.complete(prompt="x")
            assert whole.status == 500 and b"secret" not in whole.body

    asyncio.run(run())


def test_the_openai_client_is_served() -> None:
    async def run() -> None:
        async with serving() as client:
            async with openai.AsyncOpenAI(base_url=client.url + "/v1", api_key="none", max_retries=0) as api:
                whole = await api.completions.create(model="fake/bytes", prompt="hello", max_tokens=30, logprobs=2)
                stream = await api.completions.create(
                    model="fake/bytes",
                    prompt="hello",
                    max_tokens=30,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                chunks = [chunk async for chunk in stream]
                text = "".join(itertools.chain(*([choice.text for choice in chunk.choices] for chunk in chunks)))
                assert text == whole.choices[0].text == expected_text("hello", 30)
                assert chunks[-1].usage == whole.usage
                assert whole.choices[0].logprobs is not None
                with pytest.raises(openai.NotFoundError) as not_found:
                    await api.completions.create(model="other", prompt="x")
                assert not_found.value.code == "model_not_found"

    asyncio.run(run())
