"""The tokenizer in a file's metadata, as a tokenizer.json says it.

Sources: the `tokenizer.ggml` keys in docs/gguf.md of ggml-org/ggml; src/llama-vocab.cpp of ggml-org/llama.cpp for what
they mean; and the file format of the `tokenizers` library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import UnsupportedModelError, WeightsError
from .pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from .reader import GGUFFile

_PREFIX: Final = "tokenizer.ggml."

# `tokenizer.ggml.token_type`
_NORMAL: Final = 1
_UNKNOWN: Final = 2
_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_UNUSED: Final = 5

# Names of special tokens that chat templates read, and the key of each.
_NAMED: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelt so in the format
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}

# Of SentencePiece's vocabularies, where a file does not say.
_DEFAULT_IDS: Final = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Control tokens that end an answer, as the loader of llama.cpp knows them by their texts.
_ENDS: Final = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "< EOT >"),
)

_METASPACE: Final = "▁"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files of a checkpoint's tokenizer would say.

    Attributes:
        tokenizer_json: the document, not yet encoded.
        special_tokens: texts by name (`bos_token`).
        eos_token_ids: tokens that end an answer.
        chat_template: jinja, or None.
        vocab_size: number of tokens, unused ones too.
    """

    tokenizer_json: dict[str, Any]
    special_tokens: dict[str, str]
    eos_token_ids: tuple[int, ...]
    chat_template: str | None
    vocab_size: int


def read_tokenizer(path: Path) -> TokenizerFiles:
    """The tokenizer in a GGUF file.

    Raises:
        UnsupportedModelError: of a kind, or with a pre-tokenizer, that is not known.
        WeightsError: the file is broken, or has no tokenizer.
    """
    with GGUFFile(path) as file:
        vocabulary = _Vocabulary(file)
        match vocabulary.text("model"):
            case "gpt2":
                document = _byte_level(vocabulary)
            case "llama":
                document = _sentence_piece(vocabulary)
            case None:
                raise vocabulary.broken("it has no tokenizer (tokenizer.ggml.model)")
            case other:
                raise vocabulary.unsupported(f"its tokenizer is of kind {other[:64]!r}; gpt2 and llama are read")
        template = file.metadata.get("tokenizer.chat_template")
        return TokenizerFiles(
            tokenizer_json=document,
            special_tokens=vocabulary.special_tokens(),
            eos_token_ids=vocabulary.eos_token_ids(),
            chat_template=template if isinstance(template, str) and template else None,
            vocab_size=len(vocabulary.tokens),
        )


