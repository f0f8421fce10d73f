"""Tokenizers in metadata, against `tokenizers` and `transformers` tokenizers of the same vocabulary."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import U32, gguf_bytes, tokenizer_metadata
from tiny_tokenizers import TEXTS, byte_level_backend, metaspace_backend, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from octavo.actors.tokenizer.hf_tokenizer import HFTokenizer, load_tokenizer
from octavo.messages.errors import UnsupportedModelError
from octavo.messages.request import ChatPrompt
from octavo.models.checkpoint import SHIPPED
from octavo.models.gguf.pre_tokenizers import PRE_TOKENIZERS

LEAF = SHIPPED / "leaf-4m"

PIECES = [
    *("Hello", " world", "  ", "\n\n", "\r\n", "\t", "'s", "'LL", "don't", "123", "4567890", "½", "Ⅳ", "x=1+2;"),
    *("naïve", "日本語", "हिन्दी", "🎉👍🏽", "…", "¿", "/* */", "a" * 30, " ", "\u00a0", "ſ", "'ſ", "$^~|`"),
    *("</s>", "<s>", "<unk>", "▁", "\x00", "\ufffd", "e\u0301", "foo_bar", "http://x.y/?z=1", " the", "the", " dog."),
    *("<|im_start|>", "<|im_end|>"),
]


def corpus(num_texts: int = 300) -> list[str]:
    chance = random.Random(7)
    texts = ["".join(chance.choices(PIECES, k=chance.randrange(1, 9))) for _ in range(num_texts)]
    return ["", " ", *PIECES, *TEXTS, *texts]


def tokenizer_of(tmp_path: Path, metadata: dict[str, Any], **options: Any) -> HFTokenizer:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata, {}))
    return load_tokenizer(path, **options)


def assert_same_tokens(ours: HFTokenizer, theirs: Callable[..., list[int]], texts: list[str]) -> None:
    for text in texts:
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, special), repr(text)


CHAT = ChatPrompt(
    messages_json=json.dumps(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>"}]
    ).encode(),
    add_generation_prompt=True,
)


def test_the_shipped_model_s_tokenizer_is_the_same_from_a_file(tmp_path: Path) -> None:
    ours, theirs = tokenizer_of(tmp_path, tokenizer_metadata(LEAF)), load_tokenizer(LEAF)
    # Qwen2's tokenizers compose characters first; the shipped one was made without.
    texts = [text for text in corpus() if "e\u0301" not in text]
    assert_same_tokens(ours, theirs.encode, texts)
    for text in texts:
        ids = theirs.encode(text)
        assert ours.decode(ids, False) == theirs.decode(ids, False)
        assert [ours.token_bytes(token_id) for token_id in ids] == [theirs.token_bytes(token_id) for token_id in ids]
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.special_token_ids == theirs.special_token_ids
    assert (ours.vocab_size, ours.model_vocab_size) == (theirs.vocab_size, theirs.model_vocab_size)
    assert (ours.leading_space, ours.bos_token_id) == (theirs.leading_space, theirs.bos_token_id)
    assert ours.chat_template == theirs.chat_template
    assert ours.render_chat(CHAT) == theirs.render_chat(CHAT)


def test_qwen2_composes_characters_first(tmp_path: Path) -> None:
    ours = tokenizer_of(tmp_path, tokenizer_metadata(LEAF))
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9") == load_tokenizer(LEAF).encode("caf\u00e9")


# What the models' own tokenizer.json files have, put together from the library's parts.
_OWN: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_pieces_are_cut_as_by_the_models_own_parts(pre: str, tmp_path: Path) -> None:
    backend = trained(pre_tokenizers.Sequence(_OWN[pre]))
    save(tmp_path / "hf", backend, chat_template=None)
    ours = tokenizer_of(tmp_path, tokenizer_metadata(tmp_path / "hf", pre=pre))
    assert_same_tokens(ours, lambda text, special: backend.encode(text, add_special_tokens=special).ids, corpus())


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "tekken", "qwen2", "dbrx", "gpt-2"])
def test_any_text_comes_back_from_its_tokens(pre: str, tmp_path: Path) -> None:
    save(tmp_path / "hf", byte_level_backend(), chat_template=None)
    metadata = {**tokenizer_metadata(tmp_path / "hf", pre=pre), "tokenizer.ggml.add_bos_token": False}
    ours = tokenizer_of(tmp_path, metadata)
    for text in corpus(60):
        if pre != "qwen2" or "e\u0301" not in text:
            assert ours.decode(ours.encode(text), False) == text


CUTS = {
    "llama-bpe": ("Hi  world 1234 it's\n\n x", ["Hi", " ", " world", " ", "123", "4", " it", "'s", "\n\n", " x"]),
    "qwen2": ("a 12 IT'S\r\n ok", ["a", " ", "1", "2", " IT", "'S", "\r\n", " ok"]),
    "gpt-2": ("a 12 IT'S  ok", ["a", " 12", " IT", "'", "S", " ", " ok"]),
    "default": ("a=1234, b 56", ["a", "=", "123", "4", ",", " b", " ", "56"]),
    "smollm": ("a 12 b", ["a", " ", "1", "2", " b"]),
    "tekken": ("helloWorld 12", ["hello", "World", " ", "1", "2"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_a_text_is_cut_where_the_rule_says(pre: str) -> None:
    text, expected = CUTS[pre]
    pieces = [text]
    for pattern in PRE_TOKENIZERS[pre].patterns:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        pieces = [part for piece in pieces for part, _ in split.pre_tokenize_str(piece)]
    assert pieces == expected


def test_a_whole_word_in_the_vocabulary_is_one_token_where_the_rule_says(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc", "bc"],
        "tokenizer.ggml.merges": ["b c"],
    }
    merged = tokenizer_of(tmp_path, {**metadata, "tokenizer.ggml.pre": "gpt-2"})
    whole = tokenizer_of(tmp_path, {**metadata, "tokenizer.ggml.pre": "llama-bpe"})
    assert (merged.encode("abc"), whole.encode("abc")) == ([0, 5], [4])


def test_a_merge_may_begin_with_a_space(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [" ", "a", " a"],
        "tokenizer.ggml.merges": ["  a"],
    }
    assert tokenizer_of(tmp_path, metadata).vocab_size == 3


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [1]),  # this rule begins texts
        ({"add_bos_token": False}, []),
        ({"add_bos_token": True, "add_eos_token": True}, [1, 2]),
    ],
)
def test_first_and_last_token_stand_round_a_text_where_the_file_says(
    keys: dict[str, bool], expected: list[int], tmp_path: Path
) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": ["a", "<s>", "</s>", "aa"],
        "tokenizer.ggml.token_type": [1, 3, 3, 1],
        "tokenizer.ggml.merges": ["a a"],
        "tokenizer.ggml.bos_token_id": U32(1),
        "tokenizer.ggml.eos_token_id": U32(2),
        **{f"tokenizer.ggml.{key}": flag for key, flag in keys.items()},
    }
    ours = tokenizer_of(tmp_path, metadata)
    assert [token_id for token_id in ours.encode("a") if token_id != 0] == expected
    assert ours.encode("a", False) == [0]
    assert ours.encode("<s>a</s>", False) == [1, 0, 2]


def sentence_piece_metadata(pieces: dict[str, tuple[float, int]], **keys: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(pieces),
        "tokenizer.ggml.scores": [score for score, _ in pieces.values()],
        "tokenizer.ggml.token_type": [kind for _, kind in pieces.values()],
        **{f"tokenizer.ggml.{key}": item for key, item in keys.items()},
    }


def sentence_piece() -> dict[str, tuple[float, int]]:
    """A vocabulary as SentencePiece trains them: control, bytes, merged pieces by falling score, characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    backend.train_from_iterator([text for text in corpus() if "\x00" not in text], trainer)
    document = json.loads(backend.to_str())["model"]
    merged = ["".join(merge) for merge in document["merges"]]
    merged = [token for token in merged if "<" not in token and "\n\n" not in token]
    letters = [token for token in document["vocab"] if len(token) == 1]
    pieces: dict[str, tuple[float, int]] = {"<unk>": (0.0, 2), "<s>": (0.0, 3), "</s>": (0.0, 3)}
    pieces |= {f"<0x{byte:02X}>": (0.0, 6) for byte in range(256)}
    # Falling, so that each score stands for one token.
    pieces |= {token: (-float(rank), 1) for rank, token in enumerate(dict.fromkeys([*merged, *letters]))}
    return pieces


