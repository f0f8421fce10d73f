"""Scheduler and allocator cores in a ring with an executor that checks every token of KV it reads.

The executor keeps a model of its KV memory, slot by slot: which token history each slot was written for. Each row reads
its whole context back, so a block that is shared wrongly, reused too early or not filled is found at once.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import dataclass, field

from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.scheduler.config import FIRST_EPOCH, MAX_GROWTH, SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.kv import ResetBlocks, ResetPrefixCache
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, PlanDue, PlanStep, StepExecuted
from octavo.messages.system import Drain, ExecutorFailed, ExecutorLost

MASK = (1 << 64) - 1
STOP_TOKEN = 0


def pack(tokens) -> bytes:
    return array("i", tokens).tobytes()


def extend_history(history: int, token: int) -> int:
    """A 64-bit stand-in for everything the KV at a position depends on."""
    mixed = (history ^ (token + 1) * 0x9E3779B97F4A7C15) & MASK
    mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & MASK
    return mixed ^ mixed >> 32


def root_history(salt: str) -> int:
    history = 7
    for byte in salt.encode():
        history = extend_history(history, byte)
    return history


def next_token(seed: int, history: int, vocab: int) -> int:
    return extend_history(history, seed) % vocab


def submit(
    request_id: int,
    prompt: list[int],
    *,
    max_tokens: int | None = 8,
    seed: int = 0,
    min_tokens: int = 0,
    eos: bool = False,
    prompt_logprobs: int | None = None,
    output: tuple[int, ...] = (),
    **fields,
) -> SubmitRequest:
    return SubmitRequest(
        request_id=RequestId(request_id),
        prompt_token_ids=pack(prompt),
        params=SamplingParams(
            max_tokens=max_tokens, seed=seed, min_tokens=min_tokens, prompt_logprobs=prompt_logprobs, temperature=0.0
        ),
        eos_token_ids=(STOP_TOKEN,) if eos else (),
        output_token_ids=pack(output),
        **fields,
    )


def reference_stream(request: SubmitRequest, max_len: int, vocab: int) -> tuple[list[int], str]:
    """Every token the request may produce, and why it ends if nobody interferes."""
    tokens = array("i", request.prompt_token_ids).tolist()
    history = root_history(request.cache_salt)
    for token in tokens:
        history = extend_history(history, token)
    output: list[int] = []
    while True:
        if len(output) == request.params.max_tokens or len(tokens) + len(output) >= max_len:
            return output, "length"
        token = next_token(request.params.seed or 0, history, vocab)
        output.append(token)
        history = extend_history(history, token)
        if token in request.eos_token_ids and len(output) >= request.params.min_tokens:
            return output, "stop"


@dataclass
class Row:
    tokens: list[int]
    histories: list[int]
    num_prompt: int
    num_computed: int
    block_table: list[int]
    request: SubmitRequest
    has_failed: bool = False  # what is sampled after that continues nothing


@dataclass
class CheckingExecutor:
    """Applies `ExecuteStep` to a model of KV memory."""

    config: SchedulerConfig
    vocab: int
    epoch: Epoch = FIRST_EPOCH
    rows: dict[RequestId, Row] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    fail_next: set[RequestId] = field(default_factory=set)
    streams: dict[RequestId, dict[int, int]] = field(default_factory=dict)  # output position -> token
    num_computed_tokens: int = 0
    num_rows: int = 0

    def execute(self, step: ExecuteStep, requests: dict[RequestId, SubmitRequest]) -> StepExecuted | None:
        if step.epoch != self.epoch:
            return None
        size = self.config.block_size
        for request_id in step.drop:
            self.rows.pop(request_id, None)
        for start, block_table in zip(step.start, step.block_tables, strict=True):
            assert start.request_id not in self.rows
            tokens = array("i", start.token_ids).tolist()
            request = requests[start.request_id]
            assert pack(tokens[: start.num_prompt_tokens]) == request.prompt_token_ids
            for position, token in enumerate(tokens[start.num_prompt_tokens :]):
                assert self.streams[start.request_id].get(position, token) == token
            histories = [root_history(request.cache_salt)]
            for token in tokens:
                histories.append(extend_history(histories[-1], token))
            self.rows[start.request_id] = Row(
                tokens, histories, start.num_prompt_tokens, start.num_computed_tokens, list(block_table), request
            )
        for request_id, block_ids in step.append_blocks:
            self.rows[request_id].block_table.extend(block_ids)
        assert len(self.rows) <= self.config.max_num_seqs
        assert len(set(step.request_ids)) == len(step.request_ids) <= self.config.max_num_seqs
        assert sum(step.num_tokens) <= self.config.max_num_batched_tokens
        assert sorted(step.num_tokens, key=lambda n: n != 1) == list(step.num_tokens), "rows of one token come first"
        batch = [
            (request_id, self.rows[request_id], n)
            for request_id, n in zip(step.request_ids, step.num_tokens, strict=True)
        ]
        written: set[int] = set()
        for _, row, num_tokens in batch:
            assert num_tokens >= 1
            assert row.num_computed + num_tokens <= len(row.tokens), "a row computes a token that nobody knows"
            for position in range(row.num_computed, row.num_computed + num_tokens):
                slot = row.block_table[position // size] * size + position % size
                assert slot not in written, "two rows write one slot"
                written.add(slot)
                self.memory[slot] = row.histories[position + 1]
            row.num_computed += num_tokens
            self.num_computed_tokens += num_tokens
            self.num_rows += 1
        sampled: list[tuple[RequestId, int]] = []
        stopped: list[RequestId] = []
        failed: list[tuple[RequestId, str]] = []
        for request_id, row, _ in batch:
            num_ahead = len(row.block_table) - -(-row.num_computed // size)
            assert 0 <= num_ahead < MAX_GROWTH, "blocks that are not there, or not of use soon"
            for position in range(row.num_computed):
                slot = row.block_table[position // size] * size + position % size
                assert self.memory.get(slot) == row.histories[position + 1], "KV of another history"
            if row.num_computed < len(row.tokens):
                continue
            if request_id in self.fail_next:
                self.fail_next.discard(request_id)
                failed.append((request_id, "not a number"))
                row.has_failed = True
                # An overrun row of the next step still finds a token to compute.
                row.tokens.append(STOP_TOKEN)
                row.histories.append(extend_history(row.histories[-1], STOP_TOKEN))
                continue
            token = next_token(row.request.params.seed or 0, row.histories[-1], self.vocab)
            num_output = len(row.tokens) - row.num_prompt
            assert num_output < (row.request.params.max_tokens or 1) or row.request.params.max_tokens is None
            assert len(row.tokens) < self.config.max_sequence_len
            if not row.has_failed:
                known = self.streams[request_id].setdefault(num_output, token)
                assert known == token, "the schedule changed a token"
            row.tokens.append(token)
            row.histories.append(extend_history(row.histories[-1], token))
            sampled.append((request_id, token))
            if token in row.request.eos_token_ids and num_output + 1 >= row.request.params.min_tokens:
                stopped.append(request_id)
        return StepExecuted(
            epoch=step.epoch,
            step_id=step.step_id,
            request_ids=tuple(request_id for request_id, _ in sampled),
            token_ids=tuple(token for _, token in sampled),
            stopped=tuple(stopped),
            failed=tuple(failed),
        )


class CoreRing:
    """Delivers messages in order on each edge and in any order between edges; checks after each of them."""

    def __init__(self, config: SchedulerConfig, *, seed: int = 0, vocab: int = 8, checks: bool = True) -> None:
        self.config = config
        self.vocab = vocab
        self.checks = checks
        self.rng = random.Random(seed)
        self.scheduler = SchedulerCore(config)
        allocator_config = AllocatorConfig(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.allocator = KVAllocatorCore(allocator_config)
        self.executor = CheckingExecutor(config, vocab)
        self.edges: dict[str, deque] = {
            name: deque() for name in ("submit", "lost", "to_allocator", "from_allocator", "to_executor", "executed")
        }
        self.requests: dict[RequestId, SubmitRequest] = {}
        self.ended: dict[RequestId, RequestEnded] = {}
        self.plans: list[PlanStep] = []
        self.now_ns = 1
        self.next_step_id = StepId(0)
        self.epoch = Epoch(0)
        self.interfered: set[RequestId] = set()

    # -- what a test may do -------------------------------------------------------------------------------------------

    def submit(self, request: SubmitRequest) -> None:
        self.requests[request.request_id] = request
        outputs = array("i", request.output_token_ids)
        self.executor.streams[request.request_id] = dict(enumerate(outputs))
        self.edges["submit"].append(request)

    def cancel(self, request_id: int) -> None:
        self.interfered.add(RequestId(request_id))
        self.edges["submit"].append(CancelRequest(RequestId(request_id)))

    def stop(self, request_id: int) -> None:
        self.interfered.add(RequestId(request_id))
        self.edges["submit"].append(StopMatched(RequestId(request_id)))

    def drain(self) -> None:
        self.edges["submit"].append(Drain())

    def lose_executor(self) -> None:
        self.epoch = Epoch(self.epoch + 1)
        self.executor.epoch = self.epoch
        self.executor.rows.clear()
        self.executor.memory.clear()
        self.edges["lost"].append(ExecutorLost(self.epoch, "killed"))

    def fail_row(self, request_id: int) -> None:
        self.interfered.add(RequestId(request_id))
        self.executor.fail_next.add(RequestId(request_id))

    def reset_prefix_cache(self) -> None:
        self.edges["to_allocator"].append(ResetPrefixCache())

    # -- carrying -----------------------------------------------------------------------------------------------------

    @property
    def busy_edges(self) -> list[str]:
        return [name for name, edge in self.edges.items() if edge]

    def deliver(self, name: str) -> None:
        """Deliver the oldest message of one edge."""
        message = self.edges[name].popleft()
        if name == "to_allocator":
            for answer in self.allocator.handle(message, self.now_ns):
                self.edges["to_executor" if isinstance(answer, ExecuteStep) else "from_allocator"].append(answer)
        elif name == "to_executor":
            result = self.executor.execute(message, self.requests)
            if result is not None:
                self.edges["executed"].append(result)
        else:
            self.tell_scheduler(message)
        if self.checks:
            self.check()

    def plan(self) -> None:
        """Give the scheduler its `PlanDue`."""
        self.tell_scheduler(PlanDue())

    def tell_scheduler(self, message) -> None:
        answers = self.scheduler.handle(message, self.now_ns)
        is_accepted = bool(answers) and answers[0] is message
        for answer in answers[1:] if is_accepted else answers:
            assert not isinstance(answer, StepExecuted | ExecutorFailed)
            if isinstance(answer, RequestEnded):
                assert answer.request_id not in self.ended, "a request ends once"
                self.ended[answer.request_id] = answer
                continue
            if isinstance(answer, PlanStep):
                assert answer.step_id == self.next_step_id
                self.next_step_id = StepId(self.next_step_id + 1)
                self.plans.append(answer)
                assert self.scheduler.stats().num_steps_in_flight <= self.config.pipeline_depth
                for request_id in answer.request_ids:
                    assert request_id not in self.ended, "an ended request is planned"
            assert isinstance(answer, ResetBlocks) or answer.epoch <= self.epoch
            self.edges["to_allocator"].append(answer)

    def step_randomly(self) -> bool:
        """Deliver a random edge's oldest message, or plan; False if nothing is under way and nothing can be planned."""
        self.now_ns += self.rng.randrange(1, 1000)
        busy = self.busy_edges
        if busy and self.rng.random() < 0.9:
            self.deliver(self.rng.choice(busy))
            return True
        num_before = self.scheduler.stats()
        self.plan()
        return bool(self.busy_edges) or self.scheduler.stats() != num_before

    def run(self, max_deliveries: int = 200_000) -> None:
        """Run until every request has ended and nothing is under way."""
        for _ in range(max_deliveries):
            if not self.step_randomly():
                break
        else:
            raise AssertionError(f"no end in sight: {self.scheduler.stats()}")
        assert set(self.ended) == set(self.requests), f"stuck: {self.scheduler.stats()}"
        self.check_quiet()

    def lap(self) -> None:
        """One round in a fixed order: everything under way arrives, results last, then the scheduler plans."""
        for name in ("lost", "submit", "to_allocator", "from_allocator"):
            while self.edges[name]:
                self.deliver(name)
        self.plan()
        for name in ("to_allocator", "from_allocator"):
            while self.edges[name]:
                self.deliver(name)
        self.plan()
        for name in ("to_allocator", "to_executor", "executed"):
            while self.edges[name]:
                self.deliver(name)

    # -- what must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        self.scheduler.check()
        self.allocator.check()
        if not self.edges["to_allocator"] and not self.edges["from_allocator"] and not self.edges["lost"]:
            scheduler, allocator = self.scheduler.stats(), self.allocator.stats()
            assert scheduler.credit + scheduler.num_promised_blocks == allocator.num_free + allocator.num_cached

    def check_quiet(self) -> None:
        """With nothing left to do nothing is held, and every stream is what it should be."""
        self.check()
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_steps_in_flight) == (0, 0, 0)
        sizes = [sum(plan.num_tokens) for plan in self.plans if plan.request_ids]
        assert stats.step_tokens == sum(sizes) and sum(stats.step_sizes) == len(sizes)
        assert stats.step_sizes[0] == sizes.count(1) and stats.step_sizes[3] == sum(5 <= size <= 8 for size in sizes)
        assert stats.credit == self.config.num_blocks
        assert self.allocator.stats().num_held == 0
        assert not self.executor.rows
        assert self.scheduler.num_requests == 0
        for request_id in self.requests:
            self.check_stream(request_id)

    def check_stream(self, request_id: int) -> None:
        """Compare one ended request with what it would have produced alone."""
        request, ended = self.requests[RequestId(request_id)], self.ended[RequestId(request_id)]
        if ended.reason == "refused":
            assert ended.num_output_tokens == 0
            return
        expected, reason = reference_stream(request, self.config.max_sequence_len, self.vocab)
        stream = self.executor.streams[RequestId(request_id)]
        output = [stream[position] for position in range(ended.num_output_tokens)]
        assert output == expected[: len(output)]
        if ended.reason == "length" or (ended.reason == "stop" and request_id not in self.interfered):
            assert ended.reason == reason
            assert output == expected
            assert ended.stop_token_id == (output[-1] if reason == "stop" else -1)
        else:
            assert request_id in self.interfered or ended.error_code == "request_quarantined" or request.deadline_ns
