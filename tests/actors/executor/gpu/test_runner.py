from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from launch_tools import (
    GRAPH_SIZES,
    GRAPH_TOKENS,
    LateStream,
    config_of,
    gpu_runner,
    plain_workload,
    replay,
    serve,
    step_runner,
    streams,
    timeless,
)
from recorded_steps import MAX_SEQS, workload
from tiny_models import greedy_reference, save_tiny_model

from octavo.actors.executor import token_logprobs
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu.mixed_sizes import MixedSize
from octavo.actors.executor.gpu.runner import GpuRunner
from octavo.messages.ids import BlockId, Epoch, RequestId, StepId
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, StartRequest, StepExecuted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    save_tiny_model("qwen3", path, seed=7)
    return path


def prompt_step(index: int, request_id: int, tokens: list[int], params: SamplingParams, **fields) -> ExecuteStep:
    """A whole prompt in one step, in blocks of its own."""
    start = StartRequest(RequestId(request_id), np.array(tokens, dtype=np.int32).tobytes(), len(tokens), 0, params)
    return ExecuteStep(
        Epoch(0),
        StepId(index),
        (RequestId(request_id),),
        (len(tokens),),
        start=(start,),
        block_tables=((),),
        append_blocks=((RequestId(request_id), tuple(BlockId(request_id * 6 + block) for block in range(6))),),
        **fields,
    )


def decode_step(index: int, *request_ids: int, **fields) -> ExecuteStep:
    rows = tuple(RequestId(request_id) for request_id in request_ids)
    return ExecuteStep(Epoch(0), StepId(index), rows, (1,) * len(rows), **fields)


def assert_same_answers(ours: list[StepExecuted], theirs: list[StepExecuted]) -> None:
    """The same tokens and reports; log-probabilities to within what products of more rows differ by."""
    bare = [
        [msgspec.structs.replace(executed, logprobs=(), prompt_logprobs=()) for executed in timeless(results)]
        for results in (ours, theirs)
    ]
    assert bare[0] == bare[1]
    for one, other in zip(ours, theirs, strict=True):
        assert one.prompt_logprobs == other.prompt_logprobs
        assert [request_id for request_id, _ in one.logprobs] == [request_id for request_id, _ in other.logprobs]
        for (_, entry), (_, expected) in zip(one.logprobs, other.logprobs, strict=True):
            assert (entry.token_id, entry.rank) == (expected.token_id, expected.rank)
            assert [token_id for token_id, _ in entry.top] == [token_id for token_id, _ in expected.top]
            values = [entry.logprob, *(value for _, value in entry.top)]
            assert values == pytest.approx([expected.logprob, *(value for _, value in expected.top)], abs=1e-4)


@pytest.mark.parametrize("requests", [plain_workload, workload], ids=["plain", "with penalties"])
@pytest.mark.parametrize(
    "graphs",
    [
        {"graph_sizes": ()},
        {"graph_sizes": GRAPH_SIZES},
        {"graph_sizes": GRAPH_SIZES, "graph_tokens": GRAPH_TOKENS},
        {"graph_sizes": (3,), "graph_tokens": (9,)},
    ],
    ids=["eager", "padded decodes", "padded prompts", "what fits is padded"],
)
def test_every_step_is_answered_as_by_the_runner_that_waits(folder: Path, requests, graphs) -> None:
    config = config_of(folder)
    served = serve(step_runner(config), requests())
    assert served.num_preemptions > 0 or requests is workload
    for num_ahead in (1, 2, 3):
        for stream in (None, LateStream()):
            runner = gpu_runner(config, stream=stream, **graphs)
            assert_same_answers(replay(runner, served.steps, num_ahead), served.results)


