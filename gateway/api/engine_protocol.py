"""What the HTTP gateway needs of an engine; `Engine` has it, and so has the fake of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ...messages.ids import RequestId
from ...messages.request import ChatPrompt, PromptReady, TextDelta
from ...messages.sampling import SamplingParams
from ..config import EngineConfig
from ..generation_config import RequestDefaults
from ..stats import EngineStats

EngineEvent = PromptReady | TextDelta
Sink = Callable[[EngineEvent], None]


class EngineLike(Protocol):
    """An engine in the running event loop."""

    config: EngineConfig
    model_name: str
    max_model_len: int
    vocab_size: int
    created: int  # unix seconds
    num_blocks: int
    request_defaults: RequestDefaults

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered."""

    @property
    def why_not_ready(self) -> str: ...

    @property
    def is_broken(self) -> bool:
        """Whether it will never be ready again."""

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out of the text."""

    def submit(
        self,
        prompt: str | Sequence[int] | ChatPrompt,
        params: SamplingParams,
        sink: Sink,
        *,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        truncate_prompt_tokens: int = 0,
        timeout_s: float | None = None,
    ) -> tuple[RequestId, ...]:
        """Start `params.n` sequences; `sink` hears of each until a delta with a finish reason.

        Raises:
            InvalidRequestError, QueueFullError, EngineClosedError: refused at once.
        """

    def cancel(self, request_id: RequestId) -> None:
        """No further call of the sink; the blocks are free within a step. Unknown ids are ignored."""

    async def tokenize(self, prompt: str | ChatPrompt, add_special_tokens: bool = True) -> list[int]: ...

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def stats(self) -> EngineStats: ...

    async def drain(self) -> None:
        """Refuse new requests and wait for those that were accepted."""
