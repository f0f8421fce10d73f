"""The cores of an engine for benchmarks of what lies around them."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable

from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks
from ...messages.request import SubmitRequest
from ...messages.sampling import SamplingParams
from ...messages.step import ExecuteStep, PlanDue, PlanStep
from ..kv_allocator.config import AllocatorConfig
from ..kv_allocator.core import KVAllocatorCore
from ..scheduler.config import SchedulerConfig
from ..scheduler.core import SchedulerCore

BLOCK_SIZE = 16


class Ring:
    """Scheduler and allocator cores behind a port, with requests that decode for ever."""

    def __init__(self, num_running: int, max_tokens: int, send: Callable[[ExecuteStep], object]) -> None:
        num_blocks = num_running * (max_tokens // BLOCK_SIZE + 8)
        self._scheduler = SchedulerCore(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_size=BLOCK_SIZE,
                max_model_len=max_tokens + 64,
                max_num_seqs=num_running,
                max_num_batched_tokens=num_running * 32,
                pipeline_depth=2,
                enable_prefix_caching=False,
            )
        )
        self._allocator = KVAllocatorCore(
            AllocatorConfig(num_blocks=num_blocks, block_size=BLOCK_SIZE, enable_prefix_caching=False)
        )
        self._send = send
        self._inbox: deque[Message] = deque()
        for number in range(num_running):
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=number)
            prompt = array("i", range(300, 316)).tobytes()
            self._inbox.append(SubmitRequest(RequestId(10_000 + number), prompt, params))

    def hear(self, *messages: Message) -> None:
        """Take messages, and plan once the inbox is drained, as the runtimes do."""
        inbox = self._inbox
        inbox.extend(messages)
        while inbox:
            while inbox:
                self._handle(inbox.popleft())
            self._handle(PlanDue())

    def _handle(self, message: Message) -> None:
        now_ns = time.monotonic_ns()
        for answer in self._scheduler.handle(message, now_ns):  # type: ignore[arg-type]  # of its inbox, by construction
            if isinstance(answer, (PlanStep, MatchPrefix, ReleaseMatch, ResetBlocks)):
                for stamped in self._allocator.handle(answer, now_ns):
                    if isinstance(stamped, ExecuteStep):
                        self._send(stamped)
                    elif isinstance(stamped, (PrefixMatched, BlocksFreed)):
                        self._inbox.append(stamped)
