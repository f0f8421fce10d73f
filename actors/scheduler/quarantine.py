"""Requests that were found to kill the executor, remembered for a while so that they do not come back."""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from ...messages.processes import RememberQuarantined
from ...messages.request import SubmitRequest

PERIOD_NS = 600_000_000_000
"""How long a request is refused."""

MAX_REMEMBERED = 1024
"""Past it, the one that was found first is forgotten."""

REFUSAL = (
    "a request like this one made the model's process fail again and again, a short while ago: change the prompt or "
    "the parameters"
)

_encode = msgspec.msgpack.Encoder().encode


class Quarantine:
    """The convicted requests of the last ten minutes, by a digest of what the executor computes from."""

    def __init__(self) -> None:
        self._until_ns: dict[bytes, int] = {}  # the first convicted first

    def __len__(self) -> int:
        return len(self._until_ns)

    def add(self, submit: SubmitRequest, now_ns: int) -> RememberQuarantined:
        """Remember a request from now on; returns what another quarantine must hear to know the same."""
        entry = RememberQuarantined(_digest(submit), now_ns + PERIOD_NS)
        self.remember(entry)
        return entry

    def entries(self) -> list[RememberQuarantined]:
        """What another quarantine must hear to know the same."""
        return [RememberQuarantined(digest, until_ns) for digest, until_ns in self._until_ns.items()]

    def remember(self, entry: RememberQuarantined) -> None:
        """Remember a request that was convicted elsewhere."""
        self._until_ns.pop(entry.digest, None)
        self._until_ns[entry.digest] = entry.until_ns
        if len(self._until_ns) > MAX_REMEMBERED:
            del self._until_ns[next(iter(self._until_ns))]

    def holds(self, submit: SubmitRequest, now_ns: int) -> bool:
        """Whether an equal request was convicted lately; costs nothing while none was."""
        until_ns = self._until_ns
        while until_ns:
            first = next(iter(until_ns))
            if until_ns[first] > now_ns:  # not so some behind it, of which others have told late
                return until_ns.get(_digest(submit), 0) > now_ns
            del until_ns[first]
        return False


def _digest(submit: SubmitRequest) -> bytes:
    """Hash prompt, salt, and parameters, but for those that only say how long to go on or how to show the text.

    Not the seed either: it is drawn anew when a client sends the same request again.
    """
    params = submit.params
    parts = (
        submit.cache_salt,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
        sorted((params.logit_bias or {}).items()),
        params.allowed_token_ids,
        params.bad_words_token_ids,
        params.logprobs,
        params.prompt_logprobs,
    )
    return blake2b(submit.prompt_token_ids + _encode(parts), digest_size=16).digest()
