"""The whole engine on a tiny random checkpoint: streams, ends, refusals, failures."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import process_family
import pytest
import torch
from engines import engine_on, save_servable
from http_client import serving
from tiny_models import greedy_reference, random_token_ids, reference_logits

from octavo import Engine, SamplingParams
from octavo.messages.errors import (
    ContextLengthExceededError,
    EngineClosedError,
    InvalidRequestError,
    OctavoError,
    QueueFullError,
    RequestQuarantinedError,
)
from octavo.messages.request import ChatPrompt, TextDelta

PROMPT = random_token_ids(11, seed=5)
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
until = functools.partial(process_family.until, every_s=0, timeout_s=180)  # turns of the loop, until it fails


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test on a loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    return folder, save_servable("llama", folder)


@pytest.fixture(scope="module")
def folder(checkpoint: tuple[Path, Any]) -> Path:
    return checkpoint[0]


@pytest.fixture(scope="module")
def reference(checkpoint: tuple[Path, Any]) -> Any:
    return checkpoint[1]


@asynccontextmanager
async def opened(folder: Path, **fields: Any) -> AsyncIterator[Engine]:
    """An engine that must hold no block and no request once the test is through with it."""
    async with engine_on(folder, **fields) as engine:
        yield engine
        await until(lambda: engine.stats().kv_cache_usage == 0 and engine.stats().num_live == 0)
        engine._graph.scheduler.check()
        engine._graph.allocator.check()


async def tokens_of(engine: Engine, params: SamplingParams, prompt: list[int] = PROMPT) -> list[int]:
    return (await engine.generate(prompt, params)).outputs[0].token_ids


async def settled(tasks: list[Any]) -> list[Any]:
    async with asyncio.timeout(180):
        return await asyncio.gather(*tasks, return_exceptions=True)


def fail_steps(engine: Engine, should_fail: Callable[[Any], bool]) -> None:
    """Let steps for which `should_fail(step)` raise instead of being computed."""
    runner: Any = engine._graph.executor._runner
    execute = runner.execute

    def failing(step: Any) -> Any:
        if step.request_ids and should_fail(step):
            raise RuntimeError("device-side assert")
        return execute(step)

    runner.execute = failing


# ---- streams ----


@on_loop
async def test_a_stream_s_pieces_are_the_generated_text(folder: Path, reference: Any) -> None:
    async with opened(folder) as engine:
        whole = await engine.generate(PROMPT, GREEDY)
        deltas = [delta async for delta in engine.stream(PROMPT, GREEDY)]
    assert whole.outputs[0].token_ids == greedy_reference(reference, PROMPT, 16)
    assert [token for delta in deltas for token in delta.token_ids] == whole.outputs[0].token_ids
    assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
    assert [delta.finish_reason for delta in deltas][-1] == "length"
    assert whole.prompt_token_ids == tuple(PROMPT)


@on_loop
async def test_leaving_the_loop_of_a_stream_frees_its_blocks(folder: Path) -> None:
    async with opened(folder) as engine:
        async for _ in engine.stream(PROMPT, LONG):
            break
        await until(lambda: engine.stats().num_live == 0)
        assert engine.stats().generation_tokens < 100


@on_loop
async def test_cancelling_a_task_frees_its_blocks(folder: Path) -> None:
    async with opened(folder) as engine:
        tasks = [asyncio.create_task(engine.generate(PROMPT, LONG)) for _ in range(4)]
        await until(lambda: engine.stats().generation_tokens > 3)
        for task in tasks:
            task.cancel()
        ends = await settled(tasks)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends)
        await until(lambda: engine.stats().kv_cache_usage == 0)
        assert engine.stats().num_live == 0


@on_loop
async def test_a_request_that_is_cancelled_before_it_began_is_never_computed(folder: Path) -> None:
    async with opened(folder) as engine:
        (request_id,) = engine.submit(PROMPT, GREEDY, pytest.fail)
        engine.cancel(request_id)
        engine.cancel(request_id)
        await engine.generate(PROMPT, GREEDY)
        assert engine.stats().generation_tokens <= 17  # one step may be planned past the end


@on_loop
async def test_submitting_and_cancelling_without_a_pause_is_refused_before_it_breaks_anything(folder: Path) -> None:
    params = SamplingParams(n=4, temperature=1.0, max_tokens=4, seed=1)
    async with opened(folder, max_num_seqs=4, max_num_queued_requests=4) as engine:
        num_refused = 0
        for _ in range(2000):
            try:
                for request_id in engine.submit(PROMPT, params, pytest.fail):
                    engine.cancel(request_id)
            except QueueFullError:
                num_refused += 1
        assert num_refused > 0
        await until(lambda: engine._graph.num_submitting == 0)
        assert len(await tokens_of(engine, GREEDY)) == 16
        assert engine.is_ready


# ---- life ----


@on_loop
async def test_an_engine_leaves_nothing_behind_and_can_be_opened_again(folder: Path) -> None:
    engine = engine_on(folder)
    outputs = []
    for _ in range(2):
        async with engine:
            assert engine.is_ready
            device = weakref.ref(engine._graph.executor._runner.device)  # type: ignore[union-attr]  # it runs
            outputs.append(await tokens_of(engine, GREEDY))
            live = asyncio.create_task(engine.generate(PROMPT, LONG))
            await until(lambda: engine.stats().num_running == 1)
        with pytest.raises(EngineClosedError, match="closed while the request ran"):
            await live
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("octavo-")] == []
        gc.collect()
        assert device() is None  # weights and KV are given back
        assert engine.why_not_ready == "not running"
        await engine.close()
    assert outputs[0] == outputs[1]


@on_loop
async def test_an_engine_that_runs_cannot_be_started_twice(folder: Path) -> None:
    async with opened(folder) as engine:
        with pytest.raises(RuntimeError, match="running already"):
            await engine.start()
        assert len(await tokens_of(engine, GREEDY)) == 16


@on_loop
async def test_an_engine_that_is_not_running_says_so(folder: Path) -> None:
    engine = engine_on(folder)
    for when in ("before", "after"):
        assert not engine.is_ready
        with pytest.raises(EngineClosedError, match="async with"):
            await engine.generate(PROMPT)
        with pytest.raises(EngineClosedError):
            await engine.tokenize("hello")
        with pytest.raises(EngineClosedError):
            engine.reset_prefix_cache()
        engine.cancel(3)  # type: ignore[arg-type]  # any number
        await engine.drain()
        await engine.close()
        if when == "before":
            with pytest.raises(EngineClosedError):
                engine.stats()
            async with engine:
                pass
    engine.stats()


@on_loop
async def test_a_failed_start_can_be_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on(folder)
    with monkeypatch.context() as patch:
        patch.setattr("octavo.gateway.engine_setup._load_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await engine.start()
    async with engine:
        assert len(await tokens_of(engine, GREEDY)) == 16


@on_loop
async def test_engines_that_start_at_once_load_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' lazy imports fail when two threads make them at once.
    from octavo.actors.executor.actor import ExecutorThread
    from octavo.gateway import engine_setup

    inside: list[str] = []

    def alone(name: str, load: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            assert inside == []
            inside.append(name)
            try:
                return load(*args)
            finally:
                inside.remove(name)

        return checked

    monkeypatch.setattr(engine_setup, "_load_tokenizer", alone("tokenizer", engine_setup._load_tokenizer))
    monkeypatch.setattr(ExecutorThread, "load", alone("model", ExecutorThread.load))
    engines = [engine_on(folder) for _ in range(3)]
    await asyncio.gather(*(engine.start() for engine in engines))
    outputs = await asyncio.gather(*(tokens_of(engine, GREEDY) for engine in engines))
    assert outputs[0] == outputs[1] == outputs[2]
    await asyncio.gather(*(engine.close() for engine in engines))


@on_loop
async def test_a_drain_finishes_what_was_accepted_and_takes_nothing_new(folder: Path) -> None:
    async with opened(folder) as engine:
        tasks = [asyncio.create_task(tokens_of(engine, GREEDY)) for _ in range(5)]
        await until(lambda: engine.stats().num_live == 5)
        drained = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError, match="shutting down"):
            await engine.generate(PROMPT)
        await drained
        assert all(task.done() for task in tasks) or engine.stats().num_live == 0
        assert {len(tokens) for tokens in await settled(tasks)} == {16}


@on_loop
async def test_a_deadline_ends_a_request_with_what_it_has(folder: Path) -> None:
    async with opened(folder, max_model_len=512) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
        output = await engine.generate(PROMPT, params, timeout_s=0.01)  # a quick machine is done in a tenth of a second
        assert output.outputs[0].finish_reason == "abort"
        assert len(output.outputs[0].token_ids) < 500


@on_loop
async def test_f_57_a_request_that_still_waits_at_its_deadline_ends_without_a_token_and_makes_room(
    folder: Path,
) -> None:
    async with (
        opened(folder, max_num_seqs=1, max_num_queued_requests=1, max_model_len=512) as engine,
        serving(engine, request_timeout_s=0.002, max_queue_wait_s=0.0) as client,  # all of them while one runs
    ):
        params = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
        (running,) = engine.submit(PROMPT, params, lambda _: None)
        await until(lambda: engine.stats().num_running == 1)
        for _ in range(3):  # each in the only place where one can wait
            answer = await client.complete(prompt=PROMPT, max_tokens=4)
            assert (answer.status, answer.json["choices"][0]["finish_reason"]) == (200, "abort"), answer.body
            assert answer.json["choices"][0]["text"] == "" and answer.json["usage"]["completion_tokens"] == 0
            assert (engine.stats().num_live, engine.stats().num_waiting) == (1, 0)
        events = (await client.complete(prompt=PROMPT, max_tokens=4, stream=True)).events
        assert [event["choices"][0]["finish_reason"] for event in events] == ["abort"]
        engine.cancel(running)
        assert len(await tokens_of(engine, GREEDY)) == 16


# ---- refusals ----


@on_loop
async def test_more_requests_than_the_queue_holds_are_refused(folder: Path) -> None:
    async with opened(folder, max_num_seqs=1, max_num_queued_requests=2) as engine:
        ends = await settled([tokens_of(engine, GREEDY) for _ in range(8)])
        refused = [end for end in ends if isinstance(end, QueueFullError)]
        assert len(refused) >= 5
        assert "try again later" in str(refused[0])
        assert {len(end) for end in ends if isinstance(end, list)} == {16}
        assert len(await tokens_of(engine, GREEDY)) == 16


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        (random_token_ids(40), SamplingParams(), ["32", "40"]),
        (random_token_ids(31), SamplingParams(max_tokens=9), ["32", "40", "31"]),
        ("x" * 50, SamplingParams(max_tokens=None), ["32", "50"]),
    ],
)
@on_loop
async def test_f_40_a_prompt_that_can_never_fit_is_refused_with_the_numbers(
    folder: Path, prompt: Any, params: SamplingParams, words: list[str]
) -> None:
    async with opened(folder, num_blocks=8, max_model_len=None) as engine:  # 8 blocks of 4
        assert engine.max_model_len == 32
        with pytest.raises(ContextLengthExceededError) as caught:
            await engine.generate(prompt, params)
        assert all(word in str(caught.value) for word in words)
        assert caught.value.param in ("prompt", "max_tokens")


BAD_REQUESTS: list[tuple[Any, dict[str, Any], dict[str, Any], str]] = [
    (PROMPT, {"temperature": -1.0}, {}, "temperature"),
    (PROMPT, {"temperature": float("nan")}, {}, "temperature"),
    (PROMPT, {"temperature": "hot"}, {}, "temperature"),
    (PROMPT, {"top_p": 0.0}, {}, "top_p"),
    (PROMPT, {"n": 0}, {}, "n"),
    (PROMPT, {"n": 17}, {}, "n"),
    (PROMPT, {"max_tokens": 0}, {}, "max_tokens"),
    (PROMPT, {"min_tokens": 5, "max_tokens": 4}, {}, "min_tokens"),
    (PROMPT, {"logprobs": 21}, {}, "logprobs"),
    (PROMPT, {"stop_token_ids": (256,)}, {}, "stop_token_ids"),
    (PROMPT, {"logit_bias": {-1: 1.0}}, {}, "logit_bias"),
    (PROMPT, {"allowed_token_ids": ()}, {}, "allowed_token_ids"),
    (PROMPT, {"stop": ("",)}, {}, "stop"),
    ([], {}, {}, "prompt"),
    ("", {}, {}, "prompt"),
    ([256], {}, {}, "prompt"),
    ([-1], {}, {}, "prompt"),
    ([10**30], {}, {}, "prompt"),
    (["a", "b"], {}, {}, "prompt"),
    ([1.5], {}, {}, "prompt"),
    (b"bytes", {}, {}, "prompt"),
    (7, {}, {}, "prompt"),
    ("lone \ud800 surrogate", {}, {}, "prompt"),
    (PROMPT, {}, {"priority": "high"}, "priority"),
    (PROMPT, {}, {"cache_salt": 3}, "cache_salt"),
    (PROMPT, {}, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    (PROMPT, {}, {"timeout_s": 0.0}, "timeout_s"),
    (PROMPT, {}, {"timeout_s": float("inf")}, "timeout_s"),
]


@on_loop
async def test_bad_requests_are_refused_by_name_and_harm_nobody(folder: Path) -> None:
    async with opened(folder) as engine:
        good = asyncio.create_task(tokens_of(engine, LONG))
        for prompt, fields, options, param in BAD_REQUESTS:
            with pytest.raises(InvalidRequestError) as caught:
                await engine.generate(prompt, SamplingParams(**fields), **options)
            assert caught.value.param == param, (prompt, fields, options, caught.value)
        assert len(await good) == 100
        assert engine.is_ready


@on_loop
async def test_a_conversation_without_roles_or_messages_harms_nobody(folder: Path) -> None:
    async with opened(folder) as engine:
        for messages in (b"[]", b'[{"no": "role"}]', b"[1]", b"{}", b"not json", b'[{"role": "user", "content": 3}]'):
            ends = await settled([engine.generate(ChatPrompt(messages), GREEDY)])
            assert not isinstance(ends[0], Exception) or isinstance(ends[0], InvalidRequestError), (messages, ends)
        assert len(await tokens_of(engine, GREEDY)) == 16


@on_loop
async def test_numpy_and_torch_token_ids_are_taken(folder: Path) -> None:
    async with opened(folder) as engine:
        plain = await tokens_of(engine, GREEDY)
        tensor = torch.tensor(PROMPT)
        assert (await engine.generate(tensor, GREEDY)).outputs[0].token_ids == plain  # type: ignore[arg-type]  # it works
        assert (await engine.generate(tensor.numpy(), GREEDY)).outputs[0].token_ids == plain


# ---- parameters through the whole engine ----


@on_loop
async def test_n_sequences_are_n_requests_with_the_next_seeds_that_share_the_prompt(folder: Path) -> None:
    prompt = random_token_ids(40, seed=3)
    params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=8, ignore_eos=True)
    async with opened(folder, enable_prefix_caching=False) as engine:
        output = await engine.generate(prompt, params)
        assert engine.stats().prompt_tokens <= 40 + 3 * 4  # siblings compute their last block at most
        alone = [
            await tokens_of(engine, SamplingParams(temperature=1.0, seed=11 + i, max_tokens=8, ignore_eos=True), prompt)
            for i in range(4)
        ]
    assert [one.token_ids for one in output.outputs] == alone
    assert [one.index for one in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(tokens) for tokens in alone}) == 4


@on_loop
async def test_the_end_of_one_sibling_does_not_touch_the_others(folder: Path) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
    async with opened(folder) as engine:
        whole = await engine.generate(PROMPT, params)
        told: dict[int, list[int]] = {}

        def sink(event: Any) -> None:
            if isinstance(event, TextDelta):
                told.setdefault(event.request_id, []).extend(event.token_ids)

        request_ids = engine.submit(PROMPT, params, sink)
        engine.cancel(request_ids[0])
        await until(lambda: engine.stats().num_live == 0)
        assert [told[request_id] for request_id in request_ids[1:]] == [one.token_ids for one in whole.outputs[1:]]
        assert request_ids[0] not in told


@pytest.mark.parametrize("max_num_batched_tokens", [2048, 5])
@on_loop
async def test_log_probabilities_are_those_of_the_reference(
    folder: Path, reference: Any, max_num_batched_tokens: int
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    async with opened(folder, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=4) as engine:
        outputs = [await engine.generate(PROMPT, params) for _ in range(2)]  # the second with the prefix cached
    for output in outputs:
        completion = output.outputs[0]
        everything = PROMPT + completion.token_ids
        expected = torch.log_softmax(reference_logits(reference, everything), dim=-1)
        assert output.prompt_logprobs is not None
        assert completion.logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [*output.prompt_logprobs[1:], *completion.logprobs]
        assert len(entries) == len(everything) - 1
        for position, entry in enumerate(entries):
            assert entry is not None
            row = expected[position]
            assert entry.token_id == everything[position + 1]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
            top = torch.topk(row, 2 if position < len(PROMPT) - 1 else 3)
            assert [token for token, _ in entry.top] == top.indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-3)
        assert completion.cumulative_logprob == pytest.approx(sum(one.logprob for one in completion.logprobs))


@on_loop
async def test_ends_come_as_asked_for(folder: Path, reference: Any) -> None:
    tokens = greedy_reference(reference, PROMPT, 16)

    def greedy(**fields: Any) -> SamplingParams:
        return SamplingParams(**{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **fields})

    async with opened(folder) as engine:
        token = next(token for token in tokens[3:] if tokens.index(token) >= 3)
        at = tokens.index(token)
        output = (await engine.generate(PROMPT, greedy(stop_token_ids=(token,)))).outputs[0]
        assert (output.finish_reason, output.stop_reason) == ("stop", token)
        assert output.token_ids == tokens[: at + 1]

        # Letters alone, so that text and tokens match one to one, and a stop string is sure to be found.
        letters = tuple(await engine.tokenize("abcdefgh"))
        text = (await engine.generate(PROMPT, greedy(allowed_token_ids=letters))).outputs[0].text
        assert len(text) == 16
        assert set(text) <= set("abcdefgh")
        stop = text[5:8]
        output = (await engine.generate(PROMPT, greedy(allowed_token_ids=letters, stop=(stop,)))).outputs[0]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.text == text[: text.index(stop)]
        output = (
            await engine.generate(
                PROMPT, greedy(allowed_token_ids=letters, stop=(stop,), include_stop_str_in_output=True)
            )
        ).outputs[0]
        assert output.text == text[: text.index(stop) + 3]
        word = text[:2]
        output = (await engine.generate(PROMPT, greedy(allowed_token_ids=letters, bad_words=(word,)))).outputs[0]
        assert word not in output.text

        assert await tokens_of(engine, greedy(logit_bias={100: 100.0})) == [100] * 16
        bias = {2: 100.0}  # the end token
        output = (await engine.generate(PROMPT, greedy(logit_bias=bias, ignore_eos=False))).outputs[0]
        assert (output.finish_reason, len(output.token_ids)) == ("stop", 1)
        output = (await engine.generate(PROMPT, greedy(logit_bias=bias, ignore_eos=False, min_tokens=5))).outputs[0]
        assert (output.finish_reason, len(output.token_ids)) == ("stop", 6)
        assert 2 not in output.token_ids[:5]
        assert await tokens_of(engine, greedy(logit_bias=bias)) == [2] * 16


@on_loop
async def test_an_urgent_request_passes_those_that_wait(folder: Path) -> None:
    async with opened(folder, max_num_seqs=1) as engine:
        order: list[str] = []

        async def one(name: str, priority: int) -> None:
            await engine.generate(PROMPT, GREEDY, priority=priority)
            order.append(name)

        tasks = [asyncio.create_task(one(f"patient {index}", 5)) for index in range(3)]
        await until(lambda: engine.stats().num_running == 1)
        tasks.append(asyncio.create_task(one("urgent", -5)))
        await settled(tasks)
        assert order[0] == "urgent"  # it even takes the seat of the one that runs
        assert order[1:] == ["patient 0", "patient 1", "patient 2"]


@on_loop
async def test_the_depth_of_the_pipeline_changes_no_token(folder: Path) -> None:
    outputs = []
    for depth in (1, 2, 3):
        async with opened(folder, pipeline_depth=depth, max_num_seqs=3, max_num_batched_tokens=7) as engine:
            seeded = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=12)
            prompts = [random_token_ids(5 + 3 * index, seed=index) for index in range(5)]
            outputs.append(
                await asyncio.gather(
                    *(tokens_of(engine, GREEDY, prompt) for prompt in prompts),
                    *(engine.generate(prompt, seeded) for prompt in prompts),
                )
            )
    plain = [
        [one if isinstance(one, list) else [each.token_ids for each in one.outputs] for one in run] for run in outputs
    ]
    assert plain[0] == plain[1] == plain[2]


@on_loop
async def test_three_hundred_requests_on_sixteen_seats_all_end(folder: Path) -> None:
    async with opened(folder, max_num_seqs=16, num_blocks=48) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
        prompts = [random_token_ids(3 + index % 17, seed=index) for index in range(300)]
        ends = await settled([tokens_of(engine, params, prompt) for prompt in prompts])
        assert {len(end) for end in ends} == {6}


# ---- failures ----


@pytest.mark.parametrize("params", [GREEDY, SEEDED, SamplingParams(n=3, temperature=1.0, seed=2, max_tokens=16)])
@pytest.mark.parametrize("depth", [1, 2])
@on_loop
async def test_a_failed_step_costs_no_stream_a_token(folder: Path, params: SamplingParams, depth: int) -> None:
    prompts = [random_token_ids(9 + index, seed=index) for index in range(5)]
    async with opened(folder, pipeline_depth=depth, max_num_batched_tokens=24) as engine:
        calm = await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
        countdown = iter([False] * 9 + [True])
        fail_steps(engine, lambda _: next(countdown, False))
        stormy = await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
        assert engine.stats().actor_restarts["executor"] == 1
        assert engine.is_ready
    for one, other in zip(calm, stormy, strict=True):
        assert [each.token_ids for each in one.outputs] == [each.token_ids for each in other.outputs]
        assert [each.text for each in one.outputs] == [each.text for each in other.outputs]


@on_loop
async def test_a_failure_amid_a_prompt_repeats_no_log_probability(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    for num_good in range(6):
        async with opened(folder, max_num_batched_tokens=4, max_num_seqs=2) as engine:
            countdown = iter([False] * num_good + [True])
            fail_steps(engine, lambda _, countdown=countdown: next(countdown, False))
            output = await engine.generate(PROMPT, params)
            assert engine.stats().actor_restarts["executor"] == 1
        assert output.prompt_logprobs is not None
        assert [entry and entry.token_id for entry in output.prompt_logprobs] == [None, *PROMPT[1:]], num_good
        assert [entry.token_id for entry in output.outputs[0].logprobs or ()] == output.outputs[0].token_ids


@on_loop
async def test_a_device_that_fails_for_ever_ends_every_request_and_readiness(folder: Path) -> None:
    async with engine_on(folder, max_num_seqs=8) as engine:
        fail_steps(engine, lambda _: True)
        ends = await settled([engine.generate(random_token_ids(8, seed=index), LONG) for index in range(60)])
        assert all(isinstance(end, OctavoError) for end in ends)
        assert any("device-side assert" in str(end) for end in ends)
        assert not engine.is_ready
        assert "failed too often" in engine.why_not_ready
        assert engine.is_broken
        with pytest.raises(EngineClosedError, match="device-side assert"):
            await engine.generate(PROMPT)
        assert engine.stats().num_live == 0
        await engine.drain()


@pytest.mark.parametrize("num_requests", [1, 3, 16, 64])
@on_loop
async def test_the_request_that_kills_its_executor_is_found_and_the_others_go_on(
    folder: Path, num_requests: int
) -> None:
    async with opened(folder, max_num_seqs=64, num_blocks=1024) as engine:
        prompts = [random_token_ids(8, seed=index) for index in range(num_requests)]
        culprit = num_requests // 2
        fail_steps(engine, lambda step: culprit in step.request_ids)
        ends = await settled([tokens_of(engine, GREEDY, prompt) for prompt in prompts])
        assert isinstance(ends[culprit], RequestQuarantinedError)
        assert "device-side assert" in str(ends[culprit])
        del ends[culprit]
        assert all(isinstance(end, list) and len(end) == 16 for end in ends)
        await until(lambda: engine.is_ready)  # the next incarnation takes its turn to answer


@on_loop
async def test_a_consumer_that_raises_harms_nobody_else(folder: Path) -> None:
    async with opened(folder) as engine:
        num_calls = 0

        def sink(event: Any) -> None:
            nonlocal num_calls
            num_calls += 1
            raise ValueError("a defect of the consumer")

        tasks = [asyncio.create_task(tokens_of(engine, LONG)) for _ in range(2)]
        engine.submit(PROMPT, LONG, sink)
        assert {len(tokens) for tokens in await settled(tasks)} == {100}
        assert num_calls == 1
        assert engine.is_ready


@on_loop
async def test_f_46_a_log_that_cannot_be_written_costs_no_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ClosedLog:
        def error(self, *args: Any, **fields: Any) -> None:
            raise ValueError("I/O operation on closed file")

        exception = error

    monkeypatch.setattr("octavo.gateway.local_graph.log", ClosedLog())
    monkeypatch.setattr("octavo.gateway.frontend.log", ClosedLog())
    async with opened(folder) as engine:
        calm = await tokens_of(engine, GREEDY)
        countdown = iter([False] * 3 + [True])
        fail_steps(engine, lambda _: next(countdown, False))
        engine.submit(PROMPT, GREEDY, lambda _: 1 / 0)
        async with asyncio.timeout(180):
            assert await tokens_of(engine, GREEDY) == calm
        assert engine.stats().actor_restarts["executor"] == 1


@on_loop
async def test_an_actor_that_raises_ends_every_request_and_readiness(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with engine_on(folder) as engine:
        monkeypatch.setattr(engine._graph.scheduler._state.waiting, "peek", lambda: 1 / 0)
        ends = await settled([engine.generate(PROMPT, LONG) for _ in range(3)])
        assert all(isinstance(end, OctavoError) for end in ends)
        assert "scheduler failed" in engine.why_not_ready
        with pytest.raises(EngineClosedError):
            await engine.generate(PROMPT)


def test_the_loop_closes_without_a_word_after_an_engine(folder: Path) -> None:
    async def run() -> None:
        async with engine_on(folder) as engine:
            stream = engine.stream(PROMPT, LONG)
            await anext(aiter(stream))

    complaints: list[Any] = []
    loop = asyncio.new_event_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 1e9
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        loop.run_until_complete(run())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
    gc.collect()
    assert complaints == []
