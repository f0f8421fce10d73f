"""How much text a token can stand for at most, where a tokenizer lets that be known without a text."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .token_bytes import byte_alphabet

_KEEPS_ALL: Final = frozenset({"ByteLevel", "Digits"})


def longest_token(backend: Any) -> int | None:
    """Characters of the longest token, for byte-level BPE that loses nothing of a text; else None.

    A normalizer, a pre-tokenizer that removes what it splits at, a token that swallows the spaces beside it, or a
    byte that the vocabulary lacks: any of these lets a text of any length become a few tokens.

    Args:
        backend: a `tokenizers.Tokenizer`.
    """
    if backend.normalizer is not None or type(backend.model).__name__ != "BPE" or not _keeps_all(backend.pre_tokenizer):
        return None
    added = backend.get_added_tokens_decoder().values()
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    if any(token.lstrip or token.rstrip for token in added) or not byte_alphabet().keys() <= vocabulary.keys():
        return None
    return max(map(len, vocabulary))  # a byte is spelt by one character, and a character has at least one byte


def _keeps_all(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return False
    state = msgspec.json.decode(pre_tokenizer.__getstate__(), type=dict[str, Any])
    parts = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return any(part["type"] == "ByteLevel" for part in parts) and all(
        part["type"] in _KEEPS_ALL or (part["type"] == "Split" and part["behavior"] != "Removed") for part in parts
    )
