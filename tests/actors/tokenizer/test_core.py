from __future__ import annotations

import struct

import pytest

from octavo.actors.tokenizer.core import TokenizerConfig, TokenizerCore
from octavo.messages.errors import InvalidRequestError
from octavo.messages.ids import RequestId
from octavo.messages.request import ChatPrompt, PromptReady, RequestEnded, SubmitPrompt, SubmitRequest
from octavo.messages.sampling import SamplingParams


class CharCodec:
    """One token a character (its code point), 1 in front; a space and the next letter are one token."""

    eos_token_ids = (2, 3)
    max_token_chars: int | None = 2

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = [ord(char) for char in text]
        if len(ids) > 1 and ids[0] == 32:
            ids = [ids[1] + 100, *ids[2:]]
        return [1, *ids] if add_special_tokens else ids

    def render_chat(self, prompt: ChatPrompt) -> str:
        if prompt.messages_json == b"[]":
            raise InvalidRequestError("no messages", param="messages")
        return "chat"


CORE = TokenizerCore(TokenizerConfig(vocab_size=300, max_model_len=32, max_logprobs=5), CharCodec())


def submit(prompt: str | tuple[int, ...] | ChatPrompt = "abc", *, ids: int = 1, **fields: object) -> list[object]:
    params = fields.pop("params", SamplingParams(seed=7))
    request_ids = tuple(RequestId(10 + i) for i in range(ids))
    return list(CORE.handle(SubmitPrompt(request_ids, prompt, params, **fields), 0))  # type: ignore[arg-type]


def refusal(*args: object, **kwargs: object) -> RequestEnded:
    (answer,) = submit(*args, **kwargs)  # type: ignore[arg-type]
    assert isinstance(answer, RequestEnded)
    assert answer.reason == "refused"
    return answer


def request(answers: list[object], index: int = 0) -> SubmitRequest:
    answer = answers[1 + index]
    assert isinstance(answer, SubmitRequest)
    return answer


def tokens(answer: SubmitRequest) -> list[int]:
    return list(struct.unpack(f"<{len(answer.prompt_token_ids) // 4}i", answer.prompt_token_ids))


def test_a_text_becomes_a_ready_prompt_and_a_recipe() -> None:
    params = SamplingParams(seed=7, max_tokens=4)
    assert submit(params=params, arrival_ns=5, priority=2, cache_salt="s", deadline_ns=9) == [
        PromptReady((RequestId(10),), (1, 97, 98, 99), params),
        SubmitRequest(
            RequestId(10),
            struct.pack("<4i", 1, 97, 98, 99),
            params,
            eos_token_ids=(2, 3),
            arrival_ns=5,
            priority=2,
            cache_salt="s",
            deadline_ns=9,
        ),
    ]


@pytest.mark.parametrize(
    ("prompt", "fields", "expected"),
    [
        ("ab", {"add_special_tokens": False}, [97, 98]),
        ((5, 6), {}, [5, 6]),
        (ChatPrompt(b"[1]"), {}, [99, 104, 97, 116]),
        (ChatPrompt(b"[1]", add_special_tokens=True), {}, [1, 99, 104, 97, 116]),
        ((1, 2, 3, 4), {"truncate_prompt_tokens": 2}, [3, 4]),
        ((1, 2), {"truncate_prompt_tokens": 2}, [1, 2]),
    ],
)
def test_each_kind_of_prompt_has_its_tokens(
    prompt: str | tuple[int, ...] | ChatPrompt, fields: dict[str, object], expected: list[int]
) -> None:
    assert tokens(request(submit(prompt, **fields))) == expected


def test_siblings_share_the_prompt_of_the_first_and_draw_from_their_own_seeds() -> None:
    answers = submit(ids=3, params=SamplingParams(n=3, seed=7))
    assert len(answers) == 4
    requests = [request(answers, i) for i in range(3)]
    assert [r.request_id for r in requests] == [10, 11, 12]
    assert [r.fork_of for r in requests] == [-1, 10, 10]
    assert [r.params.seed for r in requests] == [7, 8, 9]
    assert {r.params.n for r in requests} == {1}
    assert len({r.prompt_token_ids for r in requests}) == 1


