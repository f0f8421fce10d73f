"""`LLM`: batches in, results out, without an event loop of one's own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import save_servable
from tiny_models import random_token_ids

from octavo import LLM, SamplingParams
from octavo.messages.errors import (
    ContextLengthExceededError,
    EngineClosedError,
    InvalidConfigError,
    InvalidRequestError,
    ModelNotFoundError,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "tiny"
    save_servable("llama", folder)
    return folder


def llm_on(folder: Path, **fields: object) -> LLM:
    return LLM(
        str(folder),
        **{"dtype": "float32", "num_blocks": 128, "block_size": 4, "max_model_len": 96, "num_threads": 1, **fields},
    )


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with llm_on(folder) as llm:
        yield llm


def octavo_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("octavo-")]


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [random_token_ids(4 + 3 * (index % 4), seed=index) for index in range(12)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [list(output.prompt_token_ids) for output in outputs] == prompts
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in prompts]
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in alone]


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, n=1) for count in (1, 5, 3)]
    outputs = llm.generate(["one", "two", "three"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]
    assert [output.prompt for output in outputs] == ["one", "two", "three"]
    with pytest.raises(ValueError, match="3 prompts but 2"):
        llm.generate(["one", "two", "three"], params[:2])


def test_arrays_and_iterators_are_prompts_too(llm: LLM) -> None:
    ids = random_token_ids(5, seed=1)
    expected = llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    array = np.array(ids)
    for prompts in (array, torch.tensor(ids), [array], [array, ids], iter([ids]), np.array([ids, ids])):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert {tuple(output.outputs[0].token_ids) for output in outputs} == {tuple(expected)}
    (one,) = llm.generate([np.array([7])], GREEDY, use_tqdm=False)
    assert one.prompt_token_ids == (7,)


@pytest.mark.parametrize("prompts", [5, None, {"prompt": "x"}])
def test_what_is_no_prompt_is_refused_in_words(llm: LLM, prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompts are a text, token ids or a conversation"):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{}]])
def test_what_are_no_parameters_is_refused_in_words(llm: LLM, params: Any) -> None:
    with pytest.raises(TypeError, match=r"SamplingParams.*got dict"):
        llm.generate("x", params)


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_a_single_prompt_may_be_text_or_ids(llm: LLM) -> None:
    text = llm.generate("abc", GREEDY, use_tqdm=False)
    ids = llm.generate(list(text[0].prompt_token_ids), GREEDY, use_tqdm=False)
    many = llm.generate([list(text[0].prompt_token_ids)], GREEDY, use_tqdm=False)
    assert [len(text), len(ids), len(many)] == [1, 1, 1]
    assert text[0].outputs[0].text == ids[0].outputs[0].text == many[0].outputs[0].text


def test_one_conversation_or_many_are_answered(llm: LLM) -> None:
    hello = [{"role": "user", "content": "hello"}]
    other = [{"role": "system", "content": "Be brief."}, *hello]
    one = llm.chat(hello, GREEDY, use_tqdm=False)
    many = llm.chat([other, hello], GREEDY, use_tqdm=False)
    assert [len(one), len(many)] == [1, 2]
    assert one[0].outputs[0].token_ids == many[1].outputs[0].token_ids
    assert bytes(b for b in b"<user>hello\n<assistant>") == bytes(_text_of(llm, one[0].prompt_token_ids), "ascii")


def _text_of(llm: LLM, token_ids: tuple[int, ...]) -> str:
    assert llm._engine is not None
    return llm._engine._graph.tokenizer.decode(list(token_ids), skip_special_tokens=False)


def test_the_progress_bar_is_shown_unless_it_is_off(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err


def test_an_error_comes_plain_and_leaves_the_rest_in_order(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceededError) as caught:
        llm.generate(["fine", "x" * 200, "fine"], GREEDY, use_tqdm=False)
    assert caught.value.__cause__ is None
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.generate("fine", SamplingParams(temperature=-1.0), use_tqdm=False)
    with pytest.raises(InvalidRequestError):
        llm.generate("", GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError):
        llm.generate([[]], GREEDY, use_tqdm=False)
    assert len(llm.generate("fine", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 8


def test_more_prompts_than_the_engine_queues_wait_instead_of_being_refused(folder: Path) -> None:
    for fields in ({"max_num_queued_requests": 2}, {"max_num_queued_tokens": 25}):
        with llm_on(folder, max_num_seqs=2, max_num_batched_tokens=8, **fields) as llm:
            outputs = llm.generate([random_token_ids(9, seed=index) for index in range(30)], GREEDY, use_tqdm=False)
            assert {len(output.outputs[0].token_ids) for output in outputs} == {8}


def test_it_works_from_other_threads_at_once(llm: LLM) -> None:
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        prompt = random_token_ids(6, seed=index)
        results[index] = llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = llm.generate([random_token_ids(6, seed=index) for index in range(4)], GREEDY, use_tqdm=False)
    assert [results[index] for index in range(4)] == [output.outputs[0].token_ids for output in expected]


def test_it_works_inside_a_running_event_loop(llm: LLM) -> None:
    async def run() -> int:
        return len(llm.generate("inside", GREEDY, use_tqdm=False)[0].outputs[0].token_ids)

    assert asyncio.run(run()) == 8


def test_closing_twice_is_closing_once(folder: Path, llm: LLM) -> None:
    before = octavo_threads()
    with llm_on(folder) as short:
        short.close()
        short.close()
        assert octavo_threads() == before
        with pytest.raises(EngineClosedError, match="closed"):
            short.generate("more", GREEDY)
    assert octavo_threads() == before


def test_what_cannot_be_started_leaves_no_thread(folder: Path, llm: LLM) -> None:
    before = octavo_threads()
    with pytest.raises(InvalidConfigError, match="block_size is 0"):
        llm_on(folder, block_size=0)
    with pytest.raises(InvalidConfigError, match="did you mean max_num_seqs"):
        llm_on(folder, max_num_seq=3)
    with pytest.raises(ModelNotFoundError):
        LLM(str(folder / "nowhere"), offline=True)
    assert octavo_threads() == before


def test_a_program_that_forgets_to_close_ends_cleanly(folder: Path) -> None:
    program = (
        "from octavo import LLM, SamplingParams\n"
        f"llm = LLM({str(folder)!r}, num_blocks=64, max_model_len=64, num_threads=1)\n"
        "print(len(llm.generate('hi', SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
    assert "Traceback" not in done.stderr