def test_sentence_piece_tokens_are_those_of_the_library_s_own_conversion(tmp_path: Path) -> None:
    pieces = sentence_piece()
    ours = tokenizer_of(tmp_path, sentence_piece_metadata(pieces))
    ids = {token: token_id for token_id, token in enumerate(pieces)}
    plain = {token: score for token, (score, kind) in pieces.items() if kind == 1}
    document = json.loads(metaspace_backend().to_str())  # Llama 2's normalizer and decoder, round another vocabulary
    document["model"]["vocab"] = ids
    document["model"]["merges"] = [list(merge) for merge in generate_merges({t: ids[t] for t in plain}, plain)]
    document["added_tokens"] = [
        {**document["added_tokens"][0], "id": index, "content": token}
        for index, token in enumerate(("<unk>", "<s>", "</s>"))
    ]
    document["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    theirs = Tokenizer.from_str(json.dumps(document))
    assert len(document["model"]["merges"]) > 200
    assert_same_tokens(ours, lambda text, special: theirs.encode(text, add_special_tokens=special).ids, corpus())
    for text in corpus(50):
        found = ours.encode(text)
        assert ours.decode(found) == theirs.decode(found)
    assert (ours.bos_token_id, ours.eos_token_ids, ours.leading_space) == (1, (2,), "drop_one")


def test_sentence_piece_tokens_are_those_of_transformers_llama_tokenizer(tmp_path: Path) -> None:
    pieces = sentence_piece()
    ours = tokenizer_of(tmp_path, sentence_piece_metadata(pieces))
    ids = {token: token_id for token_id, token in enumerate(pieces)}
    plain = {token: score for token, (score, kind) in pieces.items() if kind == 1}
    merges = generate_merges({token: ids[token] for token in plain}, plain)
    theirs = LlamaTokenizer(vocab=ids, merges=merges)
    # The newer class puts no space before a text that begins with one, nor behind a special token.
    for text in corpus():
        if "<" not in text and not text.startswith((" ", "▁")):
            assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False), repr(text)


