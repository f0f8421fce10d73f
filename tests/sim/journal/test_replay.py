from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from core_ring import STOP_TOKEN, CoreRing, submit
from journaled_ring import CONFIG, entries_of, header_of, record_ring
from journaled_run import run_live
from sim_journal import SimJournal

from octavo.actors.journal.checksum import DecisionChecksum, decisions_of
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.actors.scheduler import preemption
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.messages.base import Message
from octavo.messages.errors import InvalidJournalError
from octavo.messages.ids import Epoch, RequestId
from octavo.messages.kv import PrefixMatched
from octavo.messages.request import RequestEnded
from octavo.messages.step import PlanDue, PlanStep, StepExecuted
from octavo.messages.system import Drain, ExecutorLost
from octavo.sim.journal.diff import diff
from octavo.sim.journal.player import Player
from octavo.sim.journal.reader import JournalReader
from octavo.sim.journal.replay import replay


def replayed_decisions(path: Path, checksum: DecisionChecksum) -> list[tuple[str, object]]:
    """Every decision that fresh cores make of a journal."""
    with JournalReader(path) as reader:
        player = Player(reader.header)
        found = []
        for entry in reader.entries():
            played = player.play(entry)
            found += [
                (played.core, checksum.decision(answer)) for answer in decisions_of(played.message, played.answers)
            ]
    return found


def test_a_live_run_of_2000_requests_is_decided_the_same_in_its_replay(tmp_path: Path) -> None:
    path = tmp_path / "j"
    run = run_live(path, num_requests=2000)
    report = replay(path)
    print(msgspec.structs.replace(report, state=None))
    assert report.is_identical, report.divergence
    assert report.end is not None
    assert report.end.is_complete
    assert report.num_requests == 2000
    assert report.num_ends == 2000
    for covered in (
        report.num_preemptions,
        report.num_prefix_hits,
        report.num_cancels,
        report.num_timeouts,
        report.num_executor_losses,
        report.ends["stop"],
        report.ends["length"],
        run.counts["stopped"],
    ):
        assert covered > 0
    # The recorder's checksums agree; so do all decisions, one by one, held against what was said live.
    checksum = DecisionChecksum(has_tokens=False)
    live = [(core, checksum.decision(message)) for core, message in run.said]
    assert replayed_decisions(path, checksum) == live
    assert len(live) > 10_000
    live_ends = [message for _, message in run.said if isinstance(message, RequestEnded)]
    assert len(live_ends) == 2000


@pytest.mark.parametrize("has_tokens", [False, True])
@pytest.mark.parametrize("loses_messages", [False, True])
def test_random_scripts_of_messages_are_decided_the_same(
    has_tokens: bool, loses_messages: bool, tmp_path: Path
) -> None:
    path = tmp_path / "j"
    kinds: set[str] = set()
    for seed in range(12):
        _, said = record_ring(path, seed=seed, has_tokens=has_tokens, loses_messages=loses_messages, num_steps=1500)
        report = replay(path)
        assert report.is_identical, (seed, report.divergence)
        checksum = DecisionChecksum(has_tokens=has_tokens)
        live = [(core, checksum.decision(message)) for core, message in said]
        assert replayed_decisions(path, checksum) == live, seed
        kinds |= {type(entry.record).__name__ for entry in entries_of(path)}
    assert {"Submitted", "Executed", "Cancelled", "Stopped", "Lost", "int"} <= kinds
    if loses_messages:
        assert {"SchedulerHears", "AllocatorHears", "SchedulerTakes"} <= kinds


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_any_block_size_is_decided_the_same(block_size: int, enable_prefix_caching: bool, tmp_path: Path) -> None:
    config = SchedulerConfig(
        num_blocks=24 // block_size,
        block_size=block_size,
        max_model_len=24,
        max_num_seqs=4,
        max_num_batched_tokens=10,
        enable_prefix_caching=enable_prefix_caching,
        pipeline_depth=3,
    )
    num_hits = 0
    for seed in range(4):
        record_ring(tmp_path / "j", seed=seed, config=config, num_steps=1500)
        report = replay(tmp_path / "j")
        assert report.is_identical, (seed, report.divergence)
        num_hits += report.num_prefix_hits
    assert num_hits > 0 or not enable_prefix_caching


