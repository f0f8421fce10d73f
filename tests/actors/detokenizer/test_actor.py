from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import structlog.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import TEXTS, byte_level, metaspace, wordpiece

from octavo.actors.detokenizer.actor import DetokenizerActor, DetokenizerAnswer
from octavo.actors.detokenizer.core import DetokenizerCore, DetokenizerInbox
from octavo.actors.tokenizer.hf_tokenizer import HFTokenizer
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.request import (
    CancelRequest,
    PromptReady,
    RequestEnded,
    StepTexts,
    StopMatched,
    TextDelta,
    TokenLogprobs,
)
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import StepExecuted

CODECS = {"byte_level": byte_level(), "metaspace": metaspace(), "wordpiece": wordpiece()}
CODEC = CODECS["byte_level"]


@pytest.fixture(autouse=True, scope="module")
def quiet_log() -> Iterator[None]:
    """Hundreds of tracebacks, nicely printed, take minutes."""
    with structlog.testing.capture_logs():
        yield


def per_stream(answers: Sequence[DetokenizerAnswer]) -> dict[int, list[DetokenizerAnswer]]:
    """What each stream's client hears, in order, whichever messages it came in."""
    streams: dict[int, list[DetokenizerAnswer]] = {}
    for answer in answers:
        if isinstance(answer, StepTexts):
            for request_id, text, token_id in zip(answer.request_ids, answer.texts, answer.token_ids, strict=True):
                streams.setdefault(request_id, []).append(TextDelta(request_id, text, (token_id,)))
        elif isinstance(answer, PromptReady):
            for request_id in answer.request_ids:
                streams.setdefault(request_id, []).append(answer)
        else:
            streams.setdefault(answer.request_id, []).append(answer)
    return streams


