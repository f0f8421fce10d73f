"""`Engine`: the whole graph of actors inside your own asyncio program."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from ..actors.runtime.clock import MonotonicClock
from ..messages.errors import EngineClosedError, InvalidConfigError, InvalidRequestError, QueueFullError
from ..messages.ids import RequestId
from ..messages.kv import ResetPrefixCache
from ..messages.request import ChatPrompt, PromptReady, TextDelta
from ..messages.sampling import SamplingParams
from ..messages.system import Drain
from .api.settings import ServerSettings
from .config import EngineConfig, NodesConfig, make_config
from .engine_setup import check_options, scheduler_config
from .frontend import Sink
from .generation_config import RequestDefaults, named_generation_config, request_defaults
from .graph import Graph, Tap
from .local_graph import LocalGraph
from .outputs import Collector, CompletionOutput, RequestOutput, StreamDelta, raise_if_failed
from .params import validate_params
from .processes.edge import MAX_N
from .stats import EngineStats

if TYPE_CHECKING:
    from .api.service_account import ServiceAccount

__all__ = ["CompletionOutput", "Engine", "EngineStats", "RequestOutput", "StreamDelta", "Tap"]

_FOR_EVER_S = 1e9
"""Some thirty years; deadlines far beyond have no room in a message."""


class Engine:
    """An inference engine that lives in the running event loop.

    Use it as `async with Engine("model") as engine`. On exit every request is ended, the executor's thread is joined
    and its memory is given back.

    Args:
        model: folder, GGUF file or hub name; None is the small model that ships with octavo.
        config: everything at once; or give its fields as keyword arguments.
        tap: watches what scheduler and allocator hear and say (`octavo sim calibrate` times steps with one).
        log_format: of the processes that it starts, as `configure_logs` takes it.
        num_edges: processes that serve HTTP, this one among them; the others are started by `serve_beside`.
        nodes: other hosts that run executors.

    Attributes:
        request_defaults: what a request takes that names no parameters, once the engine is started.
        is_deterministic: a request's logits are the same bits alone and in any batch, once the engine is started.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        tap: Tap | None = None,
        log_format: str = "auto",
        num_edges: int = 1,
        nodes: NodesConfig | None = None,
        **fields: Any,
    ) -> None:
        if config is None:
            config = make_config({"model": model, **fields})
        elif model is not None or fields:
            raise TypeError("give either `config`, or a model and fields of EngineConfig")
        self.config = config
        self.request_defaults = RequestDefaults()
        self._named_generation_config = named_generation_config(config.generation_config)
        self.created = int(time.time())
        self.model_name = ""
        self.max_model_len = 0
        self.num_blocks = 0
        self.vocab_size = 0
        self.dtype = ""
        self.model_folder = ""
        self.load_seconds = 0.0
        self.is_deterministic = False
        self.kv_cache_bytes = 0
        self._clock = MonotonicClock()
        self._is_open = False
        self._is_starting = False
        self._tap = tap
        self._log_format = log_format
        self._num_edges = num_edges
        self._nodes = nodes
        self._graph: Graph

    # ---- life ----

    async def __aenter__(self) -> Self:
        if not self._is_open:
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
        graph: Graph
        if self.config.in_process:
            if self._nodes is not None:
                raise InvalidConfigError(
                    "executors on other hosts are other processes: leave in_process out", field="in_process"
                )
            graph = await LocalGraph.start(self.config, self._tap)
        elif self._tap is not None:
            raise InvalidConfigError(
                "only an engine in one process can be tapped: leave in_process on", field="in_process"
            )
        else:
            from .processes.process_graph import ProcessGraph

            graph = await ProcessGraph.start(
                self.config, num_edges=self._num_edges, log_format=self._log_format, nodes=self._nodes
            )
        self._open(graph)

    @classmethod
    def around(cls, config: EngineConfig, graph: Graph) -> Self:
        """An engine whose graph runs already; `start` has nothing to do."""
        engine = cls(config=config)
        engine._open(graph)
        return engine

    def _open(self, graph: Graph) -> None:
        facts = graph.facts
        self.model_name = facts.name
        self.model_folder = facts.folder
        self.max_model_len = facts.max_model_len
        self.num_blocks = facts.num_blocks
        self.vocab_size = facts.vocab_size
        self.dtype = facts.dtype
        self.load_seconds = facts.load_seconds
        self.is_deterministic = facts.is_deterministic
        self.kv_cache_bytes = facts.kv_cache_bytes
        self.scheduler_config = scheduler_config(self.config, facts)
        self.request_defaults = request_defaults(
            self.config.generation_config,
            self._named_generation_config,
            self.config.override_generation_config,
            Path(facts.folder),
        )
        self._graph = graph
        self._is_open = True

    async def drain(self) -> None:
        """Refuse new requests and wait for those that were accepted."""
        if not self._is_open:
            return
        self._graph.frontend.close("it is shutting down")
        self._graph.send(Drain())
        await self._graph.frontend.wait_idle()

    async def close(self) -> None:
        """End what is live, stop the actors, give the memory back. Safe to call twice."""
        if not self._is_open:
            return
        self._is_open = False
        self._graph.frontend.close("it is closed")
        self._graph.frontend.end_all("engine_closed", "the engine was closed while the request ran")
        await self._graph.close()

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
        graph = self._graph
        if graph.num_submitting >= graph.max_submitting:
            raise QueueFullError(f"{graph.num_submitting} prompts wait for the tokenizer: try again later")
        now_ns = self._clock.now_ns()
        return graph.frontend.submit(
            prompt,
            params,
            sink,
            now_ns=now_ns,
            priority=priority,
            cache_salt=cache_salt,
            add_special_tokens=add_special_tokens,
            truncate_prompt_tokens=truncate_prompt_tokens,
            deadline_ns=0 if timeout_s is None or timeout_s >= _FOR_EVER_S else now_ns + int(timeout_s * 1e9),
        )

    def cancel(self, request_id: RequestId) -> None:
        """Stop a sequence; its blocks are free within a step. Unknown ids are ignored."""
        if self._is_open:
            self._graph.frontend.cancel(request_id)

    async def stream(
        self, prompt: str | Sequence[int] | ChatPrompt, params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[StreamDelta]:
        """Yield what the request gains, as it gains it. Leaving the loop, or cancelling the task, cancels the request.

        Args:
            prompt: text, token ids, or a conversation (`Engine.chat_prompt`).
            params: how to sample; None is `default_sampling_params()`.
            options: `priority`, `cache_salt`, `add_special_tokens`, `truncate_prompt_tokens`, `timeout_s`.

        Raises:
            OctavoError: the request was refused or failed.
        """
        arrived: asyncio.Queue[PromptReady | TextDelta] = asyncio.Queue()
        request_ids = self.submit(prompt, params or self.default_sampling_params(), arrived.put_nowait, **options)
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
        params = params or self.default_sampling_params()
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
        """Token ids of a text or of a rendered conversation, which says itself whether to add special tokens."""
        self._check_open()
        return await asyncio.to_thread(self._tokenize, prompt, add_special_tokens)

    def _tokenize(self, prompt: str | ChatPrompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            text = self._graph.tokenizer.render_chat(prompt)
            return self._graph.tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens)
        return self._graph.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids.

        Raises:
            InvalidRequestError: an id outside the vocabulary.
        """
        self._check_open()
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.vocab_size)
            raise InvalidRequestError(
                f"token id {wrong} is outside the vocabulary of {self.vocab_size}", param="tokens"
            )
        return await asyncio.to_thread(
            self._graph.tokenizer.decode, list(token_ids), skip_special_tokens=skip_special_tokens
        )

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself."""
        return self._graph.tokenizer.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, which need not be whole characters."""
        return self._graph.tokenizer.token_bytes(token_id)

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` leaves out of the text."""
        return self._graph.tokenizer.special_token_ids

    # ---- state ----

    def default_sampling_params(self) -> SamplingParams:
        """What the checkpoint recommends (see `EngineConfig.generation_config`), in place of `SamplingParams()`."""
        return self.request_defaults.for_programs()

    @property
    def is_ready(self) -> bool:
        """Whether a request sent now would be answered."""
        return not self.why_not_ready

    @property
    def why_not_ready(self) -> str:
        """Empty if ready."""
        if not self._is_open:
            return "not running"
        return self._graph.why_not_ready

    @property
    def is_broken(self) -> bool:
        """Whether it will never be ready again: its processes failed too often, or one of its actors did."""
        return self._is_open and self._graph.is_broken

    def stats(self) -> EngineStats:
        """Gauges and totals; reading them changes nothing. Those of the last run, once the engine is closed.

        Raises:
            EngineClosedError: it has never been started.
        """
        if not hasattr(self, "_graph"):
            self._check_open()
        return self._graph.stats()

    @property
    def service_account(self) -> ServiceAccount | None:
        """What the processes that serve HTTP know of each other's counts; None if there is but one."""
        return self._graph.service_account if self._is_open else None

    def reset_prefix_cache(self) -> None:
        """Forget cached blocks that no request holds."""
        self._check_open()
        self._graph.send(ResetPrefixCache())

    async def serve_beside(
        self, settings: ServerSettings, host: str, port: int, stop: asyncio.Event, abort: asyncio.Event
    ) -> None:
        """Run the other `num_edges - 1` processes that serve HTTP on the same port.

        Args:
            stop: set it to let their open responses end, then them.
            abort: set it, too, to have the responses cut off.

        Raises:
            ProcessStartError: no process can be started.
        """
        from .processes.process_graph import ProcessGraph

        self._check_open()
        graph = self._graph
        if isinstance(graph, ProcessGraph) and graph.others is not None:
            await graph.others.start(self.config, settings, graph.facts, host, port)
            await stop.wait()
            timeout_s = settings.shutdown_timeout_s
            draining = asyncio.create_task(graph.others.close(3600.0 if timeout_s is None else timeout_s + 2.0))
            aborting = asyncio.create_task(abort.wait())
            await asyncio.wait([draining, aborting], return_when=asyncio.FIRST_COMPLETED)
            aborting.cancel()
            if not draining.done():
                graph.others.cut()
            await draining

    def crash_actor(self, actor: str) -> None:
        """Have an actor fail at its next message, for tests of recovery.

        Raises:
            InvalidRequestError: it cannot be made to fail.
        """
        self._check_open()
        self._graph.crash_actor(actor)

    def _check_open(self) -> None:
        if not self._is_open:
            raise EngineClosedError("the engine is not running: use it inside `async with`")