def test_no_token_salt_or_text_stands_in_a_journal_unless_asked_for(tmp_path: Path) -> None:
    for has_tokens in (False, True):
        path = tmp_path / f"{has_tokens}"
        prompt = list(range(1000, 1040))
        with path.open("wb") as file:
            journal = SimJournal(file, header_of(CONFIG, has_tokens=has_tokens))
            handle = journal.wrap_scheduler(lambda message, now_ns: [])
            request = submit(1, prompt, cache_salt="the tenant's secret")
            params = msgspec.structs.replace(request.params, stop=("a secret stop",), logit_bias={7: 1.0})
            handle(msgspec.structs.replace(request, params=params), 1)
            journal.end()
        data = path.read_bytes()
        assert b"secret" not in data.replace(b"a secret stop", b"") or has_tokens
        assert b"the tenant's secret" not in data
        assert (b"a secret stop" in data) == has_tokens
        assert (request.prompt_token_ids[:32] in data) == has_tokens
        assert (request.prompt_token_ids[8:12] in data) == has_tokens


# -- mutations: a change of any decision is found --------------------------------------------------------------------


def recorded_ring(tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "j"
    for seed in range(100):
        record_ring(path, seed=seed, num_requests=60, num_steps=4000, **fields)
        if replay(path).num_preemptions > 3:
            return path
    raise AssertionError("no seed preempts")


def test_a_scheduler_that_preempts_another_victim_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recorded_ring(tmp_path)
    real = preemption.preempt
    num_before = 0

    def preempt(state: Any, sequence: Any) -> None:
        nonlocal num_before
        num_before += 1
        if num_before == 2:
            sequence = min([*state.decoding.rows, sequence], key=lambda other: other.key)  # the best, not the worst
        real(state, sequence)

    monkeypatch.setattr(preemption, "preempt", preempt)
    report = replay(path)
    assert not report.is_identical
    divergence = report.divergence
    assert divergence is not None
    assert divergence.core == "scheduler"
    assert divergence.heard == "PlanDue()"
    assert any(f"step {divergence.step + 1}" in line for line in divergence.replayed)
    assert divergence.recorded.startswith("answered something else")
    assert f"step {divergence.step + 1}" in divergence.recorded
    monkeypatch.undo()
    assert replay(path).is_identical


def test_an_allocator_that_gives_another_block_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recorded_ring(tmp_path)
    real = KVAllocatorCore.handle
    num_placed = 0

    def handle(self: Any, message: Any, now_ns: int) -> Any:
        nonlocal num_placed
        answers = real(self, message, now_ns)
        for i, answer in enumerate(answers):
            if getattr(answer, "append_blocks", ()):
                num_placed += 1
                if num_placed == 20:
                    first, *others = answer.append_blocks
                    other_block = (first[0], (first[1][0] ^ 1, *first[1][1:]))
                    answers[i] = msgspec.structs.replace(answer, append_blocks=(other_block, *others))
        return answers

    monkeypatch.setattr(KVAllocatorCore, "handle", handle)
    divergence = replay(path).divergence
    assert divergence is not None
    assert divergence.core == "kv_allocator"
    assert divergence.heard.startswith(f"PlanStep(step {divergence.step}")
    assert "ExecuteStep" in divergence.replayed[0]


def test_a_scheduler_that_forgets_its_watermark_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recorded_ring(tmp_path)
    monkeypatch.setattr("octavo.actors.scheduler.state.SchedulerState.watermark", 0)
    divergence = replay(path).divergence
    assert divergence is not None
    assert divergence.core == "scheduler"


def test_a_core_that_raised_live_raises_again(tmp_path: Path) -> None:
    path = tmp_path / "j"

    def break_scheduler(core: SchedulerCore) -> None:
        real = core.handle
        num = 0

        def handle(message: Any, now_ns: int) -> Any:
            nonlocal num
            num += isinstance(message, PlanDue)
            if num == 200:
                raise KeyError("planned")
            return real(message, now_ns)

        core.handle = handle  # type: ignore[method-assign]

    run = run_live(path, num_requests=200, num_losses=0, break_scheduler=break_scheduler)
    assert len(run.ended) < 200
    report = replay(path)
    assert not report.is_identical, "today's scheduler does not raise"
    assert report.divergence is not None
    assert report.divergence.recorded.startswith("raised KeyError")


# -- until and why ---------------------------------------------------------------------------------------------------


def test_until_stops_when_the_step_is_placed(tmp_path: Path) -> None:
    path = tmp_path / "j"
    _, said = record_ring(path, seed=3)
    plans = [message for core, message in said if core == "scheduler" and isinstance(message, PlanStep)]
    plan = plans[len(plans) // 2]
    report = replay(path, until=plan.step_id)
    state = report.state
    assert report.is_identical
    assert state.step >= plan.step_id
    assert state.last_placement.startswith(f"ExecuteStep(step {plan.step_id}")
    assert report.end is None
    listed = {request.request_id for request in state.requests}
    assert set(plan.request_ids) <= listed
    num_seated = sum(request.state in ("running", "ready", "matching") for request in state.requests)
    assert num_seated == state.scheduler.num_running
    assert len(listed) - num_seated == state.scheduler.num_waiting
    held = sum(request.num_blocks for request in state.requests)
    assert held >= state.allocator.num_held - 1  # shared blocks count once there


def test_why_names_seats_blocks_and_token_budget(tmp_path: Path) -> None:
    """Three engines, each short of one thing, and a request that waits for it."""
    wide = {"num_blocks": 64, "block_size": 2, "max_model_len": 40, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    for constraint, short in (
        ("seats", {"max_num_seqs": 2}),
        ("blocks", {"num_blocks": 10, "max_model_len": 20}),
        ("token budget", {"max_num_batched_tokens": 4, "max_num_seqs": 8}),
    ):
        config = SchedulerConfig(**{**wide, **short})
        path = tmp_path / "j"
        with path.open("wb") as file:
            journal = SimJournal(file, header_of(config))
            ring = make_ring(config, journal)
            for request_id in range(4):
                ring.submit(submit(request_id, [1, 2, request_id, 3, 4, 5, 6], max_tokens=12, arrival_ns=request_id))
            for _ in range(60):
                ring.now_ns += 1_000_000
                ring.lap()
            journal.end()
        assert len(ring.ended) == 4
        report = replay(path, why=3)
        assert report.is_identical
        found = " | ".join(f"{span.constraint}: {span.first_detail}" for span in report.waited)
        assert constraint in found
        first = {span.constraint for span in replay(path, why=0).waited}
        assert first <= {"blocks"}, "the first waits for nothing but for a block that it takes from others"


def test_a_request_that_never_came_cannot_be_asked_about(tmp_path: Path) -> None:
    record_ring(tmp_path / "j", num_requests=3, num_steps=400)
    with pytest.raises(InvalidJournalError, match="request 77 was never submitted"):
        replay(tmp_path / "j", why=77)


def make_ring(config: SchedulerConfig, journal: SimJournal) -> Any:
    ring = CoreRing(config, vocab=3)
    ring.scheduler.handle = journal.wrap_scheduler(ring.scheduler.handle)  # type: ignore[method-assign]
    ring.allocator.handle = journal.wrap_allocator(ring.allocator.handle)  # type: ignore[method-assign]
    return ring


# -- what hangs on tokens that a journal does not have ----------------------------------------------------------------


@pytest.mark.parametrize("has_tokens", [False, True])
def test_faulty_results_quarantine_and_requests_taken_up_again_are_decided_the_same(
    has_tokens: bool, tmp_path: Path
) -> None:
    config = SchedulerConfig(num_blocks=32, block_size=4, max_model_len=32, max_executor_losses=0, vocab_size=50)
    path = tmp_path / "j"
    said: list[Message] = []
    with path.open("wb") as file:
        journal = SimJournal(file, header_of(config, has_tokens=has_tokens))
        handle = journal.wrap_scheduler(SchedulerCore(config).handle)

        def tell(message: Message) -> list[Message]:
            answers = handle(message, 1)
            said.extend(answers)
            return answers

        def plan(epoch: int, request_id: int) -> PlanStep:
            tell(PlanDue())
            tell(PrefixMatched(Epoch(epoch), RequestId(request_id), 0, 0))
            return tell(PlanDue())[0]

        tell(submit(1, [1, 2, 3, 4, 5]))
        first = plan(0, 1)
        tell(StepExecuted(first.epoch, first.step_id, first.request_ids, (7, 8)))
        tell(StepExecuted(first.epoch, first.step_id, first.request_ids, (7,)))
        tell(ExecutorLost(Epoch(1), "faulty"))  # with this bound, one loss convicts
        tell(submit(2, [1, 2, 3, 4, 5]))
        tell(submit(3, [1, 2, 3, 4, 6]))
        second = plan(1, 3)
        tell(StepExecuted(second.epoch, second.step_id, second.request_ids, (7,)))
        tell(Drain())
        tell(msgspec.structs.replace(submit(4, [1, 2], eos=True, output=(5, STOP_TOKEN)), is_taken_up_again=True))
        tell(msgspec.structs.replace(submit(5, [1, 2], output=(5, 6)), is_taken_up_again=True))
        tell(submit(6, [1, 2]))
        journal.end()
    ends = [
        (message.request_id, message.reason, message.error_code)
        for message in said
        if isinstance(message, RequestEnded)
    ]
    assert ends == [
        (1, "error", "request_quarantined"),
        (2, "refused", "request_quarantined"),
        (4, "stop", ""),
        (6, "refused", "engine_closed"),
    ]
    kinds = [type(entry.record).__name__ for entry in entries_of(path)]
    assert kinds.count("ExecutedFaulty") == 1
    assert kinds.count("ExecutedLate") == 1
    assert kinds.count("Executed") == 1
    assert kinds.count("SubmittedAgain") == 3
    report = replay(path)
    assert report.is_identical, report.divergence
    assert diff(path, path).is_same


def test_losses_that_a_request_brings_from_another_replica_are_decided_the_same(tmp_path: Path) -> None:
    config = SchedulerConfig(num_blocks=32, block_size=4, max_model_len=32, max_executor_losses=1, vocab_size=50)
    path = tmp_path / "j"
    with path.open("wb") as file:
        journal = SimJournal(file, header_of(config, has_tokens=False))
        handle = journal.wrap_scheduler(SchedulerCore(config).handle)
        moved = msgspec.structs.replace(submit(1, [1, 2, 3]), is_taken_up_again=True, num_losses=1)
        for message in (moved, PlanDue(), PrefixMatched(Epoch(0), RequestId(1), 0, 0), PlanDue()):
            handle(message, 1)
        ends = [message for message in handle(ExecutorLost(Epoch(1), "died"), 1) if isinstance(message, RequestEnded)]
        journal.end()
    assert [ended.error_code for ended in ends] == ["request_quarantined"]
    report = replay(path)
    assert report.is_identical, report.divergence


@pytest.mark.parametrize("loss", [{}, {"is_innocent": True}, {"is_out_of_memory": True}])
def test_why_an_executor_was_lost_and_logits_that_were_no_numbers_are_decided_the_same(
    loss: dict[str, bool], tmp_path: Path
) -> None:
    config = SchedulerConfig(num_blocks=32, block_size=4, max_model_len=32, max_executor_losses=0, vocab_size=50)
    path = tmp_path / "j"
    said: list[Message] = []
    with path.open("wb") as file:
        journal = SimJournal(file, header_of(config, has_tokens=False))
        handle = journal.wrap_scheduler(SchedulerCore(config).handle)

        def tell(message: Message) -> list[Message]:
            answers = handle(message, 1)
            said.extend(answers)
            return answers

        def plan(epoch: int) -> PlanStep:
            tell(PlanDue())
            for request_id in (1, 2):
                tell(PrefixMatched(Epoch(epoch), RequestId(request_id), 0, 0))
            return next(message for message in tell(PlanDue()) if isinstance(message, PlanStep))

        def sick(step: PlanStep) -> StepExecuted:
            failed = tuple((request_id, "NaN") for request_id in step.request_ids)
            return StepExecuted(step.epoch, step.step_id, (), (), failed=failed, nonfinite=step.request_ids)

        tell(submit(1, [1, 2, 3, 4, 5]))
        tell(submit(2, [1, 2, 3, 4, 6]))
        tell(sick(plan(0)))
        tell(ExecutorLost(Epoch(1), "no numbers", is_innocent=True))
        tell(sick(plan(1)))
        for request_id in (3, 4):
            tell(submit(request_id, [1, 2, 3, 4, request_id]))
        tell(PlanDue())
        tell(PrefixMatched(Epoch(1), RequestId(3), 0, 0))
        tell(PrefixMatched(Epoch(1), RequestId(4), 0, 0))
        tell(PlanDue())
        tell(ExecutorLost(Epoch(2), "why", **loss))
        journal.end()
    codes = [message.error_code for message in said if isinstance(message, RequestEnded)]
    assert codes == ["model_numerics", "model_numerics"]
    report = replay(path)
    assert report.is_identical, report.divergence
