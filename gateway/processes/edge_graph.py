"""What every edge of several processes is made of, whether it supervises them or is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import structlog

from ...actors.runtime.clock import MonotonicClock
from ...actors.runtime.in_process import InProcessRuntime
from ...actors.runtime.port import Port
from ...actors.runtime.routes import Address
from ...messages.kv import ResetPrefixCache
from ...messages.request import RequestEnded
from ...messages.system import Drain
from ..config import EngineConfig
from ..frontend import FrontEnd
from ..graph import ModelFacts
from ..stats import EngineStats
from .edge import EdgeActors
from .edge_port import edge_routes, fleet_stats
from .engine_link import EngineLink, FromEngine
from .fleet import Fleet

if TYPE_CHECKING:
    from ...actors.tokenizer.hf_tokenizer import HFTokenizer
    from ..api.service_account import ServiceAccount

log = structlog.get_logger("octavo.graph")


class EdgeGraph:
    """Front end, tokenizer and detokenizer here, and a line to each engine.

    Args:
        config: of the engine.
        port: of this edge.
        links: to the engines; they deliver to `_deliver`.
    """

    def __init__(self, config: EngineConfig, port: Port, links: Sequence[EngineLink]) -> None:
        self._config = config
        self._port = port
        self._broken_because = ""
        self._facts: ModelFacts | None = None
        self._edge: EdgeActors | None = None
        self._fleet = Fleet(links, config.routing)
        self._runtime = InProcessRuntime(edge_routes(), MonotonicClock(), self._on_actor_failure)

    def _add_actors(self, facts: ModelFacts, tokenizer: HFTokenizer, *, first_request_id: int = 0) -> EdgeActors:
        self._facts = facts
        self._fleet.size_caches(facts.num_blocks * self._config.block_size)
        self._edge = EdgeActors(self._config, facts, tokenizer, self._runtime, first_request_id=first_request_id)
        self._runtime.add("scheduler", self._fleet)
        self._runtime.add("kv_allocator", self._fleet)
        self._runtime.connect()
        return self._edge

    # ---- what the engine asks ----

    @property
    def facts(self) -> ModelFacts:
        assert self._facts is not None
        return self._facts

    @property
    def _actors(self) -> EdgeActors:
        assert self._edge is not None
        return self._edge

    @property
    def frontend(self) -> FrontEnd:
        return self._actors.frontend

    @property
    def tokenizer(self) -> HFTokenizer:
        return self._actors.tokenizer

    @property
    def num_submitting(self) -> int:
        return self._actors.num_submitting

    @property
    def max_submitting(self) -> int:
        return self._actors.max_submitting

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each kind of process was replaced."""
        raise NotImplementedError

    @property
    def drops_of_others(self) -> Mapping[str, int]:
        """Messages dropped by reason, of those processes that tell their supervisor alone."""
        return {}

    @property
    def num_late_compilations(self) -> int:
        """Of executors, after they were ready, which tell their supervisor alone."""
        return 0

    @property
    def service_account(self) -> ServiceAccount | None:
        """What the edges know of each other's counts; None if there is but one."""
        return None

    def send(self, message: Drain | ResetPrefixCache) -> None:
        """Say something in the front end's name."""
        self._runtime.send("frontend", message)

    def stats(self) -> EngineStats:
        """The account of all engines together."""
        return fleet_stats(
            *(self._fleet.links, self._actors, self._port, self.restarts, self.drops_of_others),
            num_late_compilations=self.num_late_compilations,
        )

    def crash_actor(self, actor: str) -> None:
        """See `EdgeActors.crash_actor`."""
        self._actors.crash_actor(actor)

    @property
    def is_broken(self) -> bool:
        """Whether it will never serve again."""
        return bool(self._broken_because)

    # ---- carrying ----

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, RequestEnded):
            self._fleet.note_end(message)
        self._runtime.send("scheduler", message)

    def _on_actor_failure(self, address: Address, error: Exception) -> None:
        log.error("actor.failed", actor=address, exc_info=error)
        self._break(f"the {address} failed: {type(error).__name__}")

    def _break(self, why: str) -> None:
        """Nothing can be served any more."""
        self._broken_because = self._broken_because or why
        if self._edge is not None:
            self.frontend.close(why)
            self.frontend.end_all("executor_lost", why)
