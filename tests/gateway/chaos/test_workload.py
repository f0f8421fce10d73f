from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.chaos.workload import ChoiceOutput, ServedModel, StreamOutput, difference, make_recipes


def output() -> StreamOutput:
    return StreamOutput(
        [ChoiceOutput("ab", [1, 2], [-0.5, -1.0], "length"), ChoiceOutput("cd", [3, 4], [-0.25, -2.0], "length")],
        num_output_tokens=4,
    )


@given(st.integers(2, 4096), st.integers(1, 40), st.integers(0, 9), st.integers(1, 512))
def test_requests_fit_the_model_and_are_the_seeds_own(length: int, count: int, seed: int, most: int) -> None:
    model = ServedModel("m", length)
    recipes = make_recipes(model, count, seed=seed, max_output_len=most)
    assert recipes == make_recipes(model, count, seed=seed, max_output_len=most)
    for recipe in recipes:
        body = msgspec.json.decode(recipe.body)
        assert 1 <= body["max_tokens"] <= most
        assert body["truncate_prompt_tokens"] + body["max_tokens"] <= max(length, 2)
        assert recipe.num_choices == body.get("n", 1)
    if count >= 6:
        assert len({recipe.kind for recipe in recipes}) == 6


def test_the_same_answer_is_the_same_within_the_rounding_of_a_sum() -> None:
    near = output()
    near.choices[0].logprobs[0] += 9e-5
    assert difference(output(), near) == ""


def change_token(got: StreamOutput) -> None:
    got.choices[1].token_ids[1] = 9


def drop_token(got: StreamOutput) -> None:
    got.choices[0].token_ids.pop()


def repeat_token(got: StreamOutput) -> None:
    got.choices[0].token_ids.append(2)


def change_text(got: StreamOutput) -> None:
    got.choices[0].text = "a\ufffd"


def change_logprob(got: StreamOutput) -> None:
    got.choices[0].logprobs[1] -= 2e-4


def break_logprob(got: StreamOutput) -> None:
    got.choices[0].logprobs[1] = float("nan")


def drop_logprob(got: StreamOutput) -> None:
    got.choices[1].logprobs.pop()


def change_reason(got: StreamOutput) -> None:
    got.choices[1].finish_reason = "stop"


def change_usage(got: StreamOutput) -> None:
    got.num_output_tokens = 5


@pytest.mark.parametrize(
    "change",
    [
        change_token,
        drop_token,
        repeat_token,
        change_text,
        change_logprob,
        break_logprob,
        drop_logprob,
        change_reason,
        change_usage,
    ],
)
def test_any_other_difference_is_told(change: Callable[[StreamOutput], None]) -> None:
    got = copy.deepcopy(output())
    change(got)
    assert difference(output(), got)
