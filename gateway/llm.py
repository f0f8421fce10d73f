"""`LLM`: the engine for programs without an event loop; batches in, results out."""

from __future__ import annotations

import asyncio
import atexit
import operator
import threading
import weakref
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from ..messages.errors import EngineClosedError, QueueFullError
from ..messages.request import ChatPrompt
from ..messages.sampling import SamplingParams
from .config import EngineConfig
from .engine import Engine
from .outputs import RequestOutput

T = TypeVar("T")

Prompt = str | Sequence[int] | ChatPrompt


class LLM:
    """A model that generates for lists of prompts. Its engine runs on an event loop in a thread of its own.

    Use it as a context manager, or call `close`; the interpreter's exit closes it too.

    Args:
        model: folder or hub name; None is the small model that ships with octavo.
        config: everything at once; or give its fields as keyword arguments (see `EngineConfig`).
    """

    def __init__(self, model: str | None = None, *, config: EngineConfig | None = None, **fields: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="octavo-llm", daemon=True)
        self._thread.start()
        self._engine: Engine | None = None
        self._lock = threading.Lock()  # `close` may be called from several threads
        try:
            engine = Engine(model, config=config, **fields)
            self._run(engine.start())
        except BaseException:
            self._stop_loop()
            raise
        self._engine = engine
        # A thread that computes while the interpreter goes away would crash it.
        self._at_exit = _CloseAtExit(self)
        atexit.register(self._at_exit)

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; results come in the order of the prompts.

        Args:
            prompts: one prompt or many: text, token ids, or conversations.
            params: for all of them, or one for each; None is `get_default_sampling_params()`.
            use_tqdm: show a progress bar.

        Raises:
            OctavoError: a request was refused or failed; those that were running are cancelled.
            TypeError: these are no prompts, or no parameters.
        """
        engine = self._running
        many = _as_list(prompts)
        each = (
            list(params) if isinstance(params, Sequence) else [params or self.get_default_sampling_params()] * len(many)
        )
        if len(each) != len(many):
            raise ValueError(f"{len(many)} prompts but {len(each)} sampling parameters: give one, or as many")
        for one in each:
            if not isinstance(one, SamplingParams):
                raise TypeError(f"params are SamplingParams(...) or a list of them; got {type(one).__name__}")
        return self._run(self._generate_all(engine, many, each, use_tqdm)) if many else []

    def chat(
        self,
        conversations: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or many: lists of `{"role": ..., "content": ...}`.

        Without `params` the checkpoint's defaults hold, and an answer may fill the context.
        """
        many = [conversations] if conversations and isinstance(conversations[0], dict) else conversations
        prompts: list[Prompt] = [Engine.chat_prompt(messages) for messages in many]  # type: ignore[arg-type]  # narrowed above
        return self.generate(prompts, params or self._running.request_defaults.params, use_tqdm=use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint recommends (see `EngineConfig.generation_config`), in place of `SamplingParams()`."""
        return self._running.default_sampling_params()

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise EngineClosedError("this LLM is closed: make another one")
        return self._engine

    def close(self) -> None:
        """Stop the engine and its threads. Safe to call twice."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            atexit.unregister(self._at_exit)
            self._run(engine.close())
            self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate_all(
        self, engine: Engine, prompts: list[Prompt], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        from tqdm import tqdm

        # No more at once than the engine queues: the rest waits here instead of being refused.
        admission = _Admission(max(1, engine.config.max_num_queued_requests // max(1, *(one.n for one in params))))
        with tqdm(total=len(prompts), desc="prompts", unit="prompt", disable=not use_tqdm) as bar:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(_generate_one(engine, prompt, one, admission, bar))
                    for prompt, one in zip(prompts, params, strict=True)
                ]
        return [task.result() for task in tasks]

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # one prompt's error, not the group that carried it
        except BaseException:
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _CloseAtExit:
    """Closes an `LLM` at the interpreter's exit, without keeping it alive until then."""

    def __init__(self, llm: LLM) -> None:
        self._llm = weakref.ref(llm)

    def __call__(self) -> None:
        if (llm := self._llm()) is not None:
            llm.close()


class _Admission:
    """How many prompts may be with the engine, and a wait for those it has no room for."""

    def __init__(self, max_running: int) -> None:
        self.seats = asyncio.Semaphore(max_running)
        self.num_running = 0
        self._next_end = asyncio.Event()

    async def wait_for_an_end(self) -> None:
        await self._next_end.wait()

    def tell_of_an_end(self) -> None:
        self._next_end.set()
        self._next_end = asyncio.Event()


async def _generate_one(
    engine: Engine, prompt: Prompt, params: SamplingParams, admission: _Admission, bar: Any
) -> RequestOutput:
    async with admission.seats:
        while True:
            admission.num_running += 1
            try:
                output = await engine.generate(prompt, params)
                break
            except QueueFullError:
                if admission.num_running == 1:  # nothing of ours ends and makes room
                    raise
            finally:
                admission.num_running -= 1
            if admission.num_running:
                await admission.wait_for_an_end()
    admission.tell_of_an_end()
    bar.update(1)
    return output


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """One prompt or several as a list.

    Raises:
        TypeError: neither.
    """
    if isinstance(prompts, str | bytes | ChatPrompt):
        return [prompts]
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise TypeError(
            "prompts are a text, token ids or a conversation (`Engine.chat_prompt`), or a list of these; "
            f"got {type(prompts).__name__}"
        )
    many: list[Any] = list(prompts)
    return [many] if many and _is_token_id(many[0]) else many


def _is_token_id(value: object) -> bool:
    # numpy's and torch's integers are some, their arrays of one integer are not.
    try:
        operator.index(value)  # type: ignore[arg-type]  # whether it can be is the question
    except TypeError:
        return False
    return not getattr(value, "shape", ())
