"""Log-probabilities in the two shapes that clients know, and where in the text each token begins."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from ...messages.request import TokenLogprobs
from .engine_protocol import EngineLike

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


class TextOffsets:
    """Where each token's text begins, in characters of one answer's text.

    A token may end in the middle of a character: the next one then begins where that character does. Tokens that are
    left out of the text take no room.

    Args:
        engine: knows the tokens' bytes.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    def __init__(self, engine: EngineLike, skip_special_tokens: bool) -> None:
        self._engine = engine
        self._skipped = engine.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._position = 0
        self._is_first = True

    def take(self, token_ids: Iterable[int], text: str) -> list[int]:
        """Offsets of the answer's next tokens, of which the first begins `text`."""
        return self._offsets(token_ids, text, self._position)

    def take_prompt(self, token_ids: Iterable[int], text: str) -> list[int]:
        """Offsets of an echoed prompt's tokens; `text` is all of it, and may spell special tokens out."""
        offsets = []
        for token_id in token_ids:
            spelt_out = token_id in self._skipped and text.startswith(self._engine.token_text(token_id), self._position)
            if spelt_out:
                offsets.append(self._position)
                self._position += len(self._engine.token_text(token_id))
            else:
                offsets += self._offsets((token_id,), text, 0)
        self._decoder.reset()
        self._position = len(text)
        self._is_first = False
        return offsets

    def _offsets(self, token_ids: Iterable[int], text: str, text_starts_at: int) -> list[int]:
        offsets = []
        for token_id in token_ids:
            offsets.append(self._position)
            if token_id in self._skipped:
                continue
            data = self._engine.token_bytes(token_id)
            if (
                self._is_first
                and data.startswith(b" ")
                and text_starts_at == self._position
                and text[:1] not in ("", " ")
            ):
                data = data[1:]  # tokenizers that mark words by a leading space drop the first one
            self._is_first = False
            self._position += len(self._decoder.decode(data))
        return offsets


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None],
    token_ids: Sequence[int],
    offsets: list[int],
    engine: EngineLike,
    as_token_ids: bool,
) -> dict[str, Any]:
    """The `logprobs` object of completions: parallel lists.

    Args:
        entries: one for each token; None where nothing comes before it.
        as_token_ids: write tokens as `token_id:42`.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for entry, token_id in zip(entries, token_ids, strict=True):
        text = _token(token_id, engine, as_token_ids)
        tokens.append(text)
        if entry is None:
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        token_logprobs.append(max(entry.logprob, LOWEST))
        top: dict[str, float] = {}
        for top_id, logprob in entry.top:
            # Different tokens may read alike; the likeliest comes first and stays.
            top.setdefault(_token(top_id, engine, as_token_ids), max(logprob, LOWEST))
        top.setdefault(text, max(entry.logprob, LOWEST))
        top_logprobs.append(top)
    return {
        "text_offset": offsets,
        "token_logprobs": token_logprobs,
        "tokens": tokens,
        "top_logprobs": top_logprobs,
    }


def chat_logprobs(entries: Iterable[TokenLogprobs], engine: EngineLike, as_token_ids: bool) -> list[dict[str, Any]]:
    """The `logprobs.content` list of chat."""
    return [
        {
            **_chat_token(entry.token_id, entry.logprob, engine, as_token_ids),
            "top_logprobs": [_chat_token(top_id, logprob, engine, as_token_ids) for top_id, logprob in entry.top],
        }
        for entry in entries
    ]


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], engine: EngineLike
) -> list[dict[str, dict[str, float | int | str]] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token a map from token id to logprob, rank and text."""
    answer: list[dict[str, dict[str, float | int | str]] | None] = []
    for entry in entries:
        if entry is None:
            answer.append(None)
            continue
        position = {str(entry.token_id): _ranked(entry.token_id, entry.logprob, entry.rank, engine)}
        for index, (top_id, logprob) in enumerate(entry.top):
            position.setdefault(str(top_id), _ranked(top_id, logprob, index + 1, engine))
        answer.append(position)
    return answer


def _ranked(token_id: int, logprob: float, rank: int, engine: EngineLike) -> dict[str, float | int | str]:
    return {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": engine.token_text(token_id)}


def _chat_token(token_id: int, logprob: float, engine: EngineLike, as_token_ids: bool) -> dict[str, Any]:
    return {
        "token": _token(token_id, engine, as_token_ids),
        "logprob": max(logprob, LOWEST),
        "bytes": list(engine.token_bytes(token_id)),
    }


def _token(token_id: int, engine: EngineLike, as_token_ids: bool) -> str:
    return f"token_id:{token_id}" if as_token_ids else engine.token_text(token_id)
