"""`Engine`: the whole graph of actors inside your own asyncio program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec
import structlog

from .. import __version__
from ..actors.detokenizer.core import DetokenizerCore
from ..actors.journal.actor import Journal, check_journal_path
from ..actors.journal.config import JournalHeader
from ..actors.kv_allocator.core import AllocatorConfig, KVAllocatorCore
from ..actors.runtime.clock import MonotonicClock
from ..actors.runtime.in_process import InProcessRuntime, Mailbox
from ..actors.runtime.routes import ROUTES, Address
from ..actors.scheduler.core import SchedulerCore
from ..actors.supervisor.core import SupervisorConfig, SupervisorCore
from ..actors.tokenizer.actor import TokenizerActor
from ..actors.tokenizer.core import TokenizerConfig, TokenizerCore
from ..messages.base import Message
from ..messages.errors import EngineClosedError, InvalidRequestError, QueueFullError
from ..messages.ids import Epoch, RequestId
from ..messages.kv import ResetPrefixCache
from ..messages.request import ChatPrompt, PromptReady, TextDelta
from ..messages.sampling import SamplingParams
from ..messages.step import PlanDue
from ..messages.system import Drain, StartExecutor
from .config import EngineConfig, make_config
from .engine_setup import check_options, executor_config, load, scheduler_config
from .frontend import FrontEnd, Sink
from .outputs import Collector, CompletionOutput, RequestOutput, StreamDelta, raise_if_failed
from .params import validate_params
from .stats import EngineStats

if TYPE_CHECKING:
    from ..actors.executor.actor import ExecutorThread
    from ..actors.tokenizer.hf_tokenizer import HFTokenizer

__all__ = ["CompletionOutput", "Engine", "EngineStats", "RequestOutput", "StreamDelta"]

log = structlog.get_logger("octavo.engine")

STALL_NS = 60_000_000_000
"""A step that runs longer than this makes the engine not ready."""

MAX_N = 16
"""Most sequences of one prompt."""

TICK_S = 0.25
"""How often deadlines are looked at while nothing else happens."""


class Tap(Protocol):
    """Watches the two cores that decide, by wrapping their `handle`."""

    def wrap_scheduler(self, handle: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]: ...

    def wrap_allocator(self, handle: Callable[[Any, int], Any]) -> Callable[[Any, int], Any]: ...


class Engine:
    """An inference engine that lives in the running event loop.

    Use it as `async with Engine("model") as engine`. On exit every request is ended, the executor's thread is joined
    and its memory is given back.

    Args:
        model: folder, GGUF file or hub name; None is the small model that ships with octavo.
        config: everything at once; or give its fields as keyword arguments.
        tap: watches what scheduler and allocator hear and say (`octavo sim calibrate` times steps with one).
    """

    def __init__(
        self, model: str | None = None, *, config: EngineConfig | None = None, tap: Tap | None = None, **fields: Any
    ) -> None:
        if config is None:
            config = make_config({"model": model, **fields})
        elif model is not None or fields:
            raise TypeError("give either `config`, or a model and fields of EngineConfig")
        self.config = config
        self.created = int(time.time())
        self.model_name = ""
        self.max_model_len = 0
        self.num_blocks = 0
        self.vocab_size = 0
        self.dtype = ""
        self.model_folder = ""
        self.load_seconds = 0.0
        self.kv_cache_bytes = 0
        self._clock = MonotonicClock()
        self._is_open = False
        self._is_starting = False
        self._broken_because = ""
        self._ticker: asyncio.TimerHandle | None = None
        self._journal: Journal | None = None
        self._tap = tap

    # ---- life ----

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Load the model and start the actors.

        Raises:
            ModelNotFoundError, UnsupportedModelError, KVCacheTooSmallError: what is wrong and what to change.
            RuntimeError: it is running already.
        """
        if self._is_open or self._is_starting:
            raise RuntimeError("the engine is running already: close it first, or make another one")
        self._is_starting = True
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise
        finally:
            self._is_starting = False

    async def _start(self) -> None:
        from ..actors.executor.actor import ExecutorThread, locate_model

        config = self.config
        if config.journal is not None:
            check_journal_path(config.journal)  # now, not when the model is loaded
        folder, self.model_name = await asyncio.to_thread(
            locate_model,
            config.model,
            revision=config.revision,
            offline=config.offline,
            trust_remote_code=config.trust_remote_code,
        )
        executor = ExecutorThread(executor_config(config, folder), self._send_from_executor)
        tokenizer_folder = folder
        if config.tokenizer is not None:
            tokenizer_folder, _ = await asyncio.to_thread(
                locate_model, config.tokenizer, revision=config.revision, offline=config.offline, weights=False
            )
        tokenizer, device = await asyncio.to_thread(load, tokenizer_folder, config, executor)
        self.dtype = str(device.model.dtype).removeprefix("torch.")
        self.model_folder = str(folder)
        self.load_seconds = device.load_seconds
        self.kv_cache_bytes = device.kv_cache_bytes
        self.max_model_len = device.plan.max_model_len
        self.num_blocks = device.plan.num_blocks
        self.vocab_size = device.model.vocab_size
        self._build_graph(executor, tokenizer)
        await self._executor_answered.wait()

    def _build_graph(self, executor: ExecutorThread, tokenizer: HFTokenizer) -> None:
        config = self.config
        self._broken_because = ""
        self._executor_answered = asyncio.Event()
        self._tokenizer = tokenizer
        self._executor = executor
        self.scheduler_config = scheduler_config(config, self.num_blocks, self.max_model_len)
        allocator_config = AllocatorConfig(
            num_blocks=self.num_blocks,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self._scheduler = SchedulerCore(self.scheduler_config)
        self._allocator = KVAllocatorCore(allocator_config)
        handle_scheduler: Callable[[Any, int], Any] = self._scheduler.handle
        handle_allocator: Callable[[Any, int], Any] = self._allocator.handle
        if config.journal is not None:
            header = JournalHeader(
                octavo=__version__,
                model=self.model_name,
                started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                start_ns=self._clock.now_ns(),
                has_tokens=config.journal_prompts,
                scheduler=self.scheduler_config,
                allocator=allocator_config,
            )
            self._journal = Journal(config.journal, header)
            handle_scheduler = self._journal.wrap_scheduler(handle_scheduler)
            handle_allocator = self._journal.wrap_allocator(handle_allocator)
        if self._tap is not None:
            handle_scheduler = self._tap.wrap_scheduler(handle_scheduler)
            handle_allocator = self._tap.wrap_allocator(handle_allocator)
        # Room to find the one of `max_num_seqs` requests that kills its executor: half as many run after each loss.
        self._supervisor = SupervisorCore(SupervisorConfig(max_restarts=8 + 2 * config.max_num_seqs.bit_length()))
        detokenizer = DetokenizerCore(tokenizer)
        tokenizer_core = TokenizerCore(
            TokenizerConfig(
                vocab_size=self.vocab_size, max_model_len=self.max_model_len, max_logprobs=config.max_logprobs
            ),
            tokenizer,
        )
        self._runtime = InProcessRuntime(ROUTES, self._clock, self._on_actor_failure)
        max_live = config.max_num_seqs + config.max_num_queued_requests
        self._frontend = FrontEnd(self._send_from_frontend, max_live=max_live, seed=config.seed)
        self._tokenizer_actor = TokenizerActor(tokenizer_core, self._runtime)
        # `submit` refuses while `_max_submitting` messages wait for the tokenizer. Each of them stands for at most
        # MAX_N sequences, and a sequence for a submission, a cancel and, while it is live, a few messages more.
        self._max_submitting = max_live + MAX_N
        capacity = 4 * MAX_N * self._max_submitting
        self._scheduler_mailbox = self._add("scheduler", handle_scheduler, capacity=capacity, after_batch=PlanDue())
        self._add("frontend", self._frontend.handle, capacity=capacity)
        self._tokenizer_mailbox = self._add("tokenizer", self._tokenizer_actor.handle, capacity=capacity)
        self._add("kv_allocator", handle_allocator, capacity=capacity)
        self._add("detokenizer", detokenizer.handle, capacity=capacity)
        self._add("supervisor", self._handle_supervisor, capacity=1024)
        self._runtime.add("executor", executor)
        self._runtime.connect()
        executor.start()
        executor.post(StartExecutor(Epoch(0)))
        self._is_open = True
        self._tick()

    def _add(
        self,
        address: Address,
        handler: Callable[[Any, int], Any],
        *,
        capacity: int,
        after_batch: Message | None = None,
    ) -> Mailbox:
        mailbox = Mailbox(address, handler, self._runtime, capacity=capacity, after_batch=after_batch)
        self._runtime.add(address, mailbox)
        return mailbox

    async def drain(self) -> None:
        """Refuse new requests and wait for those that were accepted."""
        if not self._is_open:
            return
        self._frontend.close("it is shutting down")
        self._runtime.send("frontend", Drain())
        await self._frontend.wait_idle()

    async def close(self) -> None:
        """End what is live, stop the actors, give the memory back. Safe to call twice."""
        if not self._is_open:
            return
        self._is_open = False
        if self._ticker is not None:
            self._ticker.cancel()
        self._frontend.close("it is closed")
        self._frontend.end_all("engine_closed", "the engine was closed while the request ran")
        await self._tokenizer_actor.close()
        try:
            await asyncio.to_thread(self._executor.stop)
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            self._executor.stop()
        if self._journal is not None:
            await self._journal.close()
            self._journal = None

    # ---- requests ----

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
        """Start `params.n` sequences; `sink` is called on the loop with `PromptReady` once, then with each delta.

        Raises:
            InvalidRequestError: a parameter is out of range.
            EngineClosedError, QueueFullError: not now.
        """
        self._check_open()
        params = validate_params(params, vocab_size=self.vocab_size, max_logprobs=self.config.max_logprobs, max_n=MAX_N)
        check_options(priority, cache_salt, truncate_prompt_tokens, timeout_s)
        if len(self._tokenizer_mailbox) >= self._max_submitting:
            raise QueueFullError(f"{len(self._tokenizer_mailbox)} prompts wait for the tokenizer: try again later")
        now_ns = self._clock.now_ns()
        return self._frontend.submit(
            prompt,
            params,
            sink,
            now_ns=now_ns,
            priority=priority,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=truncate_prompt_tokens,
            deadline_ns=0 if timeout_s is None else now_ns + int(timeout_s * 1e9),
        )

    def cancel(self, request_id: RequestId) -> None:
        """Stop a sequence; its blocks are free within a step. Unknown ids are ignored."""
        if self._is_open:
            self._frontend.cancel(request_id)

    async def stream(
        self, prompt: str | Sequence[int] | ChatPrompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[StreamDelta]:
        """Yield what the request gains, as it gains it. Leaving the loop, or cancelling the task, cancels the request.

        Args:
            prompt: text, token ids, or a conversation (`Engine.chat_prompt`).
            params: how to sample; None is `SamplingParams()`.
            options: `priority`, `cache_salt`, `add_special_tokens`, `truncate_prompt_tokens`, `timeout_s`.

        Raises:
            OctavoError: the request was refused or failed.
        """
        arrived: asyncio.Queue[PromptReady | TextDelta] = asyncio.Queue()
        request_ids = self.submit(prompt, params or SamplingParams(), arrived.put_nowait, **options)
        index_of = {request_id: index for index, request_id in enumerate(request_ids)}
        num_live = len(request_ids)
        try:
            while num_live:
                event = await arrived.get()
                if isinstance(event, PromptReady):
                    continue
                raise_if_failed(event)
                num_live -= event.finish_reason is not None
                yield StreamDelta(
                    index=index_of[event.request_id],
                    text=event.text,
                    token_ids=event.token_ids,
                    logprobs=event.logprobs,
                    finish_reason=event.finish_reason,
                    stop_reason=event.stop_reason,
                )
        finally:
            for request_id in request_ids:
                self.cancel(request_id)

    async def generate(
        self, prompt: str | Sequence[int] | ChatPrompt, params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """Wait for the whole output; arguments and errors as `stream`."""
        params = params or SamplingParams()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        collector = Collector(prompt if isinstance(prompt, str) else None, params, done)
        request_ids = self.submit(prompt, params, collector.take, **options)
        collector.output.request_ids = request_ids
        collector.index_of.update((request_id, index) for index, request_id in enumerate(request_ids))
        try:
            await done
        finally:
            for request_id in request_ids:
                self.cancel(request_id)
        return collector.output

    @staticmethod
    def chat_prompt(messages: Sequence[dict[str, Any]], **template_kwargs: Any) -> ChatPrompt:
        """A conversation as a prompt: `[{"role": "user", "content": "Hello"}]`."""
        return ChatPrompt(
            messages_json=msgspec.json.encode(list(messages)), template_kwargs_json=msgspec.json.encode(template_kwargs)
        )

    # ---- text ----

    async def tokenize(self, prompt: str | ChatPrompt, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text or of a rendered conversation."""
        self._check_open()
        return await asyncio.to_thread(self._tokenize, prompt, add_special_tokens)

    def _tokenize(self, prompt: str | ChatPrompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            return self._tokenizer.encode(self._tokenizer.render_chat(prompt), add_special_tokens=False)
        return self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids.

        Raises:
            InvalidRequestError: an id outside the vocabulary.
        """
        self._check_open()
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary of {self.vocab_size}", param="tokens"
                )
        return await asyncio.to_thread(self._tokenizer.decode, list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself."""
        return self._tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, which need not be whole characters."""
        return self._tokenizer.token_bytes(token_id)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out of the text."""
        return self._tokenizer.special_token_ids

    # ---- state ----

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered."""
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> str:
        """Empty if ready."""
        if not self._is_open:
            return "not running"
        if self._broken_because:
            return self._broken_because
        if not self._supervisor.is_executor_ready:
            return "the executor is starting"
        if self._executor.busy_for_ns() > STALL_NS:
            return "a step has been running for too long"
        return ""

    def stats(self) -> EngineStats:
        """Gauges and totals; reading them changes nothing. Those of the last run, once the engine is closed.

        Raises:
            EngineClosedError: it has never been started.
        """
        if not hasattr(self, "_scheduler"):
            self._check_open()
        scheduler = self._scheduler.stats()
        allocator = self._allocator.stats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_live=self._frontend.num_live,
            kv_cache_usage=allocator.num_held / allocator.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=scheduler.generation_tokens,
            num_steps=scheduler.num_steps,
            num_dropped_messages=scheduler.num_dropped_messages,
            num_executor_restarts=self._supervisor.num_restarts,
        )

    def reset_prefix_cache(self) -> None:
        """Forget cached blocks that no request holds."""
        self._check_open()
        self._runtime.send("frontend", ResetPrefixCache())

    def _check_open(self) -> None:
        if not self._is_open:
            raise EngineClosedError("the engine is not running: use it inside `async with`")

    # ---- carrying ----

    def _send_from_frontend(self, message: Message) -> None:
        self._runtime.send("frontend", message)

    def _send_from_executor(self, message: Message) -> None:
        self._runtime.send_from_thread("executor", message)

    def _handle_supervisor(self, message: Message, now_ns: int) -> list[Message]:
        answers = self._supervisor.handle(message, now_ns)
        if self._supervisor.is_executor_ready or self._supervisor.gave_up_because:
            self._executor_answered.set()
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
        self._executor_answered.set()
        self._frontend.close(why)
        self._frontend.end_all("executor_lost", why)

    def _tick(self) -> None:
        if self._frontend.has_deadlines:
            self._scheduler_mailbox.wake()
        if self._journal is not None:
            self._journal.flush_if_due(self._clock.now_ns())
        self._ticker = self._runtime.loop.call_later(TICK_S, self._tick)
