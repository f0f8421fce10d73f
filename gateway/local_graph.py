"""The graph of actors on one event loop, the executor on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

import structlog

from .. import __version__
from ..actors.journal.actor import Journal
from ..actors.journal.config import JournalHeader
from ..actors.kv_allocator.core import KVAllocatorCore
from ..actors.runtime.clock import MonotonicClock
from ..actors.runtime.in_process import InProcessRuntime
from ..actors.runtime.routes import ROUTES, Address
from ..actors.scheduler.core import SchedulerCore
from ..actors.supervisor.core import SupervisorConfig, SupervisorCore
from ..messages.base import Message
from ..messages.ids import Epoch
from ..messages.kv import ResetPrefixCache
from ..messages.step import PlanDue
from ..messages.system import Drain, StartExecutor
from .config import EngineConfig
from .engine_setup import allocator_config, executor_config, journal_file, load, scheduler_config, tokenizer_folder_of
from .frontend import FrontEnd
from .graph import ActorHandle, ModelFacts, Tap
from .processes.edge import EdgeActors
from .stats import EngineStats

if TYPE_CHECKING:
    from ..actors.executor.actor import ExecutorThread
    from ..actors.tokenizer.hf_tokenizer import HFTokenizer

log = structlog.get_logger("octavo.engine")

STALL_NS = 60_000_000_000
"""A step that runs longer than this makes the engine not ready."""

TICK_S = 0.25
"""How often deadlines are looked at while nothing else happens."""


class LocalGraph:
    """Every actor on the running loop. Made by `LocalGraph.start`.

    Args:
        config: of the engine.
        executor: with its model loaded.
        facts: of that model.
        tokenizer: of that model.
        tap: watches what scheduler and allocator hear and say.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: ExecutorThread,
        facts: ModelFacts,
        tokenizer: HFTokenizer,
        tap: Tap | None,
    ) -> None:
        self.facts = facts
        self.executor = executor
        self._clock = MonotonicClock()
        self._broken_because = ""
        self._answered = asyncio.Event()
        self._journal: Journal | None = None
        self._ticker: asyncio.TimerHandle | None = None
        allocators = allocator_config(config, facts)
        schedulers = scheduler_config(config, facts)
        self.scheduler = SchedulerCore(schedulers)
        self.allocator = KVAllocatorCore(allocators)
        # Room to find the one of `max_num_seqs` requests that kills its executor: half as many run after each loss.
        self._supervisor = SupervisorCore(SupervisorConfig(max_restarts=8 + 2 * config.max_num_seqs.bit_length()))
        if (path := journal_file(config.journal)) is not None:
            header = JournalHeader(
                octavo=__version__,
                model=facts.name,
                started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                start_ns=self._clock.now_ns(),
                has_tokens=config.journal_prompts,
                scheduler=schedulers,
                allocator=allocators,
            )
            self._journal = Journal(path, header)
        self._runtime = InProcessRuntime(ROUTES, self._clock, self._on_actor_failure)
        self._edge = EdgeActors(config, facts, tokenizer, self._runtime)
        capacity = self._edge.capacity
        self._scheduler_mailbox = self._runtime.add_actor(
            "scheduler", self._watch("wrap_scheduler", self.scheduler.handle, tap), capacity, after_batch=PlanDue()
        )
        self._runtime.add_actor("kv_allocator", self._watch("wrap_allocator", self.allocator.handle, tap), capacity)
        self._runtime.add_actor("supervisor", self._handle_supervisor, 1024)
        self._runtime.add("executor", executor)
        self._runtime.connect()

    def _watch(self, wrap: str, handle: Callable[[Any, int], Any], tap: Tap | None) -> ActorHandle:
        for watcher in (self._journal, tap):
            if watcher is not None:
                handle = getattr(watcher, wrap)(handle)
        return handle

    @classmethod
    async def start(cls, config: EngineConfig, tap: Tap | None) -> Self:
        """Load the model and start the actors.

        Raises:
            ModelNotFoundError, UnsupportedModelError, KVCacheTooSmallError: what is wrong and what to change.
        """
        from ..actors.executor.actor import ExecutorThread
        from ..actors.executor.locate import locate_model

        journal_file(config.journal)  # fails now, not when the model is loaded
        folder, name = await asyncio.to_thread(
            locate_model,
            config.model,
            revision=config.revision,
            offline=config.offline,
            trust_remote_code=config.trust_remote_code,
        )
        tokenizer_folder = await asyncio.to_thread(tokenizer_folder_of, config, folder)
        runtimes: list[InProcessRuntime] = []
        executor = ExecutorThread(
            executor_config(config, folder), lambda message: runtimes[0].send_from_thread("executor", message)
        )
        tokenizer, device = await asyncio.to_thread(load, folder, tokenizer_folder, config, executor)
        facts = ModelFacts(
            name=name,
            folder=str(folder),
            vocab_size=device.model.vocab_size,
            max_model_len=device.plan.max_model_len,
            num_blocks=device.plan.num_blocks,
            kv_cache_bytes=device.kv_cache_bytes,
            dtype=str(device.model.dtype).removeprefix("torch."),
            load_seconds=device.load_seconds,
            is_deterministic=device.is_deterministic,
        )
        graph = cls(config, executor, facts, tokenizer, tap)
        runtimes.append(graph._runtime)
        executor.start()
        executor.post(StartExecutor(Epoch(0)))
        graph._tick()
        await graph._answered.wait()
        return graph

    # ---- what the engine asks ----

    @property
    def frontend(self) -> FrontEnd:
        return self._edge.frontend

    @property
    def tokenizer(self) -> HFTokenizer:
        return self._edge.tokenizer

    @property
    def num_submitting(self) -> int:
        return self._edge.num_submitting

    @property
    def max_submitting(self) -> int:
        return self._edge.max_submitting

    @property
    def is_broken(self) -> bool:
        return bool(self._broken_because)

    @property
    def why_not_ready(self) -> str:
        if self._broken_because:
            return self._broken_because
        if not self._supervisor.is_executor_ready:
            return "the executor is starting"
        if self.executor.busy_for_ns() > STALL_NS:
            return "a step has been running for too long"
        return ""

    @property
    def service_account(self) -> None:
        return None

    def send(self, message: Drain | ResetPrefixCache) -> None:
        self._runtime.send("frontend", message)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler.stats()
        allocator = self.allocator.stats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_live=self.frontend.num_live,
            kv_cache_usage=allocator.num_held / allocator.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            num_steps=scheduler.num_steps,
            num_dropped_messages=scheduler.num_dropped_messages
            + allocator.num_dropped_messages
            + self._supervisor.num_late_messages,
            actor_restarts={"executor": self._supervisor.num_restarts, **self._edge.restarts},
            num_failed_streams=self._edge.num_failed_streams,
            num_requeued=scheduler.num_requeued,
            num_quarantined=scheduler.num_quarantined,
            num_numerics_losses=scheduler.num_numerics_losses,
            step_sizes=scheduler.step_sizes,
            step_tokens=scheduler.step_tokens,
            num_late_compilations=self.executor.num_late,
            num_completed=scheduler.num_completed,
            num_accepted=scheduler.num_accepted,
            num_failed=scheduler.num_failed,
            num_cancelled=scheduler.num_cancelled,
        )

    def crash_actor(self, actor: str) -> None:
        """See `EdgeActors.crash_actor`."""
        self._edge.crash_actor(actor)

    async def close(self) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        await self._edge.close()
        try:
            await asyncio.to_thread(self.executor.stop)
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            self.executor.stop()
        if self._journal is not None:
            await self._journal.close()
            self._journal = None

    # ---- carrying ----

    def _handle_supervisor(self, message: Message, now_ns: int) -> list[Message]:
        answers = self._supervisor.handle(message, now_ns)
        if self._supervisor.is_executor_ready or self._supervisor.gave_up_because:
            self._answered.set()
        if self._supervisor.gave_up_because:
            self._break(f"the executor failed too often: {self._supervisor.gave_up_because}")
        for answer in answers:
            if isinstance(answer, StartExecutor):
                with suppress(Exception):  # a log that cannot be written must not lose the restart
                    log.error("executor.restarted", epoch=answer.epoch, why=getattr(message, "why", ""))
        return answers

    def _on_actor_failure(self, address: Address, error: Exception) -> None:
        self._break(f"the {address} failed: {type(error).__name__}")
        with suppress(Exception):
            log.error("actor.failed", actor=address, exc_info=error)

    def _break(self, why: str) -> None:
        self._broken_because = self._broken_because or why
        self._answered.set()
        self.frontend.close(why)
        self.frontend.end_all("executor_lost", why)

    def _tick(self) -> None:
        if self.frontend.has_deadlines:
            self._scheduler_mailbox.wake()
        if self._journal is not None:
            self._journal.flush_if_due(self._clock.now_ns())
        self._ticker = self._runtime.loop.call_later(TICK_S, self._tick)
