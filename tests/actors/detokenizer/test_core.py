from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEXTS, byte_level, metaspace, wordpiece

from octavo.actors.detokenizer.core import DetokenizerCore, DetokenizerOutbox
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.request import (
    CancelRequest,
    FinishReason,
    PromptReady,
    RequestEnded,
    StepTexts,
    StopMatched,
    TextDelta,
    TokenLogprobs,
)
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted

CODEC = byte_level()
EOS = CODEC.eos_token_ids[0]
ONE = RequestId(1)


def open_stream(
    params: SamplingParams, *, prompt: tuple[int, ...] = (5, 6), ids: tuple[int, ...] = (1,)
) -> DetokenizerCore:
    core = DetokenizerCore(CODEC)
    ready = PromptReady(tuple(RequestId(i) for i in ids), prompt, params)
    assert core.handle(ready, 0) == [ready]
    return core


def step(
    *rows: tuple[int, int],
    stopped: tuple[int, ...] = (),
    logprobs: tuple[tuple[RequestId, TokenLogprobs], ...] = (),
    prompt_logprobs: tuple[tuple[RequestId, int, tuple[TokenLogprobs, ...]], ...] = (),
) -> StepExecuted:
    return StepExecuted(
        Epoch(0),
        StepId(0),
        tuple(RequestId(row[0]) for row in rows),
        tuple(row[1] for row in rows),
        stopped=tuple(RequestId(i) for i in stopped),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def one_by_one(answers: list[DetokenizerOutbox]) -> list[DetokenizerOutbox]:
    """A step's texts as the deltas that they stand for."""
    deltas: list[DetokenizerOutbox] = []
    for answer in answers:
        if isinstance(answer, StepTexts):
            rows = zip(answer.request_ids, answer.texts, answer.token_ids, strict=True)
            deltas += [TextDelta(request_id, text, (token_id,)) for request_id, text, token_id in rows]
        else:
            deltas.append(answer)
    return deltas


class Client:
    """What a front end makes of the deltas of stream 1."""

    def __init__(self, core: DetokenizerCore) -> None:
        self.core = core
        self.text = ""
        self.token_ids: list[int] = []
        self.last: TextDelta | None = None
        self.stop_matched = 0

    def take(self, message: StepExecuted | RequestEnded) -> list[TextDelta]:
        deltas = []
        for answer in one_by_one(self.core.handle(message, 0)):
            if isinstance(answer, StopMatched):
                self.stop_matched += 1
                continue
            assert isinstance(answer, TextDelta)
            assert self.last is None, "nothing comes after the last delta"
            self.text += answer.text
            self.token_ids += answer.token_ids
            assert (answer.finish_reason is None) == (answer.ended is None)
            self.last = answer if answer.finish_reason else None
            deltas.append(answer)
        return deltas


def ids_of(text: str) -> list[int]:
    return CODEC.encode(text, False)


def ended(reason: FinishReason, num_output_tokens: int, **fields: object) -> RequestEnded:
    return RequestEnded(ONE, reason, num_output_tokens, **fields)  # type: ignore[arg-type]


def test_a_step_gives_each_open_stream_its_token_and_ignores_the_others() -> None:
    core = open_stream(SamplingParams(max_tokens=10), ids=(1, 2))
    a, b = ids_of("f")[0], ids_of("g")[0]
    assert core.handle(step((2, a), (7, a), (1, b)), 0) == [
        TextDelta(RequestId(2), "f", (a,)),
        TextDelta(ONE, "g", (b,)),
    ]


def test_rows_whose_text_is_their_own_come_in_one_message_and_the_others_by_themselves() -> None:
    core = DetokenizerCore(CODEC)
    for i in (1, 2, 3):
        params = SamplingParams(max_tokens=10, logprobs=0 if i == 2 else None)
        core.handle(PromptReady((RequestId(i),), (5, 6), params), 0)
    a, b, c = (ids_of(text)[0] for text in "fgh")
    assert len(core.handle(step((1, a), (2, b), (3, c)), 0)) == 3  # first tokens
    rows = step((3, a), (2, b), (9, b), (1, c), logprobs=((RequestId(2), TokenLogprobs(b, -0.5, 1)),))
    assert core.handle(rows, 0) == [
        TextDelta(RequestId(2), "g", (b,), (TokenLogprobs(b, -0.5, 1),)),
        StepTexts((RequestId(3), ONE), ("f", "h"), (a, c)),
    ]
    rows = step((1, a), (3, b))
    (together,) = core.handle(rows, 0)
    assert together == StepTexts((ONE, RequestId(3)), ("f", "g"), (a, b))
    assert core.handle(step((2, a)), 0) == [TextDelta(RequestId(2), "f", (a,))]


stop_strings = st.lists(
    st.sampled_from(["the", " ", "o", "User:", "e\u0301", "世界", "🎊", "\n\n", "over the", "zzz"]), max_size=3
)


@settings(max_examples=300)
@given(
    st.sampled_from(TEXTS).map(ids_of) | st.lists(st.integers(0, CODEC.vocab_size - 1), max_size=40),
    stop_strings,
    st.booleans(),
    st.integers(0, 8),
    st.integers(0, 60),
    st.sampled_from(["length", "token"]),
)
def test_a_stream_equals_its_whole_whatever_stops_it_and_whenever_the_account_comes(
    ids: list[int], stops: list[str], include: bool, min_tokens: int, when: int, how: str
) -> None:
    ids = [token_id for token_id in ids if token_id != EOS]
    if how == "token":
        ids.append(EOS)
    num_tokens = len(ids)
    params = SamplingParams(
        max_tokens=max(1, num_tokens) if how == "length" else 1000,
        stop=tuple(stops),
        include_stop_str_in_output=include,
        min_tokens=min_tokens,
    )
    client = Client(open_stream(params))
    account = (
        ended("stop", num_tokens, stop_token_id=EOS, num_cached_tokens=3)
        if how == "token"
        else ended("length", num_tokens, num_cached_tokens=3)
    )
    for i, token_id in enumerate(ids):
        if i == when:
            client.take(account)
        if client.last is None:
            client.take(step((1, token_id), stopped=(1,) if token_id == EOS else ()))
    if client.last is None and when >= num_tokens:
        client.take(account)
    assert client.core.num_streams == 0
    assert client.last is not None
    assert client.last.ended is not None
    assert client.last.ended.num_cached_tokens == 3
    assert client.last.ended.num_output_tokens == len(client.token_ids)
    assert client.token_ids == ids[: len(client.token_ids)]
    # By definition: the whole, cut where the first stop string ends that a token past `min_tokens` took part in.
    cut = None
    for n in range(1, num_tokens + 1):
        whole, before = CODEC.decode(ids[:n]), CODEC.decode(ids[: max(min_tokens, 0)])
        if n < num_tokens:
            whole = whole.rstrip("\N{REPLACEMENT CHARACTER}")
        before = before.rstrip("\N{REPLACEMENT CHARACTER}")
        found = [
            (i + len(s), i, s)
            for s in stops
            for i in range(len(whole))
            if whole.startswith(s, i) and (min_tokens == 0 or i + len(s) > len(before))
        ]
        if n > min_tokens and found:
            cut = min(found)
            break
    if cut is None:
        assert client.last.finish_reason == ("stop" if how == "token" else "length")
        assert client.text == CODEC.decode(ids)
        assert not client.stop_matched
    else:
        end, start, stop = cut
        assert (client.last.finish_reason, client.last.stop_reason) == ("stop", stop)
        assert client.last.ended.reason == "stop"
        assert client.stop_matched == 1
        assert client.text == CODEC.decode(ids)[: end if include else start]


def test_a_stop_string_stops_at_once_and_waits_for_the_account() -> None:
    client = Client(open_stream(SamplingParams(max_tokens=1000, stop=("ob",))))
    tokens = [ids_of(char)[0] for char in "foobar"]
    texts = [client.take(step((1, token)))[0].text for token in tokens[:4]]
    assert texts == ["f", "", "o", ""]
    assert client.stop_matched == 1
    assert client.take(step((1, tokens[4]))) == []  # sampled before the scheduler heard of it
    client.take(ended("stop", 5, num_cached_tokens=1, num_preemptions=2))
    assert client.last == TextDelta(
        ONE,
        "",
        finish_reason="stop",
        stop_reason="ob",
        ended=ended("stop", 4, num_cached_tokens=1, num_preemptions=2),
    )


@pytest.mark.parametrize("reason", ["length", "abort", "error"])
def test_an_answer_that_a_stop_string_completed_is_whole_whatever_happened_then(reason: FinishReason) -> None:
    client = Client(open_stream(SamplingParams(max_tokens=1000, stop=("o",))))
    client.take(step((1, ids_of("o")[0])))
    client.take(ended(reason, 3, error_code="executor_lost" if reason == "error" else ""))
    assert client.last is not None
    assert client.last.ended == ended("stop", 1)


def test_held_text_comes_with_the_last_token() -> None:
    client = Client(open_stream(SamplingParams(max_tokens=2, stop=("oops",))))
    token = ids_of("o")[0]
    assert [client.take(step((1, token)))[0].text for _ in range(2)] == ["", "oo"]
    assert client.take(step((1, token))) == []
    client.take(ended("length", 2))
    assert client.last is not None
    assert client.last.finish_reason == "length"


@pytest.mark.parametrize(
    ("params", "token", "text", "stop_reason"),
    [
        (SamplingParams(max_tokens=9), EOS, "", None),
        (SamplingParams(max_tokens=9, skip_special_tokens=False), EOS, "", None),
        (SamplingParams(max_tokens=9, skip_special_tokens=False, include_stop_str_in_output=True), EOS, "</s>", None),
        (SamplingParams(max_tokens=9, include_stop_str_in_output=True), EOS, "", None),
        (SamplingParams(max_tokens=9, stop_token_ids=(ids_of("f")[0],)), ids_of("f")[0], "", ids_of("f")[0]),
        (
            SamplingParams(max_tokens=9, stop_token_ids=(ids_of("f")[0],), include_stop_str_in_output=True),
            ids_of("f")[0],
            "f",
            ids_of("f")[0],
        ),
        (SamplingParams(max_tokens=9, stop_token_ids=(EOS,)), EOS, "", None),
        (SamplingParams(max_tokens=9, stop_token_ids=(EOS,), ignore_eos=True), EOS, "", EOS),
    ],
)
def test_the_token_that_stops_is_counted_and_its_text_left_out_unless_asked_for(
    params: SamplingParams, token: int, text: str, stop_reason: int | None
) -> None:
    client = Client(open_stream(params))
    client.take(step((1, ids_of("g")[0])))
    client.take(step((1, token), stopped=(1,)))
    client.take(ended("stop", 2, stop_token_id=token))
    assert client.text == "g" + text
    assert client.token_ids == [ids_of("g")[0], token]
    assert client.last is not None
    assert (client.last.finish_reason, client.last.stop_reason) == ("stop", stop_reason)


def test_an_unfinished_character_is_flushed_with_the_last_token_and_never_before() -> None:
    tokens = [CODEC._fast.token_to_id(c) for c in CODEC._fast.pre_tokenizer.pre_tokenize_str("𝄞")[0][0]]
    client = Client(open_stream(SamplingParams(max_tokens=6)))
    texts = [client.take(step((1, token)))[0].text for token in [*tokens, *tokens[:2]]]
    assert texts == ["", "", "", "𝄞", "", "\N{REPLACEMENT CHARACTER}"]


def test_a_cancelled_stream_is_dropped_and_its_end_says_nothing() -> None:
    core = open_stream(SamplingParams(max_tokens=6))
    assert core.handle(CancelRequest(ONE), 0) == []
    assert core.num_streams == 0
    assert core.handle(step((1, 5)), 0) == []
    assert core.handle(ended("abort", 0), 0) == []


@pytest.mark.parametrize("reason", ["abort", "error", "refused"])
def test_a_stream_that_ends_early_sends_what_it_held_and_the_reason(reason: FinishReason) -> None:
    client = Client(open_stream(SamplingParams(max_tokens=6, stop=("oops",))))
    client.take(step((1, ids_of("o")[0])))
    client.take(ended(reason, 1, error_code="x", error="y"))
    assert client.last == TextDelta(ONE, "o", finish_reason=reason, ended=ended(reason, 1, error_code="x", error="y"))


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_account_that_missed_the_last_step_counts_the_tokens_that_were_sent(reason: FinishReason) -> None:
    client = Client(open_stream(SamplingParams(max_tokens=6)))
    client.take(step((1, ids_of("o")[0])))
    client.take(ended(reason, 0))
    assert client.last is not None
    assert client.last.ended == ended(reason, 1)


def test_tokens_that_never_come_after_an_error_are_not_waited_for() -> None:
    client = Client(open_stream(SamplingParams(max_tokens=6)))
    client.take(ended("error", 3, error_code="executor_lost"))
    assert client.last is not None
    assert client.last.ended is not None
    assert client.last.ended.num_output_tokens == 3, "the scheduler's account, though the tokens never came"
    assert client.core.num_streams == 0


def test_a_refusal_by_the_tokenizer_reaches_the_front_end_though_no_stream_was_opened() -> None:
    refused = ended("refused", 0, error_code="context_length_exceeded", error="too long")
    assert DetokenizerCore(CODEC).handle(refused, 0) == [TextDelta(ONE, "", finish_reason="refused", ended=refused)]


def test_logprobs_stand_beside_their_tokens_and_prompt_logprobs_with_the_first() -> None:
    prompt = (5, 6, 7)
    core = open_stream(SamplingParams(max_tokens=2, logprobs=0, prompt_logprobs=0), prompt=prompt)
    client = Client(core)
    known = tuple(TokenLogprobs(token, -1.0, 1) for token in prompt)
    chosen = TokenLogprobs(9, -0.25, 1)
    assert client.take(step(prompt_logprobs=((ONE, 1, known[1:2]),))) == []
    (first,) = client.take(step((1, 9), logprobs=((ONE, chosen),), prompt_logprobs=((ONE, 2, known[2:]),)))
    assert first.prompt_logprobs == (None, *known[1:])
    assert first.logprobs == (chosen,)
    (second,) = client.take(
        step((1, 9), logprobs=((ONE, chosen),), prompt_logprobs=((ONE, 1, known[1:]),))  # taken up again
    )
    assert (second.prompt_logprobs, second.logprobs) == ((), (chosen,))


@pytest.mark.parametrize(("num_counted", "account_first"), [(0, False), (0, True), (1, False), (1, True)])
def test_max_tokens_0_gives_the_prompts_logprobs_and_no_token(num_counted: int, account_first: bool) -> None:
    client = Client(open_stream(SamplingParams(max_tokens=0, prompt_logprobs=0), prompt=(5, 6)))
    known = TokenLogprobs(6, -1.0, 1)
    executed = step((1, EOS), stopped=(1,), prompt_logprobs=((ONE, 1, (known,)),))
    account = ended("stop", num_counted, stop_token_id=EOS)
    deltas = [d for m in ([account, executed] if account_first else [executed, account]) for d in client.take(m)]
    assert (client.text, client.token_ids) == ("", [])
    assert [d.prompt_logprobs for d in deltas if d.prompt_logprobs] == [(None, known)]
    assert client.last is not None
    assert client.last.finish_reason == "length"
    assert client.last.ended == ended("length", 0)


@pytest.mark.parametrize("make_codec", [byte_level, metaspace, wordpiece])
def test_siblings_of_any_tokenizer_stream_to_the_text_after_their_prompt(make_codec: object) -> None:
    codec = make_codec()  # type: ignore[operator]
    core = DetokenizerCore(codec)
    prompt, output = codec.encode("the dog", True), codec.encode("hello the dog", False)
    core.handle(PromptReady((ONE, RequestId(2)), tuple(prompt), SamplingParams(n=2, max_tokens=len(output))), 0)
    texts = {1: "", 2: ""}
    for token in output:
        for delta in one_by_one(core.handle(step((2, token), (1, token)), 0)):
            assert isinstance(delta, TextDelta)
            texts[delta.request_id] += delta.text
    whole = codec.decode([*prompt, *output])[len(codec.decode(prompt)) :]
    assert texts == {1: whole, 2: whole}


def test_the_bench_runs() -> None:
    from octavo.actors.detokenizer import bench

    assert bench.microseconds_per_step(SamplingParams(max_tokens=1000, stop=("#",)), num_steps=3) > 0
