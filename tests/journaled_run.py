"""A live engine without a model: real mailboxes, loop and clock, an executor thread that samples at once, a journal."""

from __future__ import annotations

import asyncio
import queue
import random
import threading
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.actors.journal.actor import Journal
from octavo.actors.journal.checksum import decisions_of
from octavo.actors.journal.config import JournalHeader
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.runtime.clock import MonotonicClock
from octavo.actors.runtime.in_process import InProcessRuntime, Mailbox
from octavo.actors.runtime.routes import ROUTES
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.actors.supervisor.core import SupervisorConfig, SupervisorCore
from octavo.messages.base import Message
from octavo.messages.ids import RequestId
from octavo.messages.kv import ResetPrefixCache
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, PlanDue, StepExecuted
from octavo.messages.system import ExecutorFailed, ExecutorReady, StartExecutor

STOP_TOKEN = 1


class FastExecutor:
    """Samples on a thread of its own; a token is a function of the request's tokens, so answers can be cached.

    Args:
        runtime: hears the results.
        fails_at: steps, counted over all epochs, at which it is lost.
    """

    def __init__(self, runtime: InProcessRuntime, fails_at: set[int], vocab: int) -> None:
        self._runtime = runtime
        self._fails_at = fails_at
        self._vocab = vocab
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.tokens: dict[RequestId, list[int]] = {}
        self.num_steps = 0

    def start(self) -> None:
        self._thread.start()

    def post(self, message: Message) -> None:
        self._inbox.put(message)

    def stop(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        rows: dict[RequestId, tuple[list[int], int, frozenset[int]]] = {}
        epoch, has_failed = 0, False
        while (message := self._inbox.get()) is not None:
            if isinstance(message, StartExecutor):
                epoch, has_failed, rows = message.epoch, False, {}
                self._runtime.send_from_thread("executor", ExecutorReady(message.epoch))
                continue
            assert isinstance(message, ExecuteStep)
            if has_failed or message.epoch != epoch:
                continue
            self.num_steps += 1
            if self.num_steps in self._fails_at:
                has_failed = True
                self._runtime.send_from_thread("executor", ExecutorFailed(message.epoch, "planned"))
                continue
            self._runtime.send_from_thread("executor", self._execute(message, rows))

    def _execute(self, step: ExecuteStep, rows: dict) -> StepExecuted:
        for request_id in step.drop:
            rows.pop(request_id, None)
        for start in step.start:
            tokens = array("i", start.token_ids).tolist()
            rows[start.request_id] = [tokens, start.num_computed_tokens, frozenset(start.eos_token_ids)]
        sampled, token_ids, stopped = [], [], []
        for request_id, num_tokens in zip(step.request_ids, step.num_tokens, strict=True):
            row = rows[request_id]
            row[1] += num_tokens
            tokens = row[0]
            if row[1] < len(tokens):
                continue
            token = (tokens[-1] * 31 + len(tokens) * 17 + tokens[0]) % self._vocab
            tokens.append(token)
            sampled.append(request_id)
            token_ids.append(token)
            if token in row[2]:
                stopped.append(request_id)
            self.tokens[request_id] = tokens
        return StepExecuted(
            step.epoch, step.step_id, tuple(sampled), tuple(token_ids), tuple(stopped), execute_ns=len(sampled) + 1
        )


@dataclass
class LiveRun:
    """What a live run did."""

    scheduler: SchedulerCore
    allocator: KVAllocatorCore
    ended: dict[RequestId, RequestEnded] = field(default_factory=dict)
    prompts: dict[RequestId, list[int]] = field(default_factory=dict)
    said: list[tuple[str, Message]] = field(default_factory=list)  # (core, message), in order
    counts: Counter[str] = field(default_factory=Counter)


CONFIG = SchedulerConfig(
    num_blocks=48,
    block_size=4,
    max_model_len=96,
    max_num_seqs=12,
    max_num_batched_tokens=48,
    max_num_queued_requests=64,
    priority_aging_ns=1_000_000,
)


async def _run(
    path: Path,
    *,
    num_requests: int,
    seed: int,
    config: SchedulerConfig,
    has_tokens: bool,
    num_losses: int,
    break_scheduler: Any,
) -> LiveRun:
    rng = random.Random(seed)
    clock = MonotonicClock()
    allocator_config = AllocatorConfig(num_blocks=config.num_blocks, block_size=config.block_size)
    run = LiveRun(SchedulerCore(config), KVAllocatorCore(allocator_config))
    if break_scheduler is not None:
        break_scheduler(run.scheduler)
    failures: list[Exception] = []
    runtime = InProcessRuntime(ROUTES, clock, lambda _, error: (failures.append(error), an_end.set()))
    header = JournalHeader(
        model="none",
        start_ns=clock.now_ns(),
        has_tokens=has_tokens,
        scheduler=config,
        allocator=allocator_config,
    )
    journal = Journal(str(path), header)

    def tapped(core: str, handle: Any) -> Any:
        def handle_and_note(message: Message, now_ns: int) -> Any:
            answers = handle(message, now_ns)
            run.said.extend((core, answer) for answer in decisions_of(message, answers))
            return answers

        return handle_and_note

    live: dict[RequestId, None] = {}
    an_end = asyncio.Event()

    async def next_end() -> None:
        an_end.clear()
        await an_end.wait()

    def tick() -> None:
        nonlocal ticker
        mailboxes["scheduler"].wake()  # as the engine's ticker does: a deadline may have passed
        ticker = runtime.loop.call_later(0.01, tick)

    def hear_detokenizer(message: Message, now_ns: int) -> tuple[Message, ...]:
        if isinstance(message, RequestEnded):
            assert message.request_id not in run.ended
            run.ended[message.request_id] = message
            live.pop(message.request_id, None)
            an_end.set()
        elif isinstance(message, StepExecuted) and message.request_ids and rng.random() < 0.01:
            run.counts["stopped"] += 1
            return (StopMatched(message.request_ids[0]),)
        return ()

    executor = FastExecutor(runtime, {150 * (i + 1) for i in range(num_losses)}, vocab=50)
    supervisor = SupervisorCore(SupervisorConfig(max_restarts=1000))
    handlers: dict[Any, Any] = {
        "scheduler": tapped("scheduler", run.scheduler.handle),
        "kv_allocator": tapped("kv_allocator", run.allocator.handle),
        "detokenizer": hear_detokenizer,
        "frontend": lambda m, _: (),
        "tokenizer": lambda m, _: (),
        "supervisor": supervisor.handle,
    }
    handlers["scheduler"] = journal.wrap_scheduler(handlers["scheduler"])
    handlers["kv_allocator"] = journal.wrap_allocator(handlers["kv_allocator"])
    mailboxes = {}
    for address, handler in handlers.items():
        after = PlanDue() if address == "scheduler" else None
        mailboxes[address] = Mailbox(address, handler, runtime, capacity=1 << 16, after_batch=after)
        runtime.add(address, mailboxes[address])
    runtime.add("executor", executor)
    runtime.connect()
    executor.start()
    ticker = runtime.loop.call_later(0.01, tick)
    executor.post(StartExecutor(0))

    system = [[rng.randrange(2, 50) for _ in range(12)] for _ in range(3)]
    finished_texts: list[list[int]] = []
    salts: dict[RequestId, str] = {}
    for index in range(num_requests):
        while len(live) > rng.choice((20, 50, 50)) and not failures:
            await next_end()
        request_id = RequestId(index)
        kind = rng.random()
        if kind < 0.4:
            prompt = rng.choice(system) + [rng.randrange(2, 50) for _ in range(rng.randrange(1, 12))]
        elif kind < 0.7 and finished_texts:
            prompt = rng.choice(finished_texts)[:60] + [rng.randrange(2, 50) for _ in range(rng.randrange(1, 6))]
        else:
            prompt = [rng.randrange(2, 50) for _ in range(rng.randrange(1, 60))]
        now_ns = clock.now_ns()
        timeout = rng.random()
        deadline_ns = 0
        if timeout < 0.02:
            deadline_ns = now_ns + 1
        elif timeout < 0.1:
            deadline_ns = now_ns + rng.randrange(1_000_000, 20_000_000)
        fork_of, cache_salt = RequestId(-1), rng.choice(("", "", "", "tenant"))
        if rng.random() < 0.1 and live:
            fork_of = rng.choice(list(live))
            prompt, cache_salt = run.prompts[fork_of], salts[fork_of]
        run.prompts[request_id], salts[request_id] = prompt, cache_salt
        live[request_id] = None
        runtime.send(
            "tokenizer",
            SubmitRequest(
                request_id,
                array("i", prompt).tobytes(),
                SamplingParams(max_tokens=rng.choice((1, 4, 16, 40)), seed=1, stop=("secret stop",)),
                eos_token_ids=(STOP_TOKEN,),
                arrival_ns=now_ns,
                priority=rng.choice((0, 0, 0, 1, 5)),
                cache_salt=cache_salt,
                fork_of=fork_of,
                deadline_ns=deadline_ns,
            ),
        )
        if rng.random() < 0.1 and live:
            runtime.send("tokenizer", CancelRequest(rng.choice(list(live))))
        if rng.random() < 0.005:
            runtime.send("frontend", ResetPrefixCache())
        if rng.random() < 0.1:
            done = rng.choice(list(executor.tokens.values()) or [[2, 3]])
            finished_texts = [*finished_texts[-20:], list(done)]
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
    while len(run.ended) < num_requests and not failures:
        await next_end()
    ticker.cancel()
    executor.stop()
    num_said = len(run.said)
    await journal.close()
    del run.said[num_said:]  # the last blocks may be freed while the disk is waited for: after the journal's end
    if failures and break_scheduler is None:
        raise failures[0]
    run.counts["steps"] = executor.num_steps
    return run


def run_live(
    path: Path,
    *,
    num_requests: int = 2000,
    seed: int = 0,
    config: SchedulerConfig = CONFIG,
    has_tokens: bool = False,
    num_losses: int = 6,
    break_scheduler: Any = None,
) -> LiveRun:
    """Serve requests until all have ended, and write a journal to `path`."""
    return asyncio.run(
        _run(
            path,
            num_requests=num_requests,
            seed=seed,
            config=config,
            has_tokens=has_tokens,
            num_losses=num_losses,
            break_scheduler=break_scheduler,
        )
    )