def script_of(codec: HFTokenizer, rng: random.Random) -> list[DetokenizerInbox]:
    """Messages as a scheduler and a tokenizer send them: some prompts with siblings, steps, ends, late rows."""
    eos = codec.eos_token_ids[0] if codec.eos_token_ids else 0
    waiting: list[PromptReady] = []
    next_id = 1
    for _ in range(rng.randrange(1, 5)):
        n = rng.choice([1, 1, 2, 3])
        max_tokens = rng.choice([0, 1, 3, 8, 40])
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            min_tokens=rng.choice([0, 0, 2]),
            stop=tuple(rng.sample(["the", " ", "o", "世界", "🎊", "over the", "e\u0301"], rng.choice([0, 0, 1, 3]))),
            include_stop_str_in_output=rng.random() < 0.3,
            skip_special_tokens=rng.random() < 0.6,
            spaces_between_special_tokens=rng.random() < 0.5,
            logprobs=rng.choice([None, None, 0]),
            prompt_logprobs=0 if max_tokens == 0 else rng.choice([None, None, 0]),
        )
        prompt = tuple(rng.randrange(codec.vocab_size) for _ in range(rng.randrange(1, 9)))
        waiting.append(PromptReady(tuple(RequestId(next_id + i) for i in range(n)), prompt, params))
        next_id += n
    live: dict[RequestId, tuple[PromptReady, list[int], int]] = {}
    computed: dict[RequestId, int] = {}
    script: list[DetokenizerInbox] = []
    while waiting or live:
        if waiting and (not live or rng.random() < 0.2):
            ready = waiting.pop()
            script.append(ready)
            for request_id in ready.request_ids:
                text = codec.encode(rng.choice(TEXTS), False)
                wild = [rng.randrange(codec.vocab_size) for _ in range(20)]
                tokens = [token for token in rng.choice([text, wild]) if token != eos]
                num_tokens = rng.randrange(1, (ready.params.max_tokens or 1) + 1)
                live[request_id] = (ready, (tokens * 3)[:num_tokens], 0)
                computed[request_id] = 1
            continue
        rows: list[tuple[RequestId, int]] = []
        stopped: list[RequestId] = []
        logprobs: list[tuple[RequestId, TokenLogprobs]] = []
        prompt_logprobs: list[tuple[RequestId, int, tuple[TokenLogprobs, ...]]] = []
        ends: list[RequestEnded] = []
        for request_id, (ready, tokens, position) in list(live.items()):
            if rng.random() < 0.3:
                continue
            params, prompt = ready.params, ready.prompt_token_ids
            if params.prompt_logprobs is not None and position == 0:
                first = computed[request_id] if rng.random() < 0.8 else 1  # taken up again: from the beginning
                last = rng.randrange(first, len(prompt)) + 1 if first < len(prompt) else len(prompt)
                entries = tuple(TokenLogprobs(prompt[i], -float(i), i) for i in range(first, last))
                prompt_logprobs.append((request_id, first, entries))
                computed[request_id] = last
                if last < len(prompt):
                    continue
            is_eos = position >= params.min_tokens and rng.random() < 0.05
            token = eos if is_eos else tokens[position]
            rows.append((request_id, token))
            if params.logprobs is not None:
                logprobs.append((request_id, TokenLogprobs(token, -0.5, 1)))
            position += 1
            live[request_id] = (ready, tokens, position)
            if is_eos:
                stopped.append(request_id)
                ends.append(RequestEnded(request_id, "stop", position, stop_token_id=eos))
            elif position == len(tokens):
                reason = "length" if position == params.max_tokens or params.max_tokens == 0 else "abort"
                ends.append(RequestEnded(request_id, reason, 0 if params.max_tokens == 0 else position))
            elif rng.random() < 0.02:
                ends.append(RequestEnded(request_id, rng.choice(["abort", "error"]), position, error_code="x"))
        if rng.random() < 0.2:
            rows.append((RequestId(1000), 5))  # of nobody
        executed = StepExecuted(
            Epoch(0),
            StepId(len(script)),
            tuple(request_id for request_id, _ in rows),
            tuple(token for _, token in rows),
            stopped=tuple(stopped),
            logprobs=tuple(logprobs),
            prompt_logprobs=tuple(prompt_logprobs),
        )
        early = rng.random() < 0.2  # the account comes before the last tokens
        script += [*ends, executed] if early else [executed, *ends]
        for ended in ends:
            del live[ended.request_id]
        if live and rng.random() < 0.02:
            request_id = rng.choice(list(live))
            del live[request_id]
            script.append(CancelRequest(request_id))
    return script


def undisturbed(codec: HFTokenizer, script: list[DetokenizerInbox]) -> dict[int, list[DetokenizerAnswer]]:
    core = DetokenizerCore(codec)
    answers = per_stream([answer for message in script for answer in core.handle(message, 0)])
    assert core.num_streams == 0
    return answers


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(CODECS)), st.integers(0, 2**32), st.floats(0, 0.6))
def test_f_19_wherever_the_core_crashes_every_stream_hears_exactly_what_it_would_have_heard(
    name: str, seed: int, rate: float
) -> None:
    codec, rng = CODECS[name], random.Random(seed)
    script = script_of(codec, rng)
    actor = DetokenizerActor(lambda: DetokenizerCore(codec))
    answers: list[DetokenizerAnswer] = []
    num_crashes = 0
    for message in script:
        if rng.random() < rate:
            actor.crash()
            num_crashes += 1
        answers += actor.handle(message, 0)
    assert actor.num_restarts == num_crashes
    assert actor.num_failed_streams == 0
    assert per_stream(answers) == undisturbed(codec, script)
    assert actor.num_streams == 0
    assert actor.num_noted_streams == 0, "nothing of a stream that ended is kept"


