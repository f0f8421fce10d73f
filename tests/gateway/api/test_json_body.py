from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.api.http_errors import ApiError
from octavo.gateway.api.json_body import LONG_BODY_BYTES, BodyDecoder
from octavo.gateway.api.json_shape import MAX_CONTAINERS, MAX_STRINGS
from octavo.gateway.api.protocol import ChatRequest, CompletionRequest, DetokenizeRequest

CHAT = BodyDecoder(ChatRequest)
TEXT = BodyDecoder(CompletionRequest)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from([*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__]) | st.text()


@given(st.dictionaries(names, json_values, max_size=6) | json_values, st.sampled_from([None, 1]))
def test_any_json_is_decoded_or_refused_with_a_400(body: Any, indent: int | None) -> None:
    for decoder in (CHAT, TEXT):
        try:
            decoder.decode(json.dumps(body, indent=indent).encode())
        except ApiError as error:
            assert error.status == 400 and len(error.body()) < 3000


@given(st.binary(max_size=100))
def test_any_bytes_are_decoded_or_refused_with_a_400(body: bytes) -> None:
    try:
        TEXT.decode(body)
    except ApiError as error:
        assert error.status == 400


@given(
    st.dictionaries(st.sampled_from(["prompt", "user", "stop"]), st.text(), max_size=3), st.sampled_from([None, 0, 3])
)
def test_no_honest_object_is_taken_for_one_that_repeats_a_name(body: dict[str, str], indent: int | None) -> None:
    for ensure_ascii in (False, True):
        decoded = TEXT.decode(json.dumps(body, indent=indent, ensure_ascii=ensure_ascii).encode())
        assert decoded.prompt == body.get("prompt") and decoded.user == body.get("user")


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":"a","prompt":"a"}',
        b'{"prompt":"a","user":"b","prompt":"a"}',
        b'{"user":"b","prompt":"a", "user" : "b" }',
        b'{"prompt":"a","p\\u0072ompt":"b"}',
        b'{"prompt":"a","prompt":"\\",\\"user\\":1"}',
    ],
)
def test_a_name_that_is_repeated_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="twice"):
        TEXT.decode(body)


def test_a_misspelt_name_is_told_its_nearest() -> None:
    with pytest.raises(ApiError, match="did you mean max_tokens") as refused:
        TEXT.decode(b'{"prompt":"a","max_token":1}')
    assert (refused.value.param, refused.value.code) == ("max_token", "unknown_parameter")


def test_an_error_never_gives_back_much_of_what_was_sent() -> None:
    with pytest.raises(ApiError) as refused:
        TEXT.decode(json.dumps({"x" * 100_000: 1}).encode())
    assert len(refused.value.body()) < 1000


NESTED = {
    "stream_options": b'{"include_usage":true,"include_usage":false}',
    "chat_template_kwargs": b'{"a":":","b":1,"a":"x"}',
    "messages": b'[{"role":"user","content":"a","role":"system"}]',
    "metadata": b'{"a":{"b":1,"b":2}}',
    "service_tier": b'[{"a":[{"b":1,"\\u0062":2}]}]',
    "store": b'[[{"a":1,"a":1}]]',
}


@pytest.mark.parametrize("name", NESTED)
def test_a_name_that_an_object_within_repeats_is_refused_and_its_field_named(name: str) -> None:
    messages = b"" if name == "messages" else b'"messages":[{"role":"user","content":"a"}],'
    with pytest.raises(ApiError, match="twice") as refused:
        CHAT.decode(b'{%b"%b":%b}' % (messages, name.encode(), NESTED[name]))
    assert refused.value.status == 400 and refused.value.param == name


