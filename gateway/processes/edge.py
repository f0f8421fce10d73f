"""The actors at a client's side: front end, tokenizer, detokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...actors.detokenizer.actor import DetokenizerActor
from ...actors.detokenizer.core import DetokenizerCore
from ...actors.runtime.in_process import InProcessRuntime
from ...actors.tokenizer.actor import TokenizerActor
from ...actors.tokenizer.core import TokenizerConfig, TokenizerCore
from ...messages.base import Message
from ...messages.errors import InvalidRequestError
from ..config import EngineConfig
from ..frontend import FrontEnd
from ..graph import ModelFacts

if TYPE_CHECKING:
    from ...actors.tokenizer.hf_tokenizer import HFTokenizer

MAX_N = 16
"""Most sequences of one prompt."""

MAX_TOKENIZING_NS = 2_000_000
"""Prompts that come together are tokenized for so long before streams, and requests to be refused, have their turn."""


class EdgeActors:
    """Registers the edge's actors with a runtime; who they talk to is the runtime's matter.

    Attributes:
        capacity: of a mailbox that hears about requests.
        max_submitting: prompts that may wait for the tokenizer.
    """

    def __init__(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        tokenizer: HFTokenizer,
        runtime: InProcessRuntime,
        *,
        first_request_id: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self._runtime = runtime
        max_live = config.max_num_seqs + config.max_num_queued_requests
        # `submit` refuses while `max_submitting` messages wait for the tokenizer. Each of them stands for at most
        # MAX_N sequences, and a sequence for a submission, a cancel and, while it is live, a few messages more.
        self.max_submitting = max_live + MAX_N
        self.capacity = 4 * MAX_N * self.max_submitting
        self.frontend = FrontEnd(self._send, max_live=max_live, seed=config.seed, first_request_id=first_request_id)
        core = TokenizerCore(
            TokenizerConfig(
                vocab_size=facts.vocab_size, max_model_len=facts.max_model_len, max_logprobs=config.max_logprobs
            ),
            tokenizer,
        )
        self._tokenizer_actor = TokenizerActor(core, runtime)
        runtime.add_actor("frontend", self.frontend.handle, self.capacity)
        self._tokenizer_mailbox = runtime.add_actor(
            "tokenizer", self._tokenizer_actor.handle, self.capacity, max_hold_ns=MAX_TOKENIZING_NS
        )
        self._detokenizer_actor = DetokenizerActor(lambda: DetokenizerCore(tokenizer))
        runtime.add_actor("detokenizer", self._detokenizer_actor.handle, self.capacity)

    @property
    def num_submitting(self) -> int:
        return len(self._tokenizer_mailbox)

    @property
    def restarts(self) -> dict[str, int]:
        """How often each actor was built anew."""
        return {
            "tokenizer": self._tokenizer_actor.num_restarts,
            "detokenizer": self._detokenizer_actor.num_restarts,
        }

    @property
    def num_failed_streams(self) -> int:
        """Streams whose tokens could not be made into text."""
        return self._detokenizer_actor.num_failed_streams

    def crash_actor(self, actor: str) -> None:
        """Have an actor fail at its next message, for tests of recovery.

        Raises:
            InvalidRequestError: there is no such actor here.
        """
        crashes = {"tokenizer": self._tokenizer_actor.crash, "detokenizer": self._detokenizer_actor.crash}
        if actor not in crashes:
            raise InvalidRequestError(f"{actor} cannot be made to fail: {', '.join(crashes)} can", param="actor")
        crashes[actor]()

    async def close(self) -> None:
        """Stop tokenizing."""
        await self._tokenizer_actor.close()

    def _send(self, message: Message) -> None:
        self._runtime.send("frontend", message)
