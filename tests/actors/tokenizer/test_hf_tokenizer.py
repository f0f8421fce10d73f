from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, byte_level_backend, metaspace, metaspace_backend, save, wordpiece, wrap
from tokenizers import Tokenizer

from octavo.actors.tokenizer.hf_tokenizer import HFTokenizer, load_tokenizer
from octavo.messages.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from octavo.messages.request import ChatPrompt

USER = b'[{"role": "user", "content": "hello"}]'


@given(st.text(max_size=50))
def test_token_bytes_together_are_the_text(text: str) -> None:
    codec = byte_level()
    ids = codec.encode(text, False)
    assert b"".join(map(codec.token_bytes, ids)).decode() == text
    assert codec.decode(ids, False) == text


def test_token_text_shows_spaces_and_marks_parts_of_characters() -> None:
    codec = metaspace()
    space, byte = codec._fast.token_to_id("▁hello"), codec._fast.token_to_id("<0xE4>")
    assert (codec.token_text(space), codec.token_bytes(space)) == (" hello", b" hello")
    assert (codec.token_text(byte), codec.token_bytes(byte)) == ("\N{REPLACEMENT CHARACTER}", b"\xe4")


@pytest.mark.parametrize("codec", [byte_level(), metaspace(), wordpiece()])
def test_ids_outside_the_vocabulary_have_no_text(codec: HFTokenizer) -> None:
    assert codec.token_bytes(codec.vocab_size) == b""
    assert codec.token_text(codec.vocab_size) == ""


def test_special_tokens_are_known_and_skipped_on_demand() -> None:
    codec = byte_level()
    ids = codec.encode("hi</s>", True)
    assert ids[0] == codec.bos_token_id
    assert ids[-1] == codec.eos_token_ids[0]
    assert set(codec.special_token_ids) == {0, 1, 2, 3}
    assert codec.added_token_ids > codec.special_token_ids
    assert codec.decode(ids, True) == "hi"
    assert codec.decode(ids, False) == "<s>hi</s>"


@pytest.mark.parametrize("work", ["encode", "decode"])
def test_other_threads_run_while_a_long_text_is_worked_on(work: str) -> None:
    codec = byte_level()
    text = "hello there " * 50_000
    ids = codec.encode(text, False)
    assert codec.decode(ids) == text
    turns: list[None] = []
    over = threading.Event()

    def work_on_it() -> None:
        codec.encode(text) if work == "encode" else codec.decode(ids)
        over.set()

    worker = threading.Thread(target=work_on_it)
    worker.start()
    while not over.is_set():
        time.sleep(0)  # offers the interpreter's lock; whoever keeps it leaves no more than a few turns
        turns.append(None)
    worker.join()
    assert len(turns) > 30


def test_a_lone_surrogate_is_refused_with_a_reason() -> None:
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        byte_level().encode("a\ud800b", True)
    assert caught.value.param == "prompt"


def test_a_chat_is_rendered_and_encodes_with_one_bos() -> None:
    codec = byte_level()
    text = codec.render_chat(ChatPrompt(USER))
    assert text == "<s><|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert codec.encode(text, False).count(codec.bos_token_id or 0) == 1


def test_the_last_message_can_be_continued() -> None:
    messages = b'[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Well"}]'
    prompt = ChatPrompt(messages, add_generation_prompt=False, continue_final_message=True)
    assert byte_level().render_chat(prompt).endswith("<|im_start|>assistant\nWell")


def test_template_variables_reach_the_template() -> None:
    prompt = ChatPrompt(USER, template_kwargs_json=b'{"suffix": "<think>"}')
    assert byte_level().render_chat(prompt).endswith("<think>")