class PoisonedCore(DetokenizerCore):
    """Fails whenever it meets what poisons it, after having begun with the message."""

    def __init__(
        self,
        codec: HFTokenizer,
        poison: dict[RequestId, int],
        *,
        even_to_open: bool = False,
        error: type[BaseException] = RuntimeError,
    ) -> None:
        super().__init__(codec)
        self._error = error
        self._poison = poison
        self._even_to_open = even_to_open
        self._seen: dict[RequestId, int] = {}

    def handle(self, message: DetokenizerInbox, now_ns: int):  # type: ignore[no-untyped-def]
        answers = super().handle(message, now_ns)
        if isinstance(message, StepExecuted):
            for request_id in message.request_ids:
                self._seen[request_id] = self._seen.get(request_id, 0) + 1
                if self._seen[request_id] == self._poison.get(request_id, 0):
                    raise self._error("poison")
        elif (
            isinstance(message, PromptReady)
            and self._even_to_open
            and not self._poison.keys().isdisjoint(message.request_ids)
        ):
            raise RuntimeError("poison")
        return answers


class Panic(BaseException):
    """As a library in another language panics."""


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.3), st.sampled_from([RuntimeError, Panic]))
def test_f_19_a_stream_that_poisons_the_core_ends_with_one_typed_error_and_the_others_never_notice(
    seed: int, rate: float, error: type[BaseException]
) -> None:
    rng = random.Random(seed)
    script = script_of(CODEC, rng)
    expected = undisturbed(CODEC, script)
    poison = {RequestId(i): rng.randrange(1, 6) for i in expected if rng.random() < 0.4 and i != 1000}
    actor = DetokenizerActor(lambda: PoisonedCore(CODEC, poison, error=error))
    answers: list[DetokenizerAnswer] = []
    for message in script:
        if rng.random() < rate:
            actor.crash()
        answers += actor.handle(message, 0)
    heard = per_stream(answers)
    num_failed = 0
    for request_id, clean in expected.items():
        mine = heard[request_id]
        errors = [a for a in mine if isinstance(a, TextDelta) and a.ended and a.ended.error_code == "request_failed"]
        if not errors:
            assert mine == clean
            continue
        num_failed += 1
        assert request_id in poison
        *before, last, cancel = mine
        assert before == clean[: len(before)], "what it had before the poison stays as it was"
        assert errors == [last]
        assert cancel == CancelRequest(RequestId(request_id))
        assert isinstance(last, TextDelta)
        assert last.finish_reason == "error"
        assert last.ended is not None
        assert last.ended.num_output_tokens == poison[RequestId(request_id)] - 1
        assert "poison" in last.ended.error
    assert actor.num_failed_streams == num_failed
    assert (actor.num_streams, actor.num_noted_streams) == (0, 0)


def ready(*ids: int, **fields: object) -> PromptReady:
    params = SamplingParams(n=len(ids), max_tokens=100, **fields)  # type: ignore[arg-type]
    return PromptReady(tuple(map(RequestId, ids)), (5, 6), params)


def step(*rows: tuple[int, int]) -> StepExecuted:
    return StepExecuted(Epoch(0), StepId(0), tuple(RequestId(r[0]) for r in rows), tuple(r[1] for r in rows))


def test_a_prompt_whose_streams_cannot_be_opened_fails_alone() -> None:
    actor = DetokenizerActor(lambda: PoisonedCore(CODEC, {RequestId(2): 99}, even_to_open=True))
    actor.handle(ready(1), 0)
    first, cancel_first, second, cancel_second = actor.handle(ready(2, 3), 0)
    assert [answer.request_id for answer in (first, second)] == [2, 3]  # type: ignore[union-attr]
    assert (cancel_first, cancel_second) == (CancelRequest(RequestId(2)), CancelRequest(RequestId(3)))
    letter = CODEC.encode("f", False)[0]
    assert actor.handle(step((1, letter), (2, letter), (3, letter)), 0) == [TextDelta(RequestId(1), "f", (letter,))]


def test_a_stream_that_cannot_be_replayed_is_the_only_one_lost_by_a_crash() -> None:
    poison: dict[RequestId, int] = {}
    actor = DetokenizerActor(lambda: PoisonedCore(CODEC, poison))
    letter = CODEC.encode("f", False)[0]
    actor.handle(ready(1, 2), 0)
    actor.handle(step((1, letter), (2, letter)), 0)
    poison[RequestId(2)] = 1  # met only by a core that begins again
    actor.crash()
    failed, cancel, last = actor.handle(step((1, letter), (2, letter)), 0)
    assert isinstance(failed, TextDelta)
    assert (failed.request_id, failed.finish_reason) == (2, "error")
    assert cancel == CancelRequest(RequestId(2))
    assert last == StepTexts((RequestId(1),), ("f",), (letter,))


