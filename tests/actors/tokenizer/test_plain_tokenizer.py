"""Tokenizers loaded without `transformers`, beside the same ones loaded with it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import CHAT_TEMPLATE, TEXTS, byte_level_backend
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from octavo.actors.tokenizer.hf_tokenizer import HFTokenizer
from octavo.actors.tokenizer.plain_tokenizer import RESERVED_KWARGS, PlainTokenizer, load_plain_tokenizer
from octavo.messages.request import ChatPrompt
from octavo.models.checkpoint import SHIPPED

CHAT = ChatPrompt(messages_json=b'[{"role":"user","content":"Gr\\u00fc\\u00dfe, \\u4e16"}]')
PLAIN: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": None,
    "additional_special_tokens": ["<|im_start|>"],
    "clean_up_tokenization_spaces": True,
    "model_max_length": 100,
}


def save(folder: Path, config: dict[str, Any]) -> Path:
    byte_level_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def load(folder: Path) -> PlainTokenizer | None:
    return load_plain_tokenizer(folder, json.loads((folder / "tokenizer_config.json").read_text()))


@pytest.mark.parametrize("name", ["leaf-4m", "leaf-draft", "tiny"])
def test_a_plain_tokenizer_is_the_same_without_transformers(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, PLAIN) if name == "tiny" else SHIPPED / name
    plain = load(folder)
    assert plain is not None
    theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    assert plain.special_tokens_map == theirs.special_tokens_map
    assert plain.all_special_ids == theirs.all_special_ids
    assert (plain.bos_token_id, plain.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert len(plain) == len(theirs)
    assert plain.added_tokens_decoder == theirs.added_tokens_decoder
    assert plain.get_chat_template() == theirs.get_chat_template()
    ours, other = HFTokenizer(plain), HFTokenizer(theirs)
    for text in [*TEXTS, "<s><|im_start|>user</s> <|im_end|>", ""]:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids == other.encode(text, special)
            assert ours.decode(ids, special) == other.decode(ids, special)
    assert ours.render_chat(CHAT) == other.render_chat(CHAT)
    for attribute in ("eos_token_ids", "special_token_ids", "added_token_ids", "vocab_size", "is_bytewise"):
        assert getattr(ours, attribute) == getattr(other, attribute)
    assert [ours.token_bytes(i) for i in range(ours.vocab_size + 1)] == [
        other.token_bytes(i) for i in range(ours.vocab_size + 1)
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"add_bos_token": True},
        {"eos_token": {"content": "</s>", "special": True}},
        {"eos_token": "<not in the vocabulary>"},
        {"additional_special_tokens": ["<neither>"]},
        {"additional_special_tokens": {"a": "<s>"}},
        {"chat_template": "x"},
        {"added_tokens_decoder": {"0": {"content": "<s>"}}},
        {"split_special_tokens": True},
    ],
)
def test_what_is_not_known_to_be_plain_is_left_to_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    assert load(save(tmp_path, PLAIN)) is not None
    assert load(save(tmp_path, {**PLAIN, **change})) is None


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "additional_chat_templates"])
def test_a_file_that_may_say_otherwise_is_left_to_transformers(name: str, tmp_path: Path) -> None:
    save(tmp_path, PLAIN)
    (tmp_path / name).write_text("{}")
    assert load(tmp_path) is None


def test_the_names_that_no_variable_may_have_are_those_of_transformers() -> None:
    parameters = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
    assert parameters.keys() - {"self", "tools", "documents", "kwargs"} == RESERVED_KWARGS


def test_the_shipped_model_loads_and_chats_without_transformers() -> None:
    code = (
        "import sys\n"
        "from octavo.actors.tokenizer.hf_tokenizer import load_tokenizer\n"
        "from octavo.messages.request import ChatPrompt\n"
        "from octavo.models.checkpoint import SHIPPED\n"
        "from octavo.models.registry import load_model\n"
        "codec = load_tokenizer(SHIPPED / 'leaf-4m')\n"
        'assert codec.render_chat(ChatPrompt(messages_json=b\'[{"role":"user","content":"hi"}]\'))\n'
        "assert load_model(SHIPPED / 'leaf-4m').vocab_size == codec.vocab_size\n"
        "assert not {'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
