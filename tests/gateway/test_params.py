from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.params import validate_params
from octavo.messages.errors import InvalidRequestError
from octavo.messages.sampling import SamplingParams


def validate(params: SamplingParams) -> SamplingParams:
    return validate_params(params, vocab_size=100, max_logprobs=20, max_model_len=64)


def test_defaults_pass_unchanged() -> None:
    assert validate(SamplingParams()) == SamplingParams()


def test_what_means_the_same_becomes_the_same() -> None:
    params = validate(SamplingParams(temperature=1e-30, top_k=-1, seed=-1, stop=["a"], bad_words="b"))  # type: ignore[arg-type]
    assert params == SamplingParams(temperature=0.0, top_k=0, seed=None, stop=("a",), bad_words=("b",))
    assert validate(SamplingParams(stop="ab")).stop == ("ab",)  # type: ignore[arg-type]
    assert str(validate(SamplingParams(temperature=-0.0)).temperature) == "0.0"


def test_seeds_are_any_64_bits_and_different_ones_stay_different() -> None:
    seeds = [0, 1, 2**63 - 1, -2, -3]
    taken = [validate(SamplingParams(seed=seed)).seed for seed in seeds]
    assert taken[:3] == seeds[:3]
    assert len(set(taken)) == len(seeds)
    assert all(seed is not None and 0 <= seed < 2**63 for seed in taken)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 17),
        pytest.param("n", 10**5000, id="n of 5000 digits"),
        ("n", 1.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", 2.1),
        ("top_p", 0.0),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("min_p", 1.1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),  # logits divided by it would be infinite
        ("max_tokens", 0),
        ("max_tokens", 64),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("stop", (1,)),
        ("stop_token_ids", (100,)),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: -101.0}),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (-1,)),
        ("bad_words", ("",)),
        ("bad_words_token_ids", ((),)),
        ("bad_words_token_ids", ((100,),)),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("seed", -(2**63) - 1),
        ("seed", 2**63),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        validate(msgspec.structs.replace(SamplingParams(), **{name: value}))
    assert refused.value.param is not None and refused.value.param.partition("[")[0] == name
    assert len(str(refused.value)) < 300


def test_min_tokens_is_compared_with_the_context_where_max_tokens_is_open() -> None:
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        validate(SamplingParams(max_tokens=None, min_tokens=64))
    assert validate(SamplingParams(max_tokens=None, min_tokens=63)).min_tokens == 63


def test_the_whole_vocabulary_may_be_asked_for_where_logprobs_are_not_limited() -> None:
    params = SamplingParams(logprobs=-1)
    assert validate_params(params, vocab_size=100, max_logprobs=-1).logprobs == -1
    assert validate_params(params, vocab_size=100, max_logprobs=100).logprobs == -1


numbers = st.integers() | st.floats() | st.none() | st.booleans() | st.text(max_size=3)
values = numbers | st.lists(numbers, max_size=3) | st.dictionaries(numbers, numbers, max_size=3)


@given(st.dictionaries(st.sampled_from(SamplingParams.__struct_fields__), values, max_size=4))
def test_any_values_are_accepted_or_refused_and_what_is_accepted_stays_so(fields: dict[str, Any]) -> None:
    try:
        params = validate(msgspec.structs.replace(SamplingParams(), **fields))
    except InvalidRequestError:
        return
    assert validate(params) == params
    assert msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams) == params