@pytest.mark.parametrize(
    ("prompt", "param", "match"),
    [
        (ChatPrompt(b'[{"role": "robot", "content": "x"}]'), "messages", "role robot is unknown"),
        (ChatPrompt(b"[]"), "messages", "at least one message"),
        (ChatPrompt(b'[{"content": "x"}]'), "messages", "does not accept"),
        (ChatPrompt(b'[{"role": "user", "content": "x"}, 3]'), "messages", "does not accept"),
        (ChatPrompt(b"{}"), "messages", "array"),
        (ChatPrompt(b"[" * 100_000), "messages", "messages"),
        (ChatPrompt(USER, template_kwargs_json=b"[]"), "chat_template_kwargs", "object"),
        (
            ChatPrompt(USER, template_kwargs_json=b'{"chat_template": "x", "tokenize": true}'),
            "chat_template_kwargs",
            "may not set chat_template, tokenize",
        ),
        (ChatPrompt(USER, continue_final_message=True), "continue_final_message", "exclude"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused_with_a_reason(prompt: ChatPrompt, param: str, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        byte_level().render_chat(prompt)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages[0].content.nothing.at_all }}", "{{ messages + 1 }}"]
)
def test_a_template_is_sandboxed_and_its_failures_are_the_requests(template: str) -> None:
    codec = HFTokenizer(wrap(byte_level_backend(), chat_template=template))
    with pytest.raises(InvalidRequestError):
        codec.render_chat(ChatPrompt(USER))


def test_without_a_template_the_refusal_says_what_to_do() -> None:
    codec = HFTokenizer(wrap(byte_level_backend(), chat_template=None))
    assert codec.chat_template is None
    with pytest.raises(InvalidRequestError, match=r"/v1/completions.*--chat-template"):
        codec.render_chat(ChatPrompt(USER))


def test_a_folder_is_loaded_with_its_end_tokens_and_vocabulary(tmp_path: Path) -> None:
    save(
        tmp_path,
        byte_level_backend(),
        config={"model_type": "llama", "eos_token_id": 77, "vocab_size": 512},
        generation_config={"eos_token_id": [1, 3]},
    )
    codec = load_tokenizer(tmp_path)
    assert codec.eos_token_ids == (1, 3)
    assert (codec.vocab_size, codec.model_vocab_size) == (byte_level().vocab_size, 512)
    assert codec.is_bytewise
    assert codec.encode("hello", True) == byte_level().encode("hello", True)


@pytest.mark.parametrize(
    ("config", "eos_token_ids"),
    [({"eos_token_id": 7}, (1, 7)), ({"text_config": {"eos_token_id": [1, 8]}}, (1, 8)), ({}, (1,))],
)
def test_config_json_gives_end_tokens_where_generation_config_is_silent(
    tmp_path: Path, config: dict[str, object], eos_token_ids: tuple[int, ...]
) -> None:
    save(tmp_path, byte_level_backend(), config={"model_type": "llama", **config})
    assert load_tokenizer(tmp_path).eos_token_ids == eos_token_ids


def test_a_chat_template_is_taken_from_a_file_or_from_text(tmp_path: Path) -> None:
    save(tmp_path, byte_level_backend(), chat_template=None)
    (tmp_path / "mine.jinja").write_text("file: {{ messages[0].content }}")
    from_file = load_tokenizer(tmp_path, chat_template=str(tmp_path / "mine.jinja"))
    assert from_file.render_chat(ChatPrompt(USER)) == "file: hello"
    from_text = load_tokenizer(tmp_path, chat_template="text: {{ messages[0].content }}")
    assert from_text.render_chat(ChatPrompt(USER)) == "text: hello"
    with pytest.raises(InvalidRequestError, match="no such file"):
        load_tokenizer(tmp_path, chat_template="nowhere.jinja")
    with pytest.raises(InvalidRequestError, match="not valid jinja, line 1"):
        load_tokenizer(tmp_path, chat_template="{% for %}")


def test_truncation_and_padding_of_a_tokenizer_json_are_not_obeyed(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(byte_level_backend().to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    save(tmp_path, backend)
    assert load_tokenizer(tmp_path).encode("hello lazy dog", False) == byte_level().encode("hello lazy dog", False)


def test_a_class_that_is_not_plain_is_looked_up_and_a_slow_tokenizer_works(tmp_path: Path) -> None:
    # CTRL's tokenizer exists in Python alone.
    vocab = {"<unk>": 0, "hello": 1, "world": 2, **{c: 3 + i for i, c in enumerate("helowrd")}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    merges = ["h e", "he l", "hel l", "hell o</w>", "w o", "wo r", "wor l", "worl d</w>"]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "ctrl", "vocab_size": len(vocab)}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CTRLTokenizer"}))
    codec = load_tokenizer(tmp_path)
    assert not codec.is_bytewise
    assert codec.encode("hello world", True) == [1, 2]
    assert codec.decode([1, 2, 99], True) == "hello world"
    assert codec.token_text(1) == "hello"
    with pytest.raises(InvalidRequestError, match="surrogate"):
        codec.encode("hello \ud800", True)


def test_what_cannot_be_loaded_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_cores_import_without_transformers_and_a_plain_tokenizer_loads_without_torch(tmp_path: Path) -> None:
    save(tmp_path, metaspace_backend())
    program = (
        "import sys; from pathlib import Path\n"
        "import octavo.actors.tokenizer.core, octavo.actors.detokenizer.core, octavo.actors.detokenizer.bench\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & sys.modules.keys()\n"
        "from octavo.actors.tokenizer.hf_tokenizer import load_tokenizer\n"
        "assert load_tokenizer(Path(sys.argv[1])).encode('hello', False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
