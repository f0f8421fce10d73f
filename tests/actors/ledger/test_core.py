from __future__ import annotations

import random
from array import array
from collections import deque

import msgspec
import pytest
from core_ring import CheckingExecutor, pack, reference_stream, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.ledger.core import LedgerCore
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.processes import EngineFailed
from octavo.messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from octavo.messages.step import ExecuteStep, PlanDue, StepExecuted
from octavo.messages.system import EngineLost

ONE, TWO, THREE = RequestId(1), RequestId(2), RequestId(3)


def step(*rows: tuple[int, int], epoch: int = 0) -> StepExecuted:
    ids, tokens = zip(*rows, strict=True) if rows else ((), ())
    return StepExecuted(Epoch(epoch), StepId(0), tuple(map(RequestId, ids)), tokens)


def again(request: SubmitRequest, *tokens: int, fork_of: int = -1) -> SubmitRequest:
    return msgspec.structs.replace(
        request, output_token_ids=pack(tokens), fork_of=RequestId(fork_of), is_taken_up_again=True
    )


def test_what_passes_goes_on_and_a_new_engine_hears_every_live_request_with_its_tokens_in_order_of_arrival() -> None:
    ledger = LedgerCore()
    first, second, third = (submit(i, [5, 6, i]) for i in (3, 1, 2))
    for message in (first, second, step((3, 7), (1, 8)), third, step((1, 9)), step((2, 4), (77, 5), (3, 6))):
        (said,) = ledger.handle(message, 0)
        assert said is message
    assert ledger.handle(RequestEnded(THREE, "length", 2), 0) == [RequestEnded(THREE, "length", 2)]
    assert ledger.recipes() == [again(second, 8, 9), again(third, 4)]
    assert ledger.handle(EngineLost(Epoch(1), "killed"), 0) == [again(second, 8, 9), again(third, 4)]
    assert ledger.num_resubmitted == 2
    ledger.check()


def test_a_request_ends_once_however_often_engines_end_it() -> None:
    ledger = LedgerCore()
    ledger.handle(submit(1, [5]), 0)
    ended = RequestEnded(ONE, "length", 0)
    assert ledger.handle(ended, 0) == [ended]
    assert ledger.handle(ended, 0) == []
    assert ledger.handle(RequestEnded(TWO, "abort"), 0) == []
    assert ledger.num_dropped_messages == 2
    assert ledger.num_live == 0


def test_results_of_a_dead_engine_are_dropped_and_its_loss_is_heard_of_once() -> None:
    ledger = LedgerCore()
    ledger.handle(submit(1, [5]), 0)
    assert ledger.handle(EngineLost(Epoch(3)), 0)
    assert ledger.handle(step((1, 9), epoch=2), 0) == []
    assert ledger.handle(EngineLost(Epoch(3)), 0) == []
    assert ledger.num_dropped_messages == 2
    late = step((1, 9), epoch=3)
    assert ledger.handle(late, 0) == [late]
    assert ledger.recipes() == [again(submit(1, [5]), 9)]


def test_cancels_and_stops_of_live_requests_follow_them_to_the_new_engine() -> None:
    ledger = LedgerCore()
    requests = [submit(i, [5]) for i in (1, 2, 3)]
    for request in requests:
        ledger.handle(request, 0)
    for message in (StopMatched(TWO), CancelRequest(ONE), CancelRequest(RequestId(9)), StopMatched(RequestId(9))):
        assert ledger.handle(message, 0) == ([] if message.request_id == 9 else [message])
    assert ledger.handle(EngineLost(Epoch(1)), 0) == [*map(again, requests), CancelRequest(ONE), StopMatched(TWO)]
    assert len(ledger.handle(EngineLost(Epoch(2)), 0)) == 5, "and to the one after that"


def test_a_sibling_is_named_only_while_it_lives() -> None:
    ledger = LedgerCore()
    leader, *others = [submit(i, [5], fork_of=RequestId(1 if i > 1 else -1)) for i in (1, 2, 3)]
    for request in (leader, *others):
        ledger.handle(request, 0)
    assert ledger.recipes() == [again(leader), *(again(other, fork_of=1) for other in others)]
    ledger.handle(RequestEnded(ONE, "stop", 1), 0)
    assert ledger.recipes() == [again(other) for other in others]


def test_a_recipe_begins_with_the_tokens_it_came_with() -> None:
    ledger = LedgerCore()
    request = submit(1, [5], output=(7, 8))
    ledger.handle(request, 0)
    ledger.handle(step((1, 9)), 0)
    assert ledger.recipes() == [again(request, 7, 8, 9)]
    assert ledger.handle(request, 0) == [], "an id that is live is not submitted a second time"


# ---- with a real scheduler and allocator behind it, killed at any moment ----