def test_seeds_at_the_end_of_their_range_stay_in_it() -> None:
    answers = submit(ids=2, params=SamplingParams(n=2, seed=2**63 - 1))
    assert [request(answers, i).params.seed for i in range(2)] == [2**63 - 1, 0]


def test_a_request_without_a_seed_always_draws_the_same_one() -> None:
    seeds = [request(submit(params=SamplingParams())).params.seed for _ in range(2)]
    assert seeds[0] == seeds[1]
    assert seeds[0] is not None
    assert 0 <= seeds[0] < 2**63


def test_max_tokens_is_what_the_context_leaves_unless_given() -> None:
    prompt = tuple(range(30))
    assert request(submit(prompt, params=SamplingParams(max_tokens=None))).params.max_tokens == 2
    assert request(submit(prompt, params=SamplingParams(max_tokens=2))).params.max_tokens == 2
    assert request(submit(prompt, params=SamplingParams(max_tokens=0))).params.max_tokens == 0
    ready = submit(prompt, params=SamplingParams(max_tokens=None))[0]
    assert isinstance(ready, PromptReady)
    assert ready.params.max_tokens == 2


def test_ignore_eos_leaves_the_end_tokens_out() -> None:
    assert request(submit(params=SamplingParams(ignore_eos=True))).eos_token_ids == ()


def test_truncating_to_the_models_length_leaves_room_for_the_answer() -> None:
    prompt = tuple(range(100))
    answers = submit(prompt, truncate_prompt_tokens=-1, params=SamplingParams(max_tokens=10))
    assert tokens(request(answers)) == list(range(78, 100))
    answers = submit(prompt, truncate_prompt_tokens=-1, params=SamplingParams(max_tokens=None))
    assert tokens(request(answers)) == list(range(69, 100))


def test_bad_words_are_banned_with_and_without_a_space_before_them() -> None:
    answers = submit(params=SamplingParams(bad_words=("ab", " c", "ab"), bad_words_token_ids=((9,),)))
    assert request(answers).params.bad_words_token_ids == ((9,), (97, 98), (197, 98), (99,), (199,))


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ((), SamplingParams(), "prompt", ["empty"]),
        (tuple(range(32)), SamplingParams(max_tokens=None), "prompt", ["32", "31"]),
        (tuple(range(30)), SamplingParams(max_tokens=3), "max_tokens", ["32", "33", "30", "at most 2"]),
        ((5, 300), SamplingParams(), "prompt", ["300", "299"]),
        ((5, -1), SamplingParams(), "prompt", ["-1"]),
        ("ab\u4f60", SamplingParams(), "prompt", ["20320"]),
        ((5,), SamplingParams(logit_bias={300: 1.0}), "logit_bias", ["300"]),
        ((5,), SamplingParams(allowed_token_ids=(1, 301)), "allowed_token_ids", ["301"]),
        ((5,), SamplingParams(stop_token_ids=(302,)), "stop_token_ids", ["302"]),
        ((5,), SamplingParams(bad_words_token_ids=((1, 303),)), "bad_words_token_ids", ["303"]),
        ((5,), SamplingParams(bad_words=("\u4f60",)), "bad_words", ["20320"]),
        ((5,), SamplingParams(bad_words=(" ",)), "bad_words", ["empty"]),
        ((5,), SamplingParams(stop=("a", "")), "stop", ["empty"]),
        ((5,), SamplingParams(logprobs=6), "logprobs", ["6", "5", "--max-logprobs"]),
        ((5,), SamplingParams(prompt_logprobs=-1), "prompt_logprobs", ["300", "5"]),
        ((5,), SamplingParams(n=2), "n", ["n=2"]),
        (ChatPrompt(b"[]"), SamplingParams(), "messages", ["no messages"]),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_numbers(
    prompt: str | tuple[int, ...] | ChatPrompt, params: SamplingParams, param: str, words: list[str]
) -> None:
    answer = refusal(prompt, params=params)
    assert answer.error_param == param
    for word in words:
        assert word in answer.error
    too_long = param == "max_tokens" or "maximum context length" in answer.error
    assert answer.error_code == ("context_length_exceeded" if too_long else "invalid_request")