class _Vocabulary:
    """The `tokenizer.ggml` keys, of the types that are due."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        tokens = file.metadata.get(_PREFIX + "tokens")
        if not isinstance(tokens, list) or not tokens:
            raise self.broken("it has no vocabulary (tokenizer.ggml.tokens)")
        self.tokens: list[str] = tokens
        self.types: list[int] = self._numbers("token_type", "iu", _NORMAL)

    def broken(self, what: str) -> WeightsError:
        return WeightsError(f"{self._file.path}: {what}. Convert the model again, or give --tokenizer a folder")

    def unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._file.path}: {what}. Give --tokenizer the folder or hub name of the model's own tokenizer"
        )

    def _numbers(self, name: str, kinds: str, default: float) -> list[Any]:
        """One number for each token."""
        values = self._file.metadata.get(_PREFIX + name)
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or len(values) != len(self.tokens):
            raise self.broken(f"tokenizer.ggml.{name} does not have a number for each of {len(self.tokens)} tokens")
        numbers: list[Any] = values.tolist()
        return numbers

    def text(self, name: str) -> str | None:
        value = self._file.metadata.get(_PREFIX + name)
        if value is not None and not isinstance(value, str):
            raise self.broken(f"tokenizer.ggml.{name} is no text")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._file.metadata.get(_PREFIX + name, default)
        if not isinstance(value, bool):
            raise self.broken(f"tokenizer.ggml.{name} is neither true nor false")
        return value

    def token_id(self, name: str) -> int | None:
        """The token that a key names; none where it names one that is not in the vocabulary, as -1 does."""
        default = _DEFAULT_IDS.get(name) if self.text("model") == "llama" else None
        value = self._file.metadata.get(_PREFIX + name, -1 if default is None else default)
        if isinstance(value, int) and 0 <= value < len(self.tokens):
            return value
        return None

    def scores(self) -> list[float]:
        scores = self._numbers("scores", "f", 0.0)
        if any(math.isnan(score) for score in scores):
            raise self.broken("tokenizer.ggml.scores has one that is no number")
        return scores

    def merges(self) -> list[list[str]]:
        merges = self._file.metadata.get(_PREFIX + "merges")
        if not isinstance(merges, list):
            raise self.broken("it has no merges (tokenizer.ggml.merges)")
        known = set(self.tokens)
        pairs = []
        for merge in merges:
            # The space between the two is the first one behind a first character, which may be a space itself.
            left, found, right = merge[1:].partition(" ")
            pair = [merge[:1] + left, right]
            if not found or not known.issuperset(pair) or pair[0] + pair[1] not in known:
                raise self.broken(f"the merge {merge[:64]!r} is not of tokens of the vocabulary")
            pairs.append(pair)
        return pairs

    def ids(self, *, with_unused: bool) -> dict[str, int]:
        """Id of each token. Unused ones at the end fill the embedding up and are no token of the model's tokenizer."""
        end = len(self.tokens)
        while not with_unused and end > 1 and self.types[end - 1] == _UNUSED:
            end -= 1
        return {token: token_id for token_id, token in enumerate(self.tokens[:end])}

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that are found in a text before it is cut."""
        return [
            {
                "id": token_id,
                "content": self.tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _USER_DEFINED,
            }
            for token_id, kind in enumerate(self.types)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and self.tokens[token_id]
        ]

    def special_tokens(self) -> dict[str, str]:
        ids = {name: self.token_id(key) for name, key in _NAMED.items()}
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    def eos_token_ids(self) -> tuple[int, ...]:
        stated = [self.token_id(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        known = [
            token_id for token_id, kind in enumerate(self.types) if kind == _CONTROL and self.tokens[token_id] in _ENDS
        ]
        return tuple(dict.fromkeys([*(token_id for token_id in stated if token_id is not None), *known]))

    def post_processor(self, *, adds_bos: bool) -> dict[str, Any] | None:
        """Puts the first and the last token round a text."""
        first = self.token_id("bos_token_id") if self.flag("add_bos_token", adds_bos) else None
        last = self.token_id("eos_token_id") if self.flag("add_eos_token", False) else None
        if first is None and last is None:
            return None
        before, after = self._template(first), self._template(last)
        return {
            "type": "TemplateProcessing",
            "single": [*before, {"Sequence": {"id": "A", "type_id": 0}}, *after],
            "pair": [
                *(*before, {"Sequence": {"id": "A", "type_id": 0}}, *after),
                *(*before, {"Sequence": {"id": "B", "type_id": 1}}, *after),
            ],
            "special_tokens": {
                self.tokens[token_id]: {
                    "id": self.tokens[token_id],
                    "ids": [token_id],
                    "tokens": [self.tokens[token_id]],
                }
                for token_id in (first, last)
                if token_id is not None
            },
        }

    def _template(self, token_id: int | None) -> list[dict[str, Any]]:
        return [] if token_id is None else [{"SpecialToken": {"id": self.tokens[token_id], "type_id": 0}}]

    def pre_tokenizer(self) -> PreTokenizer:
        name = self.text("pre")
        if name is None:
            raise self.unsupported("it does not say how texts are cut (tokenizer.ggml.pre)")
        known = PRE_TOKENIZERS.get(name)
        if known is None:
            raise self.unsupported(
                f"texts are cut by {name[:64]!r} (tokenizer.ggml.pre); known are {', '.join(PRE_TOKENIZERS)}"
            )
        return known


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Byte-pair encoding of GPT-2's kind: bytes spelt as printable characters, pieces by regular expressions."""
    cut = vocabulary.pre_tokenizer()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": {"type": cut.normal_form} if cut.normal_form else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                *(
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                    for pattern in cut.patterns
                ),
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": vocabulary.post_processor(adds_bos=cut.adds_bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": cut.takes_whole_words,
            "vocab": vocabulary.ids(with_unused=False),
            "merges": vocabulary.merges(),
        },
    }


def _sentence_piece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """SentencePiece's byte-pair encoding: the neighbours that make the token of the highest score merge first.

    The space before a text stands before each stretch between special tokens too, as in the models' older tokenizers.
    """
    prefixed = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.token_id("unknown_token_id")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _METASPACE}
    prepend = {"type": "Prepend", "prepend": _METASPACE}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]} if prefixed else spaces,
        "pre_tokenizer": None,
        "post_processor": vocabulary.post_processor(adds_bos=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _METASPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary.ids(with_unused=True),
            "merges": _merges_by_score(vocabulary),
        },
    }


_MAX_TOKEN_LENGTH: Final = 256  # characters; a longer token of a broken file is not worth its square


def _merges_by_score(vocabulary: _Vocabulary) -> list[list[str]]:
    """Each way to make a token of two others, best first."""
    ids = vocabulary.ids(with_unused=True)
    scores = vocabulary.scores()
    ranked: list[tuple[float, int, int, int, int, str, str]] = []
    for token, token_id in ids.items():
        if vocabulary.types[token_id] not in (_NORMAL, _USER_DEFINED, _UNUSED) or len(token) > _MAX_TOKEN_LENGTH:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            left_id, right_id = ids.get(left), ids.get(right)
            if left_id is not None and right_id is not None:
                ranked.append((-scores[token_id], -len(left), -len(right), left_id, right_id, left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]