def test_a_byte_that_is_in_no_piece_falls_back_to_its_byte(tmp_path: Path) -> None:
    ours = tokenizer_of(tmp_path, sentence_piece_metadata(sentence_piece()))
    ids = ours.encode("\U0001f9ff", False)
    assert [ours._fast.id_to_token(token_id) for token_id in ids[-4:]] == ["<0xF0>", "<0x9F>", "<0xA7>", "<0xBF>"]
    assert ours.decode(ids) == "\U0001f9ff"


def test_gemma_has_no_space_before_a_text_and_keeps_its_own(tmp_path: Path) -> None:
    pieces = {**sentence_piece(), "<start_of_turn>": (0.0, 3), "<end_of_turn>": (0.0, 3), "\n\n": (0.0, 4)}
    ours = tokenizer_of(tmp_path, sentence_piece_metadata(pieces, add_space_prefix=False))
    assert ours.encode("▁", False) == ours.encode(" ", False)
    assert ours.decode(ours.encode(" the", False)) == " the"
    assert ours._fast.id_to_token(ours.encode("the", False)[0])[0] != "▁"
    assert ours.encode("\n\n", False) == [len(pieces) - 1]
    assert ours.eos_token_ids == (2, len(pieces) - 2)
    assert ours.decode([len(pieces) - 1, len(pieces) - 2]) == "\n\n"  # user-defined tokens are text, control ones not


def test_unused_tokens_fill_the_embedding_up_and_are_not_met(tmp_path: Path) -> None:
    metadata = tokenizer_metadata(LEAF)
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "[PAD4096]", "[PAD4097]"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 5, 5]
    ours = tokenizer_of(tmp_path, metadata)
    assert (ours.vocab_size, ours.model_vocab_size) == (4096, 4098)
    assert ours.decode([4097]) == ""


def test_another_chat_template_may_be_given(tmp_path: Path) -> None:
    ours = tokenizer_of(tmp_path, tokenizer_metadata(LEAF), chat_template="{{ messages[0].content }}{{ eos_token }}")
    assert ours.render_chat(CHAT) == "Be brief.<|im_end|>"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"tokenizer.ggml.model": "t5"}, "of kind 't5'; gpt2 and llama are read.*--tokenizer"),
    "no kind": ({"tokenizer.ggml.model": None}, "no tokenizer"),
    "cut": ({"tokenizer.ggml.pre": "viking"}, "'viking'.*known are default, gpt-2"),
    "no cut": ({"tokenizer.ggml.pre": None}, "how texts are cut"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
    "tokens of another kind": ({"tokenizer.ggml.tokens": [1, 2]}, "no vocabulary"),
    "no merges": ({"tokenizer.ggml.merges": None}, "no merges"),
    "merge of nothing": ({"tokenizer.ggml.merges": ["ab"]}, "merge 'ab' is not of tokens"),
    "merge of strangers": ({"tokenizer.ggml.merges": ["zzzz yyyy"]}, "merge 'zzzz yyyy'"),
    "types": ({"tokenizer.ggml.token_type": [1, 2, 3]}, "token_type does not have a number for each of 4096"),
    "flag": ({"tokenizer.ggml.add_bos_token": U32(1)}, "add_bos_token is neither true nor false"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_tokenizer_that_is_not_known_or_broken_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    metadata = {**tokenizer_metadata(LEAF), **changes}
    with pytest.raises(UnsupportedModelError, match=message):
        tokenizer_of(tmp_path, {key: item for key, item in metadata.items() if item is not None})


def test_a_broken_file_is_refused_by_the_tokenizer_too(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0")
    with pytest.raises(UnsupportedModelError, match="not a whole GGUF file"):
        load_tokenizer(tmp_path / "model.gguf")


def test_token_ids_past_the_vocabulary_name_no_token(tmp_path: Path) -> None:
    ours = tokenizer_of(tmp_path, {**tokenizer_metadata(LEAF), "tokenizer.ggml.bos_token_id": U32(2**32 - 1)})
    assert ours.bos_token_id is None