EVERY_TOKEN = tuple((token_id,) for token_id in range(300))


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(allowed_token_ids=(2, 3), min_tokens=1), "allowed_token_ids"),  # the ends
        (SamplingParams(allowed_token_ids=(2, 9), min_tokens=1, stop_token_ids=(9,)), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=(97,), bad_words=("a",)), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=(97, 97), bad_words=("ba",)), "allowed_token_ids"),  # not after b
        (SamplingParams(allowed_token_ids=(97, 2), bad_words=("a",), min_tokens=1), "allowed_token_ids"),
        (SamplingParams(bad_words_token_ids=EVERY_TOKEN), "bad_words"),
        (SamplingParams(stop_token_ids=tuple(range(300)), min_tokens=1), "stop_token_ids"),
    ],
)
def test_parameters_that_could_leave_no_token_to_choose_are_refused(params: SamplingParams, param: str) -> None:
    answer = refusal(params=params)
    assert (answer.error_code, answer.error_param) == ("invalid_request", param)
    assert ("min_tokens" in answer.error) == bool(params.min_tokens)
    assert ("bad_words" in answer.error) == bool(params.bad_words or params.bad_words_token_ids)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(allowed_token_ids=(2, 3)),
        SamplingParams(allowed_token_ids=(2, 3), min_tokens=1, ignore_eos=True),
        SamplingParams(allowed_token_ids=(2, 9), min_tokens=1),
        SamplingParams(allowed_token_ids=(97, 98), bad_words=("ba",)),
        SamplingParams(bad_words_token_ids=EVERY_TOKEN[1:]),
    ],
)
def test_parameters_that_always_leave_a_token_pass(params: SamplingParams) -> None:
    request(submit(params=params))


class UnreadCodec(CharCodec):
    """Refuses to look at a text."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise AssertionError("it was tokenized")


def test_a_text_that_is_too_long_whatever_its_tokens_are_is_refused_without_tokenizing_it() -> None:
    core = TokenizerCore(TokenizerConfig(vocab_size=300, max_model_len=5000), UnreadCodec())
    (answer,) = core.handle(SubmitPrompt((RequestId(1),), "a" * 10_001, SamplingParams()), 0)
    assert isinstance(answer, RequestEnded)
    assert (answer.error_code, answer.error_param) == ("context_length_exceeded", "prompt")
    assert "at least 5001" in answer.error and "4999" in answer.error
    for may_fit in (
        SubmitPrompt((RequestId(1),), "a" * 10_000, SamplingParams()),
        SubmitPrompt((RequestId(1),), "a" * 10_001, SamplingParams(), truncate_prompt_tokens=5),
    ):
        with pytest.raises(AssertionError, match="was tokenized"):
            core.handle(may_fit, 0)


def test_a_truncation_that_makes_no_sense_is_refused() -> None:
    assert refusal(truncate_prompt_tokens=-2).error_param == "truncate_prompt_tokens"


def test_each_sibling_of_a_refused_prompt_gets_its_end() -> None:
    answers = submit((), ids=2, params=SamplingParams(n=2))
    assert [answer.request_id for answer in answers if isinstance(answer, RequestEnded)] == [10, 11]


def test_no_bound_on_logprobs_allows_the_vocabulary() -> None:
    core = TokenizerCore(TokenizerConfig(vocab_size=300, max_model_len=32, max_logprobs=-1), CharCodec())
    message = SubmitPrompt((RequestId(1),), (5,), SamplingParams(logprobs=-1))
    assert isinstance(core.handle(message, 0)[0], PromptReady)