class Edge:
    """An edge whose engines die: what it hears, and when, is a matter of chance.

    Both ways messages are under way for a while; a death loses those towards the engine, and those from it beyond a
    random prefix.
    """

    def __init__(self, seed: int, config: SchedulerConfig) -> None:
        self.rng = random.Random(seed)
        self.config = config
        self.ledger = LedgerCore()
        self.epoch = Epoch(0)
        self.requests: dict[RequestId, SubmitRequest] = {}
        self.streams: dict[RequestId, dict[int, int]] = {}
        self.heard: dict[RequestId, list[int]] = {}
        self.ended: dict[RequestId, RequestEnded] = {}
        self.interfered: dict[RequestId, None] = {}
        self.start_engine()

    def start_engine(self) -> None:
        config = self.config
        self.scheduler = SchedulerCore(config, self.epoch)
        self.allocator = KVAllocatorCore(
            AllocatorConfig(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            self.epoch,
        )
        self.executor = CheckingExecutor(config, 8, epoch=self.epoch, streams=self.streams)
        self.to_engine: deque[Message] = deque()
        self.to_edge: deque[Message] = deque()
        self.executed: deque[StepExecuted] = deque()

    def kill_engine(self) -> None:
        for _ in range(self.rng.randrange(len(self.to_edge) + 1)):
            self.hear(self.to_edge.popleft())
        self.epoch = Epoch(self.epoch + self.rng.randrange(1, 3))
        late = [message for message in self.to_edge if isinstance(message, StepExecuted)]
        self.start_engine()
        self.tell_engine(EngineLost(self.epoch))
        if late and self.rng.random() < 0.5:
            self.hear(late[0])  # of a dead epoch: a carrier let it through

    def submit(self, request: SubmitRequest) -> None:
        self.requests[request.request_id] = request
        self.streams[request.request_id] = {}
        self.heard[request.request_id] = []
        self.tell_engine(request)

    def interfere(self, message: CancelRequest | StopMatched) -> None:
        self.interfered[message.request_id] = None
        self.tell_engine(message)

    def tell_engine(self, message: Message) -> None:
        self.to_engine.extend(self.ledger.handle(message, 0))  # type: ignore[arg-type]

    def hear(self, message: Message) -> None:
        for said in self.ledger.handle(message, 0):  # type: ignore[arg-type]
            if isinstance(said, RequestEnded):
                assert said.request_id not in self.ended
                self.ended[said.request_id] = said
            elif isinstance(said, StepExecuted):
                for request_id, token_id in zip(said.request_ids, said.token_ids, strict=True):
                    if request_id not in self.ended:  # a row that was under way when its request ended
                        self.heard[request_id].append(token_id)
        self.ledger.check()

    def run_engine(self, message: Message) -> None:
        inbox: deque[Message] = deque([message])
        while inbox:
            for answer in self.scheduler.handle(inbox.popleft(), 1):  # type: ignore[arg-type]
                if isinstance(answer, StepExecuted | RequestEnded):
                    self.to_edge.append(answer)
                    continue
                for said in self.allocator.handle(answer, 1):  # type: ignore[arg-type]
                    if isinstance(said, ExecuteStep):
                        result = self.executor.execute(said, self.requests)
                        assert result is not None
                        self.executed.append(result)
                    else:
                        inbox.append(said)

    def turn(self) -> None:
        match self.rng.randrange(4):
            case 0 if self.to_engine:
                self.run_engine(self.to_engine.popleft())
            case 1 if self.to_edge:
                self.hear(self.to_edge.popleft())
            case 2 if self.executed:
                self.run_engine(self.executed.popleft())
            case _:
                self.run_engine(PlanDue())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6))
def test_whenever_engines_die_every_request_ends_once_with_the_tokens_it_would_have_had(
    seed: int, num_deaths: int
) -> None:
    config = SchedulerConfig(
        num_blocks=24, block_size=4, max_model_len=60, max_num_seqs=4, max_num_batched_tokens=16, pipeline_depth=2
    )
    edge = Edge(seed, config)
    rng = random.Random(seed)
    num_requests = 8
    for i in range(num_requests):
        fork_of = RequestId(i - 1) if i % 3 == 1 else RequestId(-1)
        prompt = [1 + (3 * (i - (i % 3 == 1)) + k) % 7 for k in range(1 + rng.randrange(12))]
        if fork_of >= 0:
            prompt = array("i", edge.requests[fork_of].prompt_token_ids).tolist()
        edge.submit(
            submit(
                i,
                prompt,
                max_tokens=rng.randrange(1, 12),
                seed=i,
                eos=rng.random() < 0.5,
                min_tokens=rng.randrange(2),
                fork_of=fork_of,
            )
        )
    deaths = sorted(rng.randrange(300) for _ in range(num_deaths))
    for turn in range(5000):
        if deaths and deaths[0] <= turn:
            deaths.pop(0)
            edge.kill_engine()
        if rng.random() < 0.01 and len(edge.interfered) < 3:
            request_id = RequestId(rng.randrange(num_requests))
            edge.interfere(rng.choice([CancelRequest, StopMatched])(request_id))
        edge.turn()
        if len(edge.ended) == num_requests and not deaths:
            break
    assert len(edge.ended) == num_requests
    assert edge.ledger.num_live == 0
    for request_id, request in edge.requests.items():
        expected, reason = reference_stream(request, config.max_sequence_len, 8)
        ended = edge.ended[request_id]
        heard = edge.heard[request_id]
        assert heard == expected[: len(heard)]
        assert ended.num_output_tokens <= len(heard)
        if request_id not in edge.interfered:
            assert (heard, ended.reason, ended.num_output_tokens) == (expected, reason, len(expected))
            assert ended.stop_token_id == (expected[-1] if reason == "stop" else -1)


