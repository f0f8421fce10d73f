"""What an engine is made of, wherever it runs: the same actors on one loop, or in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ..actors.tokenizer.hf_tokenizer import HFTokenizer
from ..messages.kv import ResetPrefixCache
from ..messages.system import Drain
from .frontend import FrontEnd
from .stats import EngineStats

if TYPE_CHECKING:
    from .api.service_account import ServiceAccount

ActorHandle = Callable[[Any, int], Any]
"""`handle(message, now_ns)` of a core."""


class Tap(Protocol):
    """Watches the two cores that decide, by wrapping their `handle`."""

    def wrap_scheduler(self, handle: ActorHandle) -> ActorHandle: ...

    def wrap_allocator(self, handle: ActorHandle) -> ActorHandle: ...


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model once it is loaded.

    Attributes:
        name: as its user gave it; of a folder, the folder's name.
        folder: of the checkpoint, or the GGUF file.
        vocab_size: token ids are below it.
        max_model_len: longest prompt plus output that model and KV cache allow.
        num_blocks: of the KV cache.
        kv_cache_bytes: their size.
        dtype: of weights and KV.
        load_seconds: it took to load the weights.
        is_deterministic: a row's logits are the same bits alone and in any batch.
    """

    name: str
    folder: str
    vocab_size: int
    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int
    dtype: str
    load_seconds: float
    is_deterministic: bool = False


class Graph(Protocol):
    """The actors of one engine, running."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def frontend(self) -> FrontEnd: ...

    @property
    def tokenizer(self) -> HFTokenizer: ...

    @property
    def num_submitting(self) -> int:
        """Prompts that wait for the tokenizer."""

    @property
    def max_submitting(self) -> int:
        """Most prompts that may."""

    @property
    def why_not_ready(self) -> str:
        """Empty if a request sent now would be answered."""

    @property
    def is_broken(self) -> bool:
        """Whether it will never be ready again."""

    @property
    def service_account(self) -> ServiceAccount | None:
        """What the edges know of each other's counts; None if there is but one."""

    def send(self, message: Drain | ResetPrefixCache) -> None:
        """Say something in the front end's name."""

    def stats(self) -> EngineStats: ...

    def crash_actor(self, actor: str) -> None:
        """Have an actor of the edge fail at its next message."""

    async def close(self) -> None:
        """Stop the actors and give the memory back; the front end has ended every request."""