texts = st.text('ab"\\:{}[],\n\u00e9', max_size=8)
inner_values = st.recursive(
    st.none() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def repeats_a_name(pairs: list[tuple[str, Any]]) -> bool:
    return len({name for name, _ in pairs}) < len(pairs)


@given(st.lists(st.tuples(texts, inner_values), max_size=4), st.sampled_from([None, 2]), st.booleans(), st.booleans())
def test_whatever_strings_hold_just_those_objects_that_repeat_a_name_are_refused(
    pairs: list[tuple[str, Any]], indent: int | None, ensure_ascii: bool, is_in_list: bool
) -> None:
    def dump(value: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)

    made = "{" + ", ".join(f"{dump(name)} : {dump(value)}" for name, value in pairs) + "}"
    body = f'{{"prompt": "a:{{", "metadata": {f"[1, {made}]" if is_in_list else made}}}'.encode()
    if repeats_a_name(pairs):
        with pytest.raises(ApiError, match="metadata names a field twice"):
            TEXT.decode(body)
    else:
        assert TEXT.decode(body).prompt == "a:{"


# ---- long bodies ----


def in_turns(decoder: BodyDecoder[Any], body: bytes) -> tuple[Any, int]:
    """What the body is, and how many turns others had meanwhile."""

    async def run() -> tuple[Any, int]:
        num_turns = 0
        task = asyncio.ensure_future(decoder.decode_in_turns(body))
        while not task.done():
            await asyncio.sleep(0)
            num_turns += 1
        return task.result(), num_turns

    return asyncio.run(run())


IDS = [*range(100_000, 100_000 + LONG_BODY_BYTES // 3)]


@pytest.mark.parametrize("separators", [None, (",", ":"), (" ,\n", ":")])
@pytest.mark.parametrize(
    "prompt", [IDS, [IDS], [IDS[:50_000], [], IDS[50_000:], [1, 2]], [[7] * 100] * 2000, [IDS, "text"], ["text", IDS]]
)
def test_a_long_body_is_decoded_in_turns_to_the_same(prompt: list[Any], separators: tuple[str, str] | None) -> None:
    body = json.dumps({"user": "[1]", "prompt": prompt, "max_tokens": 7}, separators=separators).encode()
    decoded, num_turns = in_turns(TEXT, body)
    assert decoded == TEXT.decode(body) and decoded.prompt == prompt and decoded.max_tokens == 7
    assert num_turns >= (2 if any(isinstance(entry, str) for entry in prompt) else 5)


def test_ids_to_be_made_a_text_of_are_decoded_in_turns_too() -> None:
    decoded, num_turns = in_turns(BodyDecoder(DetokenizeRequest), json.dumps({"tokens": IDS}).encode())
    assert decoded.tokens == IDS and num_turns >= 5


LONG = ",".join(map(str, IDS)).encode()
WRONG = {
    "a number past all ids": (b"[%b,99999999999]" % LONG, "prompt"),
    "a mixture": (b"[%b,[1]]" % LONG, None),
    "three deep": (b"[[[%b]]]" % LONG, "prompt"),
    "a mixture of lists": (b"[[1],%b]" % LONG, "prompt"),
    "a comma at the end": (b"[%b,]" % LONG, None),
    "two commas": (b"[%b,,1]" % LONG, None),
    "a leading zero": (b"[%b,01]" % LONG, None),
    "no comma": (b"[[%b][1]]" % LONG, None),
    "no end": (b"[%b" % LONG, None),
    "a negative one": (b"[%b,-1]" % LONG, "prompt"),
    "a fraction": (b"[%b,1.5]" % LONG, "prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_long_list_that_is_none_of_ids_is_refused(case: str) -> None:
    prompt, param = WRONG[case]
    body = b'{"prompt":%b,"max_tokens":1}' % prompt
    if case == "a mixture":  # which is refused further on, where the prompts are told apart
        assert len(TEXT.decode(body).prompt or "") == len(IDS) + 1
    with pytest.raises(ApiError) as refused:
        in_turns(TEXT, body)
    assert refused.value.status == 400 and len(refused.value.body()) < 1000
    assert param is None or (refused.value.param or "").startswith(param)


def test_what_is_wrong_beside_a_long_list_is_refused_by_its_name() -> None:
    with pytest.raises(ApiError, match="did you mean max_tokens"):
        in_turns(TEXT, b'{"prompt":[%b],"max_token":1}' % LONG)
    with pytest.raises(ApiError, match="twice"):
        in_turns(TEXT, b'{"prompt":[%b],"prompt":[%b]}' % (LONG, LONG))


@pytest.mark.parametrize(
    "body,told",
    [
        (b'{"prompt":[' + b"[]," * MAX_CONTAINERS + b"[]]}", "lists and objects"),
        (b'{"prompt":"a","metadata":[' + b"{}," * MAX_CONTAINERS + b"{}]}", "lists and objects"),
        (b'{"prompt":[' + b'"",' * MAX_STRINGS + b'""]}', "names and texts"),
        (b"[" * 1_000_000, "lists and objects"),
        (b'"' * 1_000_000, "names and texts"),
    ],
    ids=["lists", "objects", "texts", "unclosed lists", "unclosed texts"],
)
def test_more_lists_objects_or_texts_than_any_request_needs_are_refused_before_they_are_built(
    body: bytes, told: str
) -> None:
    with pytest.raises(ApiError, match=told) as refused:
        TEXT.decode(body)
    assert refused.value.status == 400


def test_a_text_may_hold_as_many_brackets_and_quotes_as_it_likes() -> None:
    text = '[{"\\":' * 200_000
    assert TEXT.decode(json.dumps({"prompt": text}).encode()).prompt == text
    assert in_turns(TEXT, json.dumps({"prompt": [text, text]}).encode())[0].prompt == [text, text]
