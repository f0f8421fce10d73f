"""Prompts that a tokenizer was lost over: remembered for a while, and refused before they cost another worker."""

from __future__ import annotations

import hashlib
from typing import Final

from ...messages.request import ChatPrompt, SubmitPrompt

TTL_NS: Final = 600_000_000_000
MAX_ENTRIES: Final = 1024


class PoisonedPrompts:
    """Digests of prompts, each with the time at which it may be tried again; the oldest make room for new ones."""

    def __init__(self, *, ttl_ns: int = TTL_NS, max_entries: int = MAX_ENTRIES) -> None:
        self._ttl_ns = ttl_ns
        self._max_entries = max_entries
        self._why: dict[bytes, tuple[int, str]] = {}  # in order of expiry

    def __len__(self) -> int:
        return len(self._why)

    def add(self, message: SubmitPrompt, why: str, now_ns: int) -> None:
        digest = _digest(message)
        self._why.pop(digest, None)
        self._why[digest] = (now_ns + self._ttl_ns, why)
        while len(self._why) > self._max_entries:
            del self._why[next(iter(self._why))]

    def find(self, message: SubmitPrompt, now_ns: int) -> str:
        """Why a prompt is refused; empty if it is not."""
        while self._why:
            digest, (expires_ns, _) = next(iter(self._why.items()))
            if expires_ns > now_ns:
                break
            del self._why[digest]
        if not self._why:
            return ""  # nearly always: no digest is made
        return self._why.get(_digest(message), (0, ""))[1]


def _digest(message: SubmitPrompt) -> bytes:
    """Of all that decides what tokenizing does; parameters of sampling are no part of it."""
    prompt = message.prompt
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(prompt, str):
        digest.update(b"t" + prompt.encode("utf-8", "surrogatepass"))
    elif isinstance(prompt, ChatPrompt):
        flags = f"c{prompt.add_generation_prompt:d}{prompt.continue_final_message:d}{len(prompt.messages_json)}:"
        digest.update(flags.encode() + prompt.messages_json + prompt.template_kwargs_json)
    else:
        digest.update(b"i" + repr(prompt).encode())
    digest.update("\0".join(message.params.bad_words).encode("utf-8", "surrogatepass"))
    return digest.digest()
