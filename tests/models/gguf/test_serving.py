"""A GGUF file through the engine, from its path to text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_gguf import convert_checkpoint, tokenizer_metadata

from octavo import LLM, SamplingParams
from octavo.actors.executor.locate import locate_model
from octavo.messages.errors import ModelNotFoundError, UnsupportedModelError
from octavo.messages.request import ChatPrompt
from octavo.models.checkpoint import SHIPPED

LEAF = SHIPPED / "leaf-4m"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
TEXTS = ["Once upon a time", "What is an octavo?", "  def f(x):\n"]
CHAT = ChatPrompt(
    messages_json=json.dumps([{"role": "user", "content": "Who are you?"}]).encode(), add_generation_prompt=True
)


def llm_on(model: Path) -> LLM:
    return LLM(str(model), dtype="float32", num_blocks=64, max_model_len=256, num_threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def of_safetensors() -> Iterator[LLM]:
    with llm_on(LEAF) as llm:
        yield llm


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_texts_and_chats_are_answered_with_the_same_tokens(kind: str, folder: Path, of_safetensors: LLM) -> None:
    path = convert_checkpoint(LEAF, folder / f"leaf-{kind}.gguf", kind=kind)
    with llm_on(path) as llm:
        for prompts in (TEXTS, [CHAT]):
            ours = llm.generate(prompts, GREEDY, use_tqdm=False)
            theirs = of_safetensors.generate(prompts, GREEDY, use_tqdm=False)
            for mine, other in zip(ours, theirs, strict=True):
                assert mine.prompt_token_ids == other.prompt_token_ids
                assert mine.outputs[0].token_ids == other.outputs[0].token_ids
                assert mine.outputs[0].text == other.outputs[0].text
                assert mine.outputs[0].finish_reason == other.outputs[0].finish_reason
        assert ours[0].outputs[0].text


def test_quantised_weights_answer_a_chat_in_words(folder: Path) -> None:
    path = convert_checkpoint(LEAF, folder / "leaf-Q8_0.gguf", kind="Q8_0")
    with llm_on(path) as llm:
        answer = llm.generate([CHAT], GREEDY, use_tqdm=False)[0].outputs[0]
    assert len(answer.text.split()) > 2
    assert "\ufffd" not in answer.text


def test_a_file_is_called_by_its_name_without_the_ending(tmp_path: Path) -> None:
    path = convert_checkpoint(LEAF, tmp_path / "some-model.Q8_0.gguf", kind="Q8_0")
    assert locate_model(str(path)) == (path.resolve(), "some-model.Q8_0")
    assert locate_model(str(tmp_path)) == (path.resolve(), "some-model.Q8_0")


def test_what_is_wrong_with_a_file_is_said_at_start(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        llm_on(tmp_path / "model.gguf")
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(UnsupportedModelError, match="version 0; read are 2 and 3"):
        llm_on(path)
    foreign = convert_checkpoint(
        LEAF, tmp_path / "foreign.gguf", extra={"general.architecture": "mamba"}, tokenizer=tokenizer_metadata(LEAF)
    )
    with pytest.raises(UnsupportedModelError, match="architecture 'mamba'"):
        llm_on(foreign)