@pytest.mark.parametrize("crashes_at", range(4))
def test_prompt_logprobs_that_were_interrupted_come_once_and_whole(crashes_at: int) -> None:
    prompt = (5, 6, 7, 8)
    params = SamplingParams(max_tokens=4, prompt_logprobs=0)
    entries = tuple(TokenLogprobs(token, -1.0, 1) for token in prompt)
    one = RequestId(1)

    def part(first: int, last: int, *tokens: int) -> StepExecuted:
        ids = (one,) * len(tokens)
        return StepExecuted(Epoch(0), StepId(0), ids, tokens, prompt_logprobs=((one, first, entries[first:last]),))

    # Half of it; the engine dies; the whole again, with the first token; once more, after another death.
    script = [PromptReady((one,), prompt, params), part(1, 3), part(1, 4, 9), part(1, 4, 9)]
    actor = DetokenizerActor(lambda: DetokenizerCore(CODEC))
    answers: list[DetokenizerAnswer] = []
    for i, message in enumerate(script):
        if i == crashes_at:
            actor.crash()
        answers += actor.handle(message, 0)
    told = [answer.prompt_logprobs for answer in per_stream(answers)[one] if isinstance(answer, TextDelta)]
    assert told == [(None, *entries[1:]), ()]


def test_a_stop_string_that_was_matched_is_not_matched_again_by_a_new_core() -> None:
    actor = DetokenizerActor(lambda: DetokenizerCore(CODEC))
    f, o = (CODEC.encode(char, False)[0] for char in "fo")
    one = RequestId(1)
    actor.handle(ready(1, stop=("oo",)), 0)
    answers = [*actor.handle(step((1, f)), 0), *actor.handle(step((1, o)), 0), *actor.handle(step((1, o)), 0)]
    assert StopMatched(one) in answers
    actor.crash()
    assert actor.handle(step((1, f)), 0) == []
    (last,) = actor.handle(RequestEnded(one, "stop", 4), 0)
    assert isinstance(last, TextDelta)
    assert (last.finish_reason, last.stop_reason, last.text) == ("stop", "oo", "")
    assert actor.num_restarts == 1


def test_a_new_core_ends_a_stream_at_its_first_stop_token() -> None:
    eos, letter, one = CODEC.eos_token_ids[0], CODEC.encode("f", False)[0], RequestId(1)
    stop = StepExecuted(Epoch(0), StepId(0), (one,), (eos,), stopped=(one,))
    lasts = []
    for crashes in (False, True):
        actor = DetokenizerActor(lambda: DetokenizerCore(CODEC))
        # The step behind it was under way already, and its token would stop, too.
        for message in (ready(1), step((1, letter)), stop, stop):
            actor.handle(message, 0)
        if crashes:
            actor.crash()
        lasts.append(actor.handle(RequestEnded(one, "abort", 1), 0))
    assert lasts[0] == lasts[1]
    (last,) = lasts[0]
    assert isinstance(last, TextDelta)
    assert last.ended is not None
    assert last.ended.num_output_tokens == 2


def test_a_stream_that_fails_at_its_end_is_not_cancelled() -> None:
    class FailsAtTheEnd(DetokenizerCore):
        def handle(self, message: DetokenizerInbox, now_ns: int):  # type: ignore[no-untyped-def]
            if isinstance(message, RequestEnded):
                raise RuntimeError("poison")
            return super().handle(message, now_ns)

    actor = DetokenizerActor(lambda: FailsAtTheEnd(CODEC))
    actor.handle(ready(1), 0)
    (last,) = actor.handle(RequestEnded(RequestId(1), "length", 0), 0)
    assert isinstance(last, TextDelta)
    assert last.finish_reason == "error"