def test_requests_that_were_accepted_are_not_refused_by_the_new_engines_full_queue() -> None:
    config = SchedulerConfig(
        num_blocks=64,
        block_size=4,
        max_model_len=60,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        pipeline_depth=2,
        max_num_queued_requests=2,
    )
    edge = Edge(0, config)
    for i in range(4):
        edge.submit(submit(i, [1, 2], max_tokens=8))
        while edge.to_engine:
            edge.run_engine(edge.to_engine.popleft())
        edge.run_engine(PlanDue())
    for i in (4, 5):
        edge.submit(submit(i, [1, 2], max_tokens=8))
    while edge.to_engine:
        edge.run_engine(edge.to_engine.popleft())
    edge.kill_engine()
    while len(edge.ended) < 6:
        edge.turn()
    assert {ended.reason for ended in edge.ended.values()} == {"length"}


def test_the_bench_runs() -> None:
    from octavo.actors.ledger import bench

    assert bench.microseconds_per_step(num_steps=2) > 0
    assert bench.microseconds_to_resubmit(num_steps=2) > 0


@pytest.mark.parametrize("module", ["core", "token_table"])
def test_the_ledger_imports_without_torch(module: str) -> None:
    import subprocess
    import sys

    code = f"import sys, octavo.actors.ledger.{module}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_handed_over_once_is_marked_and_stays_where_it_came_to() -> None:
    ledger, other = LedgerCore(), LedgerCore()
    first, second, third = submit(1, [5]), submit(2, [6]), msgspec.structs.replace(submit(3, [7]), num_losses=1)
    for message in (first, second, third, CancelRequest(ONE), CancelRequest(THREE), step((2, 8))):
        ledger.handle(message, 0)
    moved = ledger.hand_over(once=True)
    assert moved == [
        msgspec.structs.replace(again(first), num_losses=1),
        msgspec.structs.replace(again(second, 8), num_losses=1),
        CancelRequest(ONE),
    ]
    assert ledger.recipes() == [again(third)]
    ledger.check()
    for message in moved:
        other.handle(message, 0)
    assert other.hand_over(once=True) == []
    assert other.hand_over() == moved, "when nobody is left there, all goes"
    assert other.num_live == 0 and ledger.num_live == 1


def test_of_siblings_that_do_not_go_together_none_names_the_other() -> None:
    ledger = LedgerCore()
    leader = msgspec.structs.replace(submit(1, [5]), num_losses=1)
    sibling = msgspec.structs.replace(submit(2, [5]), fork_of=ONE)
    ledger.handle(leader, 0)
    ledger.handle(sibling, 0)
    (moved,) = ledger.hand_over(once=True)
    assert isinstance(moved, SubmitRequest) and moved.fork_of == -1


def test_a_request_at_which_engines_fail_twice_without_a_token_between_is_ended_and_no_other() -> None:
    ledger = LedgerCore()
    ledger.handle(submit(1, [5]), 0)
    ledger.handle(submit(2, [6]), 0)
    failed = EngineFailed(1, ONE, "RuntimeError: no")
    assert ledger.handle(failed, 0) == []
    ledger.handle(step((1, 7), (2, 8)), 0)
    assert ledger.handle(failed, 0) == [], "it had gone on, so the first time was not its doing"
    assert ledger.handle(EngineFailed(1, TWO, "RuntimeError: no"), 0) == []
    (ended,) = ledger.handle(failed, 0)
    assert isinstance(ended, RequestEnded)
    assert (ended.request_id, ended.reason, ended.error_code) == (ONE, "error", "request_quarantined")
    assert ended.num_output_tokens == 1 and "RuntimeError: no" in ended.error
    assert ledger.handle(ended, 0) == [ended]
    assert ledger.handle(failed, 0) == [], "it has ended"
    assert ledger.num_dropped_messages == 1
    ledger.check()