def test_steps_launched_ahead_serve_the_same_streams(folder: Path) -> None:
    config = config_of(folder)
    expected = streams(serve(step_runner(config), plain_workload()).results)
    for seed in (3, 4):
        served = serve(gpu_runner(config, stream=LateStream()), plain_workload(), seed)
        assert served.most_in_flight == config.pipeline_depth
        assert served.num_preemptions > 0
        ours = streams(served.results)
        assert ours.keys() == expected.keys()
        for request_id, tokens in ours.items():
            # A schedule of its own may have more or fewer rows in flight past the end of a request.
            count = min(len(tokens), len(expected[request_id]))
            assert tokens[:count] == expected[request_id][:count]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    reference = save_tiny_model(model_type, tmp_path, seed=3)
    graph_sizes = GRAPH_SIZES if model_type != "gpt2" else ()  # served by transformers: launched as it comes
    runner = gpu_runner(config_of(tmp_path), graph_sizes=graph_sizes, stream=LateStream())
    prompts = {0: [5, 6, 7, 8, 9], 1: [11, 12, 13]}
    greedy = SamplingParams(temperature=0.0)
    steps = [prompt_step(index, index, prompt, greedy) for index, prompt in prompts.items()]
    steps += [decode_step(index, 0, 1) for index in range(2, 11)]
    ours = streams(replay(runner, steps, 3))
    for index, prompt in prompts.items():
        assert ours[RequestId(index)] == greedy_reference(reference, prompt, 10)


def test_a_step_is_launched_before_the_tokens_of_the_last_are_known(folder: Path) -> None:
    runner = gpu_runner(config_of(folder), stream=LateStream())
    first = runner.launch(prompt_step(0, 0, [5, 6, 7], SamplingParams(temperature=0.0)))
    second = runner.launch(decode_step(1, 0))
    assert not runner.is_done(first)
    assert not runner.is_done(second)
    assert runner.collect(first).request_ids == (RequestId(0),)
    assert not runner.is_done(second)
    runner.collect(second)


def test_a_step_with_the_samplers_requests_is_complete_when_it_is_launched(folder: Path) -> None:
    runner = gpu_runner(config_of(folder), stream=LateStream())
    plain = runner.launch(prompt_step(0, 0, [5, 6, 7], SamplingParams(temperature=0.0)))
    assert not runner.is_done(plain)
    masked = runner.launch(prompt_step(1, 1, [5, 6, 7], SamplingParams(temperature=0.0, allowed_token_ids=(17,))))
    assert runner.is_done(masked)
    runner.collect(plain)
    assert runner.collect(masked).token_ids == (17,)


EDITED = {
    "repetition": SamplingParams(temperature=0.0, repetition_penalty=1.3),
    "drawn, all penalties": SamplingParams(
        temperature=0.9, seed=5, repetition_penalty=0.8, frequency_penalty=0.4, presence_penalty=-0.3, top_p=0.9
    ),
    "bias": SamplingParams(temperature=0.7, seed=6, logit_bias={17: 4.0, 18: 3.5, 40: -100.0}),
    "a bad word of one token": SamplingParams(temperature=0.8, seed=7, bad_words_token_ids=((9,), (17,))),
    "log-probabilities": SamplingParams(temperature=0.0, logprobs=3, repetition_penalty=1.7, logit_bias={5: 9.0}),
}


@pytest.mark.parametrize("name", EDITED)
def test_bias_and_penalties_keep_no_step_waiting_and_give_the_tokens_of_the_sampler(folder: Path, name: str) -> None:
    """Some of its outputs have been another executor's, others have come to be in steps that are still in flight."""
    steps = [
        prompt_step(0, 0, [5, 6, 7, 6], EDITED[name]),
        prompt_step(1, 1, [8, 9], SamplingParams(temperature=0.0)),
        *(decode_step(index, 0, 1) for index in range(2, 9)),
        decode_step(9, 1, drop=(RequestId(0),)),
    ]
    start = prompt_step(10, 2, [5, 6, 7, 6, 30, 31, 31], EDITED[name])
    again = msgspec.structs.replace(start.start[0], num_prompt_tokens=4)
    steps += [msgspec.structs.replace(start, start=(again,)), *(decode_step(index, 1, 2) for index in range(11, 16))]
    expected = replay(step_runner(config_of(folder)), steps, 1)
    for graph_sizes in ((), GRAPH_SIZES):
        runner = gpu_runner(config_of(folder), graph_sizes=graph_sizes, stream=LateStream())
        launched = [runner.launch(step) for step in steps[:3]]
        assert not any(map(runner.is_done, launched))
        runner.reset()
        assert timeless(replay(runner, steps, 3)) == timeless(expected)
    plain = [prompt_step(0, 0, [5, 6, 7, 6], SamplingParams(temperature=0.0)), *steps[1:9]]
    assert streams(replay(step_runner(config_of(folder)), plain, 1))[RequestId(0)] != streams(expected)[RequestId(0)]


