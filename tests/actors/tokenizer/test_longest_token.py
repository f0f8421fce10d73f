from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from octavo.actors.tokenizer.longest_token import longest_token


def byte_level(pre_tokenizer: Any = None, normalizer: Any = None, *, missing: str = "") -> Tokenizer:
    alphabet = [char for char in sorted(pre_tokenizers.ByteLevel.alphabet()) if char not in missing]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]  # its stub lacks them
    tokenizer.train_from_iterator(["the theatre is there, and the thesis thither"] * 9, trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


TRAINED = byte_level()
LONGEST = max(map(len, TRAINED.get_vocab()))


@given(st.text(max_size=60) | st.text("the rise", max_size=60))
def test_no_text_has_fewer_tokens_than_the_longest_token_says(text: str) -> None:
    assert longest_token(TRAINED) == LONGEST > 3
    assert len(TRAINED.encode(text).ids) * LONGEST >= len(text)


def test_the_shipped_tokenizer_has_a_bound() -> None:
    shipped = Path(__file__).parents[3] / "models" / "shipped" / "leaf-4m" / "tokenizer.json"
    bound = longest_token(Tokenizer.from_file(str(shipped)))
    assert bound is not None and bound < 200


def test_added_tokens_count_as_they_are_spelt() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|a very long name of a special token|>")])
    assert longest_token(tokenizer) == len("<|a very long name of a special token|>")


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(normalizer=normalizers.Strip()),
        byte_level(pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])),
        byte_level(
            pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\\s+"), "removed"), pre_tokenizers.ByteLevel()])
        ),
        byte_level(missing="q"),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        Tokenizer(models.BPE()),
    ],
    ids=["strips", "drops spaces", "splits spaces off", "lacks a byte", "words", "no pre-tokenizer"],
)
def test_a_tokenizer_that_may_lose_text_has_none(tokenizer: Tokenizer) -> None:
    assert longest_token(tokenizer) is None


def test_a_token_that_swallows_spaces_leaves_no_bound() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    assert longest_token(tokenizer) is None
