from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import pytest
import structlog.testing

from octavo.actors.tokenizer.actor import LONG_PROMPT_CHARS, TokenizerActor
from octavo.actors.tokenizer.core import TokenizerConfig, TokenizerCore
from octavo.actors.tokenizer.job_threads import JobThreads
from octavo.actors.tokenizer.poison import MAX_ENTRIES, TTL_NS, PoisonedPrompts
from octavo.messages.base import Message
from octavo.messages.ids import RequestId
from octavo.messages.request import CancelRequest, ChatPrompt, PromptReady, RequestEnded, SubmitPrompt, SubmitRequest
from octavo.messages.sampling import SamplingParams

LONG = "a" * LONG_PROMPT_CHARS


class Panic(BaseException):
    """As a library in another language panics: no `Exception`."""


class Codec:
    """Does with a text what the test says, on whatever thread."""

    eos_token_ids = (0,)

    def __init__(self) -> None:
        self.acts: dict[str, list[Callable[[], None]]] = {}
        self.num_calls: dict[str, int] = {}

    max_token_chars: int | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.num_calls[text] = self.num_calls.get(text, 0) + 1
        acts = self.acts.get(text, [])
        if acts:
            (acts.pop(0) if len(acts) > 1 else acts[0])()
        return [1] * min(len(text), 9)

    def render_chat(self, prompt: ChatPrompt) -> str:
        return prompt.messages_json.decode()


def fine() -> None:
    pass


def panic() -> None:
    raise Panic("poison")


class Bench:
    """A tokenizer actor, what it said, and the deadlines of its workers, which pass when the test says so."""

    def __init__(self, **threads: Any) -> None:
        self.codec = Codec()
        self.said: list[Message] = []
        self.came = asyncio.Event()
        self.deadlines: list[Callable[[], object]] = []
        self.failures: list[Exception] = []
        self.release = threading.Event()
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def keep(delay: float, callback: Callable[..., object], *args: Any) -> asyncio.TimerHandle:
            if delay == 30.0:
                self.deadlines.append(lambda: callback(*args))
            return call_later(delay, callback, *args)

        loop.call_later = keep  # type: ignore[method-assign, assignment]
        self.workers: JobThreads[Any] = JobThreads(**threads)
        core = TokenizerCore(TokenizerConfig(vocab_size=100, max_model_len=64), self.codec)
        self.actor = TokenizerActor(core, self, workers=self.workers)

    def send_all(self, sender: str, messages: Iterable[Message]) -> None:
        self.said += messages
        self.came.set()

    def fail(self, address: str, error: Exception) -> None:
        self.failures.append(error)

    def hang(self) -> None:
        self.release.wait()

    def ask(self, request_id: int, text: str, now_ns: int = 0) -> None:
        message = SubmitPrompt((RequestId(request_id),), text, SamplingParams(max_tokens=4))
        self.said += self.actor.handle(message, now_ns)

    async def until(self, count: int) -> None:
        while len(self.said) < count:
            self.came.clear()
            await self.came.wait()

    async def called(self, text: str, times: int) -> None:
        while self.codec.num_calls.get(text, 0) < times:
            await asyncio.sleep(0)


def run(test: Callable[[Bench], Coroutine[Any, Any, None]], **threads: Any) -> None:
    async def main() -> None:
        bench = Bench(**threads)
        try:
            await asyncio.wait_for(test(bench), 60)
            assert bench.failures == []
        finally:
            await bench.actor.close()
            bench.release.set()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def quiet_log() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


def kinds(said: list[Message]) -> list[type]:
    return [type(message) for message in said]


def test_short_prompts_are_answered_at_once_and_long_ones_from_a_worker() -> None:
    async def check(bench: Bench) -> None:
        bench.ask(1, "short")
        assert kinds(bench.said) == [PromptReady, SubmitRequest]
        bench.ask(2, LONG)
        assert len(bench.said) == 2
        await bench.until(4)
        assert bench.said[2].request_ids == (2,)  # type: ignore[attr-defined]
        assert bench.workers.num_restarts == 0

    run(check)


@pytest.mark.parametrize("text", ["short", LONG])
def test_f_17_an_exception_is_the_end_of_its_own_request_alone(text: str) -> None:
    async def check(bench: Bench) -> None:
        def fails() -> None:
            raise ValueError("no such letter")

        bench.codec.acts[text] = [fails]
        bench.ask(1, text)
        await bench.until(1)
        (ended,) = bench.said
        assert isinstance(ended, RequestEnded)
        assert (ended.reason, ended.error_code, ended.error_param) == ("refused", "invalid_request", "prompt")
        bench.ask(2, "other")
        assert kinds(bench.said[1:]) == [PromptReady, SubmitRequest]
        assert bench.workers.num_restarts == 0

    run(check)


@pytest.mark.parametrize("text", ["short", LONG])
def test_f_18_a_prompt_whose_worker_died_is_tried_once_more_and_its_cancel_stays_behind_it(text: str) -> None:
    async def check(bench: Bench) -> None:
        bench.codec.acts[text] = [panic, fine]
        bench.ask(1, text)
        bench.said += bench.actor.handle(CancelRequest(RequestId(1)), 0)
        bench.said += bench.actor.handle(CancelRequest(RequestId(9)), 0)
        await bench.until(4)
        assert kinds(bench.said) == [CancelRequest, PromptReady, SubmitRequest, CancelRequest]
        assert (bench.codec.num_calls[text], bench.actor.num_restarts) == (2, 1)

    run(check)


