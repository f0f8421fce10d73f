"""Longer, shorter and bounded prompts and answers."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

from ...messages.errors import InvalidWorkloadError
from .content_ids import FIRST_PRIVATE_ID, ContentIds, content_ids_of
from .request import TraceRequest, Workload
from .transform import Tally, Transform

ContextPolicy = Literal["refuse", "cut", "drop"]
Segments = tuple[tuple[int, int], ...]


def cut_segments(segments: Segments, num_tokens: int) -> Segments:
    """The first `num_tokens` of a prompt."""
    kept = []
    for content_id, length in segments:
        if num_tokens <= 0:
            break
        kept.append((content_id, min(length, num_tokens)))
        num_tokens -= length
    return tuple(kept)


class ClampContext(Transform):
    """Requests longer than the context (prompt and answer together).

    `refuse` leaves them to the engine, which refuses them, and counts them; `drop` leaves them out; `cut` shortens the
    prompt at its end, down to half of the context at most, and then the answer.
    """

    def __init__(self, base: Workload, max_model_len: int, policy: ContextPolicy) -> None:
        if max_model_len < 2:
            raise InvalidWorkloadError(
                f"a context of {max_model_len} tokens holds no prompt and answer: give 2 or more"
            )
        if policy not in get_args(ContextPolicy):
            raise InvalidWorkloadError(f"{policy!r} is none of {', '.join(get_args(ContextPolicy))}")
        super().__init__(base, f"context {max_model_len} ({policy})")
        self._max_model_len = max_model_len
        self._policy = policy

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest | None:
        """Fitting, or not at all."""
        limit, num_prompt, num_output = self._max_model_len, request.num_prompt_tokens, request.num_output_tokens
        if num_prompt + num_output <= limit:
            return request
        if self._policy == "refuse":
            tally.change(f"longer than {limit} tokens: left for the engine to refuse")
            return request
        if self._policy == "drop":
            tally.skip(f"longer than {limit} tokens")
            return None
        tally.change(f"cut to {limit} tokens")
        num_prompt = min(num_prompt, max(limit - num_output, (limit + 1) // 2, 1))
        return msgspec.structs.replace(
            request,
            segments=cut_segments(request.segments, num_prompt),
            num_output_tokens=min(num_output, limit - num_prompt),
        )


class ScaleLengths(Transform):
    """Prompts and answers times a factor; what prompts share they still share."""

    def __init__(self, base: Workload, *, prompts: float = 1.0, outputs: float = 1.0) -> None:
        for factor in (prompts, outputs):
            if not 1e-6 <= factor <= 1e4:
                raise InvalidWorkloadError(f"length factor {factor:g} is not between 0.000001 and 10000")
        super().__init__(base, f"prompts x {prompts:g}, outputs x {outputs:g}")
        self._prompts = prompts
        self._outputs = outputs

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """Each run's ends are moved by the factor, so that equal beginnings stay equal."""
        segments = request.segments
        if self._prompts != 1.0:
            scaled, end, begin = [], 0, 0
            for content_id, length in segments:
                end += length
                scaled_end = round(end * self._prompts)
                if scaled_end > begin:
                    scaled.append((content_id, scaled_end - begin))
                    begin = scaled_end
            segments = tuple(scaled) or ((segments[0][0], 1),)
        num_output = max(1, round(request.num_output_tokens * self._outputs))
        return msgspec.structs.replace(request, segments=segments, num_output_tokens=num_output)


class LimitOutputs(Transform):
    """Answers of so many tokens at most."""

    def __init__(self, base: Workload, max_output_tokens: int) -> None:
        if max_output_tokens < 1:
            raise InvalidWorkloadError(f"outputs of at most {max_output_tokens} tokens are none: give 1 or more")
        super().__init__(base, f"outputs up to {max_output_tokens}")
        self._max = max_output_tokens

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """Shorter, where it is too long."""
        if request.num_output_tokens <= self._max:
            return request
        tally.change(f"output cut to {self._max} tokens")
        return msgspec.structs.replace(request, num_output_tokens=self._max)


class SharedPrefix(Transform):
    """The same system prompt before every prompt."""

    def __init__(self, base: Workload, num_tokens: int) -> None:
        if not 1 <= num_tokens < 2**31:
            raise InvalidWorkloadError(f"a common prefix of {num_tokens} tokens is none: give 1 or more")
        super().__init__(base, f"a common prefix of {num_tokens}")
        self.has_shared_prefixes = True
        ids = content_ids_of(base)
        if ids.num_shared >= FIRST_PRIVATE_ID:
            raise InvalidWorkloadError(f"{base.name} uses all ids of shared content: there is none for a common prefix")
        self._prefix = (ids.num_shared, num_tokens)
        self._ids = ContentIds(ids.num_shared + 1, ids.num_private)

    @property
    def content_ids(self) -> ContentIds:
        """One more."""
        return self._ids

    def apply(self, request: TraceRequest, tally: Tally) -> TraceRequest:
        """Longer by the prefix."""
        return msgspec.structs.replace(request, segments=(self._prefix, *request.segments))