def test_edited_requests_beside_one_of_the_samplers_keep_their_tokens(folder: Path) -> None:
    """What was sampled on the device while it was alone counts when it is not, and the other way round."""
    masked = SamplingParams(temperature=0.9, seed=2, allowed_token_ids=tuple(range(40)), frequency_penalty=1.0)
    too_many = SamplingParams(
        temperature=0.9, seed=3, repetition_penalty=1.2, logit_bias=dict.fromkeys(range(256), 1.0)
    )
    least = SamplingParams(temperature=0.9, seed=4, min_tokens=6, stop_token_ids=tuple(range(128)), logprobs=1)
    steps = [
        prompt_step(0, 0, [5, 6, 7], EDITED["drawn, all penalties"]),
        prompt_step(1, 1, [5, 6, 7], EDITED["log-probabilities"]),
        decode_step(2, 0, 1),
        decode_step(3, 0, 1),
        prompt_step(4, 2, [8, 9, 9], masked),
        decode_step(5, 0, 1, 2),
        decode_step(6, 0, 2),
        decode_step(7, 0, 1, drop=(RequestId(2),)),
        prompt_step(8, 3, [8, 9, 9], too_many),
        decode_step(9, 0, 1, 3),
        decode_step(10, 0, 1, drop=(RequestId(3),)),
        prompt_step(11, 2, [8, 9, 9], least),
        *(decode_step(index, 0, 1, 2) for index in range(12, 19)),
    ]
    expected = replay(step_runner(config_of(folder)), steps, 1)
    assert any(executed.stopped for executed in expected)
    for graph_sizes in ((), GRAPH_SIZES):
        runner = gpu_runner(config_of(folder), graph_sizes=graph_sizes, stream=LateStream())
        assert timeless(replay(runner, steps, 3)) == timeless(expected)


def test_more_steps_than_the_pipeline_holds_wait_for_the_oldest(folder: Path) -> None:
    runner = gpu_runner(config_of(folder), stream=LateStream())
    greedy = SamplingParams(temperature=0.0)
    steps = [prompt_step(0, 0, [5, 6, 7], greedy), *(decode_step(index, 0) for index in range(1, 12))]
    launched = [runner.launch(step) for step in steps]
    results = [runner.collect(each) for each in launched]
    assert timeless(results) == timeless(replay(step_runner(config_of(folder)), steps, 1))


def test_min_tokens_keep_no_step_waiting(folder: Path) -> None:
    config = config_of(folder)
    free = [step_runner(config).execute(prompt_step(0, 0, [5, 6, 7], SamplingParams(temperature=0.0))).token_ids[0]]
    params = SamplingParams(temperature=0.0, min_tokens=3, stop_token_ids=tuple(range(0, 256, 2)) + tuple(free))
    steps = [prompt_step(0, 0, [5, 6, 7], params), *(decode_step(index, 0) for index in range(1, 8))]
    runner = gpu_runner(config, stream=LateStream())
    launched = [runner.launch(step) for step in steps[:3]]
    assert not any(map(runner.is_done, launched))
    launched += [runner.launch(step) for step in steps[3:]]
    results = [runner.collect(each) for each in launched]
    assert timeless(results) == timeless(replay(step_runner(config), steps, 1))
    assert not any(token in params.stop_token_ids for executed in results[:3] for token in executed.token_ids)
    assert any(executed.stopped for executed in results[3:])


def break_logits(monkeypatch: pytest.MonkeyPatch, runner, row: int, at_call: int) -> None:
    """Of one row of one call of `compute_logits`."""
    model, calls = runner.device.model, []
    compute_logits = model.compute_logits

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute_logits(hidden)
        calls.append(len(hidden))
        if len(calls) == at_call:
            logits = logits.clone()
            logits[row, 4] = float("nan")
        return logits

    monkeypatch.setattr(model, "compute_logits", broken)