@pytest.mark.parametrize("text", ["short", LONG])
def test_f_18_a_prompt_that_kills_its_workers_twice_is_refused_and_remembered_for_ten_minutes(text: str) -> None:
    async def check(bench: Bench) -> None:
        bench.codec.acts[text] = [panic]
        bench.ask(1, text)
        await bench.until(1)
        assert isinstance(bench.said[0], RequestEnded)
        assert "crashed the tokenizer, 2 times" in bench.said[0].error
        bench.ask(2, text, now_ns=TTL_NS - 1)
        bench.ask(3, text + "b")
        await bench.until(4)
        assert isinstance(bench.said[1], RequestEnded)
        assert (bench.said[1].request_id, bench.said[1].error) == (2, bench.said[0].error)
        assert (bench.codec.num_calls[text], bench.actor.num_restarts) == (2, 2)
        bench.codec.acts[text] = [fine]
        bench.ask(4, text, now_ns=TTL_NS)
        await bench.until(6)
        assert bench.codec.num_calls[text] == 3, "tried again once it is forgotten"

    run(check)


def test_f_18_a_prompt_that_hangs_is_tried_elsewhere_then_refused_and_others_go_on_meanwhile() -> None:
    async def check(bench: Bench) -> None:
        bench.codec.acts[LONG] = [bench.hang]
        bench.ask(1, LONG)
        await bench.called(LONG, 1)
        bench.deadlines[0]()
        await bench.called(LONG, 2)
        bench.ask(2, LONG + "b")
        await bench.until(2)
        assert kinds(bench.said) == [PromptReady, SubmitRequest]
        bench.deadlines[1]()
        await bench.until(3)
        assert isinstance(bench.said[2], RequestEnded)
        assert "took too long, 2 times" in bench.said[2].error
        assert (bench.workers.num_abandoned, bench.actor.num_restarts) == (2, 2)
        bench.release.set()
        while bench.workers.num_abandoned:
            await asyncio.sleep(0)
        assert len(bench.said) == 3, "what comes back too late is not told"

    run(check, max_threads=2)


def test_the_first_try_may_come_back_while_the_second_is_at_work_and_is_told_once() -> None:
    async def check(bench: Bench) -> None:
        second = threading.Event()
        bench.codec.acts[LONG] = [bench.hang, lambda: second.wait() and None]
        bench.ask(1, LONG)
        await bench.called(LONG, 1)
        bench.deadlines[0]()
        await bench.called(LONG, 2)
        bench.release.set()
        await bench.until(2)
        bench.deadlines[1]()  # the second hangs too: its place is given to others
        assert bench.workers.num_abandoned == 1
        second.set()
        while bench.workers.num_abandoned:
            await asyncio.sleep(0)
        assert kinds(bench.said) == [PromptReady, SubmitRequest]

    run(check, max_threads=1)


def test_with_too_many_workers_hanging_long_prompts_are_put_off_and_short_ones_go_on() -> None:
    async def check(bench: Bench) -> None:
        bench.codec.acts[LONG] = [bench.hang]
        bench.ask(1, LONG)
        for i in range(2):
            await bench.called(LONG, i + 1)
            bench.deadlines[i]()
        await bench.until(1)
        bench.ask(2, LONG + "b")
        assert isinstance(bench.said[1], RequestEnded)
        assert bench.said[1].error_code == "queue_full"
        bench.ask(3, "short")
        assert kinds(bench.said[2:]) == [PromptReady, SubmitRequest]

    run(check, max_threads=1, max_abandoned=2)


def test_closing_waits_for_no_worker_and_what_comes_later_is_told_to_nobody() -> None:
    async def check(bench: Bench) -> None:
        bench.codec.acts[LONG] = [bench.hang]
        bench.ask(1, LONG)
        await bench.called(LONG, 1)
        await bench.actor.close()
        assert any(thread.name.startswith("octavo tokenizer") and thread.daemon for thread in threading.enumerate())
        bench.release.set()
        while any(thread.name.startswith("octavo tokenizer") for thread in threading.enumerate()):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert bench.said == []

    run(check)


def test_a_worker_that_was_told_to_die_costs_its_prompt_nothing_however_short() -> None:
    async def check(bench: Bench) -> None:
        bench.actor.crash()
        bench.ask(1, "short")
        await bench.until(2)
        bench.ask(2, "short")
        assert kinds(bench.said) == [PromptReady, SubmitRequest] * 2
        assert (bench.codec.num_calls["short"], bench.actor.num_restarts) == (2, 1)

    run(check)


def test_poisoned_prompts_are_told_apart_and_bounded() -> None:
    poisoned = PoisonedPrompts()
    prompts: list[Any] = ["a", (1, 2), (12,), ChatPrompt(b"[]"), ChatPrompt(b"[]", False), ChatPrompt(b"[", True)]
    messages = [SubmitPrompt((RequestId(0),), prompt, SamplingParams()) for prompt in prompts]
    messages.append(SubmitPrompt((RequestId(0),), "a", SamplingParams(bad_words=("b",))))
    for i, message in enumerate(messages):
        assert poisoned.find(message, 0) == ""
        poisoned.add(message, str(i), 0)
    assert [poisoned.find(message, 1) for message in messages] == [str(i) for i in range(len(messages))]
    for i in range(MAX_ENTRIES):
        poisoned.add(SubmitPrompt((RequestId(0),), str(i), SamplingParams()), "x", 2)
    assert len(poisoned) == MAX_ENTRIES
    assert poisoned.find(messages[0], 3) == ""
    assert poisoned.find(SubmitPrompt((RequestId(0),), "7", SamplingParams()), TTL_NS + 2) == ""
    assert len(poisoned) == 0
