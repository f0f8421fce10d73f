from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.http_errors import ApiError
from octavo.gateway.json_body import BodyDecoder
from octavo.gateway.protocol import ChatRequest, CompletionRequest

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