@pytest.mark.parametrize("num_ahead", [1, 3])
def test_a_row_without_a_token_fails_once_and_the_others_go_on(
    folder: Path, num_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = SamplingParams(temperature=0.0)
    steps = [
        prompt_step(0, 0, [5, 6, 7], greedy),
        prompt_step(1, 1, [8, 9], greedy),
        *(decode_step(index, 0, 1) for index in range(2, 7)),
        decode_step(7, 0, drop=(RequestId(1),)),
        prompt_step(8, 1, [8, 9], greedy),
        decode_step(9, 0, 1),
    ]
    expected = replay(step_runner(config_of(folder)), steps, 1)
    runner = gpu_runner(config_of(folder), stream=LateStream())
    break_logits(monkeypatch, runner, row=1, at_call=4)
    results = replay(runner, steps, num_ahead)
    assert [executed.failed for executed in results if executed.failed] == [
        ((RequestId(1), "the model computed no usable logits for this request: NaN, infinity, or nothing finite"),)
    ]
    assert results[3].failed
    assert [executed.nonfinite for executed in results if executed.nonfinite] == [(RequestId(1),)]
    assert results[3].nonfinite
    assert results[3].request_ids == results[4].request_ids == results[6].request_ids == (RequestId(0),)
    assert streams(results)[RequestId(0)] == streams(expected)[RequestId(0)]
    assert results[8].token_ids == expected[8].token_ids  # started anew, under the same id
    assert results[9].token_ids[0] == expected[9].token_ids[0]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8, seed=3, top_k=9),
        SamplingParams(temperature=0.0, allowed_token_ids=(3, 4, 5, 6)),
    ],
    ids=["greedy", "drawn", "by the sampler"],
)
def test_a_model_that_computes_no_numbers_is_told_from_requests_that_fail(
    folder: Path, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler gives an executor up for `nonfinite` rows, and for no others."""
    steps = [prompt_step(0, 0, [5, 6, 7], params), prompt_step(1, 1, [8, 9], params), decode_step(2, 0, 1)]
    both = RequestId(0), RequestId(1)
    for make in (step_runner, lambda config: gpu_runner(config, stream=LateStream())):
        runner = make(config_of(folder))
        replay(runner, steps[:2], 1)
        compute_logits = runner.device.model.compute_logits
        monkeypatch.setattr(
            runner.device.model, "compute_logits", lambda hidden, compute=compute_logits: compute(hidden) * torch.nan
        )
        (executed,) = replay(runner, steps[2:], 1)
        assert executed.nonfinite == both
        assert tuple(request_id for request_id, _ in executed.failed) == both
        assert executed.request_ids == ()


def test_a_request_that_excludes_every_token_is_no_fault_of_the_model(folder: Path) -> None:
    impossible = SamplingParams(temperature=0.0, allowed_token_ids=(5,), bad_words_token_ids=((5,),))
    step = prompt_step(0, 0, [5, 6, 7], impossible)
    for make in (step_runner, gpu_runner):
        executed = make(config_of(folder)).execute(step)
        ((request_id, why),) = executed.failed
        assert request_id == RequestId(0)
        assert "exclude every token" in why
        assert executed.nonfinite == ()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, prompt_logprobs=2, logprobs=1),
        SamplingParams(temperature=0.0, logprobs=-1),
        SamplingParams(temperature=0.0, logprobs=33),
        SamplingParams(temperature=0.9, seed=2**64 - 5, logprobs=32, top_k=2**40),
        SamplingParams(temperature=0.9, seed=3, bad_words_token_ids=((5,), (7, 8)), presence_penalty=1.0),
        SamplingParams(temperature=0.9, seed=3, allowed_token_ids=(5, 6, 7, 8), frequency_penalty=0.5),
    ],
    ids=lambda params: ",".join(name for name in params.__struct_fields__ if getattr(params, name) not in (0, None)),
)
def test_what_a_request_may_ask_for_it_gets(folder: Path, params: SamplingParams) -> None:
    tokens = list(range(5, 25))
    start = prompt_step(0, 0, tokens, params)
    chunks = [
        msgspec.structs.replace(start, num_tokens=(1,)),
        ExecuteStep(Epoch(0), StepId(1), (RequestId(0),), (18,)),
        decode_step(2, 0),
        prompt_step(3, 1, [9, 9, 8], SamplingParams(temperature=0.5, seed=1, logprobs=3)),
        *(decode_step(index, 0, 1) for index in range(4, 8)),
        prompt_step(8, 2, [7], SamplingParams(temperature=0.5, seed=1)),
        ExecuteStep(Epoch(0), StepId(9), (), (), drop=(RequestId(0),)),
        *(decode_step(index, 1, 2) for index in range(10, 12)),
    ]
    expected = replay(step_runner(config_of(folder)), chunks, 1)
    for graph_sizes in ((), GRAPH_SIZES):
        runner = gpu_runner(config_of(folder), graph_sizes=graph_sizes, stream=LateStream())
        assert timeless(replay(runner, chunks, 3)) == timeless(expected)


@pytest.mark.parametrize("graphs", [{}, {"graph_sizes": GRAPH_SIZES, "graph_tokens": GRAPH_TOKENS}])
def test_a_diff_that_does_not_fit_takes_a_detour(
    folder: Path, graphs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.actors.executor.gpu.forward_pass.PACKED_WORDS", 40)
    monkeypatch.setattr("octavo.actors.executor.gpu.launched.PACKED_WORDS", 40)
    config = config_of(folder)
    served = serve(step_runner(config), plain_workload())
    runner = gpu_runner(config, stream=LateStream(), **graphs)
    assert timeless(replay(runner, served.steps, 3)) == timeless(served.results)


def test_after_a_reset_nothing_is_left_of_the_epoch_before(folder: Path) -> None:
    config = config_of(folder)
    runner = gpu_runner(config, stream=LateStream())
    steps = serve(step_runner(config), plain_workload()).steps
    fresh = timeless(replay(gpu_runner(config), steps, 3))
    for step in steps[:9]:
        runner.launch(step)
    runner.reset()
    assert timeless(replay(runner, steps, 3)) == fresh


def test_an_error_on_the_device_loses_no_memory_of_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder)
    runner = gpu_runner(config)
    forward = runner.device.model.forward
    step = prompt_step(0, 0, [5, 6, 7], SamplingParams(temperature=0.0))
    expected = step_runner(config).execute(step)

    def fail(*_args: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    for _ in range(7):
        monkeypatch.setattr(runner.device.model, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.launch(step)
        runner.reset()
        monkeypatch.setattr(runner.device.model, "forward", forward)
        assert runner.execute(step).token_ids == expected.token_ids
        runner.reset()


def test_a_thread_that_will_launch_has_its_libraries_before_the_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = gpu_runner(config_of(folder), stream=LateStream())
    products: list[torch.device] = []
    monkeypatch.setattr(torch, "mm", lambda x, _: products.append(x.device))
    monkeypatch.setattr(runner.device, "bind_threads", lambda: None)
    runner.bind_threads()
    assert products == []  # a CPU's are everybody's
    monkeypatch.setattr(runner, "_pins", True)
    runner.bind_threads()
    assert products == [runner.device.model.device]


def test_a_step_that_cannot_be_packed_loses_no_memory_of_the_host(folder: Path) -> None:
    runner = gpu_runner(config_of(folder))
    step = prompt_step(0, 0, [5, 6, 7], SamplingParams(temperature=0.0))
    expected = step_runner(config_of(folder)).execute(step)
    for _ in range(7):
        with pytest.raises(KeyError):
            runner.launch(decode_step(0, 99))
        runner.reset()
    assert runner.execute(step).token_ids == expected.token_ids


def test_an_epoch_that_ends_leaves_no_row_in_the_sheet_of_decodes(folder: Path) -> None:
    runner = gpu_runner(config_of(folder), stream=LateStream())
    greedy = SamplingParams(temperature=0.0)
    for step in (prompt_step(0, 0, [5, 6, 7], greedy), prompt_step(1, 1, [8, 9], greedy), decode_step(2, 0, 1)):
        runner.launch(step)
    runner.reset()
    batch = runner._batch
    assert (len(batch), batch._decodes.standing, batch._dropped) == (0, [], [])


@pytest.mark.parametrize(("model_type", "seed"), [("qwen3", 1), ("gemma3_text", 2), ("qwen3_moe", 4)])
def test_a_padded_step_computes_what_the_step_would_and_touches_nothing_else(
    model_type: str, seed: int, tmp_path: Path
) -> None:
    save_tiny_model(model_type, tmp_path, seed=7)
    config = config_of(tmp_path)
    runners = [
        gpu_runner(config, graph_sizes=()),
        gpu_runner(config, graph_sizes=GRAPH_SIZES, graph_tokens=GRAPH_TOKENS, stream=LateStream()),
    ]
    steps = serve(step_runner(config), plain_workload(), seed).steps
    sizes = count_sizes(runners[1])
    eager, padded = (replay(runner, steps, 3) for runner in runners)
    assert_same_answers(padded, eager)
    mixed = [step for step in steps if max(step.num_tokens, default=0) > 1]
    assert len([size for size in sizes if isinstance(size, MixedSize)]) >= len(mixed) >= 8
    # Keys and values of every block, and all that the device holds of every request.
    for one, other in zip(runners[0].device.kv_caches, runners[1].device.kv_caches, strict=True):
        for values, padded_values in ((one.k, other.k), (one.v, other.v)):
            torch.testing.assert_close(padded_values, values, rtol=1e-4, atol=1e-5)
            assert torch.equal(padded_values != 0, values != 0)
    assert torch.equal(runners[0]._forward._state, runners[1]._forward._state)


def count_sizes(runner: GpuRunner) -> list[int | MixedSize]:
    """What its graphs compute from now on."""
    sizes: list[int | MixedSize] = []
    run = runner._graphs.run

    def noted(size: int | MixedSize) -> None:
        sizes.append(size)
        run(size)

    runner._graphs.run = noted  # type: ignore[method-assign]
    return sizes


def test_a_step_that_reports_on_its_prompt_is_not_padded(folder: Path) -> None:
    runner = gpu_runner(config_of(folder), graph_tokens=GRAPH_TOKENS)
    sizes = count_sizes(runner)
    runner.execute(prompt_step(0, 0, [5, 6, 7], SamplingParams(temperature=0.0, prompt_logprobs=1)))
    assert sizes == []
    runner.execute(prompt_step(1, 1, [5, 6, 7], SamplingParams(temperature=0.0)))
    runner.execute(decode_step(2, 0, 1))
    assert sizes == [MixedSize(MAX_SEQS, GRAPH_TOKENS[0]), 2]


def test_warm_up_captures_every_size_once_and_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(folder)
    runner = gpu_runner(config, graph_tokens=GRAPH_TOKENS)
    sizes = count_sizes(runner)
    runner.warm_up()
    assert not [size for size in sizes if isinstance(size, MixedSize)]  # launched: what fits no graph will be, too
    assert runner.num_captured == len(GRAPH_SIZES) + len(GRAPH_TOKENS)
    assert runner.num_late == 0
    steps = serve(step_runner(config), plain_workload()).steps
    assert timeless(replay(runner, steps, 3)) == timeless(replay(gpu_runner(config), steps, 3))
    assert runner.num_late == 0
    monkeypatch.setattr(type(runner), "num_compiled", 3)
    assert runner.num_late == 3


@pytest.mark.parametrize("make", [gpu_runner, step_runner])
def test_logits_of_a_long_prompt_are_there_some_rows_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[ExecutorConfig], Any]
) -> None:
    runner = make(config_of(folder))
    tokens = list(range(5, 16))
    step = prompt_step(0, 0, tokens, SamplingParams(temperature=0.0, prompt_logprobs=1))
    whole = runner.execute(step).prompt_logprobs
    runner.reset()
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS_ROWS", 4)
    made: list[int] = []
    logits_of = runner.device.logits

    def logits(hidden: torch.Tensor, *indices: torch.Tensor | None) -> torch.Tensor:
        result = logits_of(hidden, *indices)
        made.append(len(result))
        return result

    monkeypatch.setattr(runner.device, "logits", logits)
    (parts,) = runner.execute(step).prompt_logprobs
    assert made[:3] == [4, 4, 2]
    assert max(made) == 4
    assert [entry.token_id for entry in parts[2]] == tokens[1:]
    assert parts[:2] == whole[0][:2]
    for ours, theirs in zip(parts[2], whole[0][2], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert ours.rank == theirs.rank
