"""`python -m octavo.gateway.bench_control_plane`: what a step costs when the executor returns at once.

Scheduler, allocator, detokenizer, front end and the messages between them run as they serve, on one event loop, to the
call of each request's sink with its token; in the executor's place stands one that answers each step with made-up
tokens. CPU time, medians of windows, at several batch sizes and at a short and a long context: no part may grow with
context length.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from array import array

from rich.console import Console
from rich.table import Table

from ..actors.detokenizer.core import DetokenizerCore
from ..actors.executor.locate import locate_model
from ..actors.kv_allocator.config import AllocatorConfig
from ..actors.kv_allocator.core import KVAllocatorCore
from ..actors.runtime.clock import MonotonicClock
from ..actors.runtime.in_process import InProcessRuntime, Mailbox
from ..actors.runtime.routes import ROUTES, Address
from ..actors.scheduler.config import SchedulerConfig
from ..actors.scheduler.core import SchedulerCore
from ..actors.supervisor.core import SupervisorConfig, SupervisorCore
from ..actors.tokenizer.hf_tokenizer import HFTokenizer, load_tokenizer
from ..messages.base import Message
from ..messages.ids import RequestId
from ..messages.request import PromptReady, SubmitPrompt, SubmitRequest, TextDelta
from ..messages.sampling import SamplingParams
from ..messages.step import ExecuteStep, PlanDue, StepExecuted
from .frontend import FrontEnd

WINDOW_STEPS = 100


class InstantExecutor:
    """Answers every step at once with tokens from a fixed list, keeping only what decides which rows sample."""

    def __init__(self, runtime: InProcessRuntime, vocab_size: int) -> None:
        chance = random.Random(0)  # noqa: S311  # a workload, not a secret
        self._runtime = runtime
        self._tokens = tuple(chance.randrange(300, vocab_size) for _ in range(4096))
        self._missing: dict[RequestId, int] = {}
        self.num_steps = 0

    def post(self, message: Message) -> None:
        assert isinstance(message, ExecuteStep), message
        for request_id in message.drop:
            self._missing.pop(request_id, None)
        for start in message.start:
            self._missing[start.request_id] = len(start.token_ids) // 4 - start.num_computed_tokens
        rows = message.request_ids
        if self._missing:
            for request_id, count in zip(rows, message.num_tokens, strict=True):
                if request_id in self._missing:
                    self._missing[request_id] -= count
            rows = tuple(request_id for request_id in rows if self._missing.get(request_id, 0) <= 0)
            self._missing = {request_id: left for request_id, left in self._missing.items() if left > 0}
        self.num_steps += 1
        offset = self.num_steps % 1024
        tokens = self._tokens[offset : offset + len(rows)]
        self._runtime.send("executor", StepExecuted(message.epoch, message.step_id, rows, tokens))


async def measure(codec: HFTokenizer, *, num_running: int, context: int, num_steps: int) -> float:
    """CPU microseconds per step with `num_running` requests decoding at about `context` tokens."""
    block_size = 16
    num_blocks = num_running * ((context + num_steps + 2 * WINDOW_STEPS) // block_size + 2)
    failures: list[Exception] = []
    runtime = InProcessRuntime(ROUTES, MonotonicClock(), lambda _, error: failures.append(error))
    scheduler = SchedulerCore(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=context + num_steps + 1024,
            max_num_seqs=num_running,
            max_num_batched_tokens=max(8192, num_running),
        )
    )
    allocator = KVAllocatorCore(AllocatorConfig(num_blocks=num_blocks, block_size=block_size))
    executor = InstantExecutor(runtime, codec.vocab_size)
    frontend = FrontEnd(lambda message: runtime.send("frontend", message), max_live=num_running, seed=0)
    num_texts = 0

    def sink(event: PromptReady | TextDelta) -> None:
        nonlocal num_texts
        num_texts += 1

    handlers: dict[Address, tuple[object, Message | None]] = {
        "scheduler": (scheduler.handle, PlanDue()),
        "kv_allocator": (allocator.handle, None),
        "detokenizer": (DetokenizerCore(codec).handle, None),
        "frontend": (frontend.handle, None),
        "tokenizer": (_tokenize, None),
        "supervisor": (SupervisorCore(SupervisorConfig()).handle, None),
    }
    for address, (handler, after) in handlers.items():
        runtime.add(address, Mailbox(address, handler, runtime, capacity=1 << 20, after_batch=after))  # type: ignore[arg-type]  # heterogeneous handlers
    runtime.add("executor", executor)
    runtime.connect()
    chance = random.Random(1)  # noqa: S311  # a workload, not a secret
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + 512, seed=0, ignore_eos=True)
    for _ in range(num_running):
        prompt = [chance.randrange(300, codec.vocab_size) for _ in range(context)]
        frontend.submit(prompt, params, sink, now_ns=0)
    while scheduler.stats().generation_tokens < num_running * WINDOW_STEPS and not failures:
        await asyncio.sleep(0)
    windows = []
    end = executor.num_steps + num_steps
    while executor.num_steps < end and not failures:
        first, started = executor.num_steps, time.process_time()
        while executor.num_steps < first + WINDOW_STEPS and not failures:
            await asyncio.sleep(0)
        windows.append((time.process_time() - started) / (executor.num_steps - first) * 1e6)
    if failures:
        raise failures[0]
    assert num_texts >= num_running * num_steps
    return statistics.median(windows)


def _tokenize(message: Message, now_ns: int) -> tuple[Message, ...]:
    """In the tokenizer's place: the prompts are token ids already."""
    assert isinstance(message, SubmitPrompt) and isinstance(message.prompt, tuple), message
    (request_id,) = message.request_ids
    return (
        PromptReady(message.request_ids, message.prompt, message.params),
        SubmitRequest(request_id, array("i", message.prompt).tobytes(), message.params),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    codec = load_tokenizer(locate_model(None)[0])
    table = Table("running", "context", "us a step", "us a token", title="control plane, executor returns at once")
    for num_running, context in ((1, 128), (64, 128), (256, 128), (256, 4096)):
        figure = asyncio.run(measure(codec, num_running=num_running, context=context, num_steps=arguments.steps))
        table.add_row(str(num_running), str(context), f"{figure:.0f}", f"{figure / num_running:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
