from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from core_ring import CoreRing
from journaled_ring import CONFIG, record_ring

from octavo.actors.scheduler.admission import admit
from octavo.actors.scheduler.explain import is_open, request_states, why_waiting
from octavo.actors.scheduler.sequence import State
from octavo.messages.ids import RequestId
from octavo.messages.step import PlanDue, PlanStep

PLENTY = 1 << 20


def relax(state: Any, constraint: str) -> None:
    """Give the scheduler more of what a request is said to wait for."""
    if constraint == "seats":
        state.seat_limit = PLENTY
    elif constraint == "blocks":
        state.credit += PLENTY
    elif constraint == "token budget":
        state.config = msgspec.structs.replace(state.config, max_num_batched_tokens=PLENTY)
    else:
        assert constraint == "steps in flight"
        state.last_executed_step_id = PLENTY


class Questioner:
    """Asks after each `PlanDue` why each request waits, and holds the answer against the scheduler."""

    def __init__(self, ring: CoreRing) -> None:
        self.ring = ring
        self.reasons: Counter[str] = Counter()
        self.num_admitted = 0
        self.rows: tuple[RequestId, ...] = ()
        handle = ring.scheduler.handle

        def questioned(message: Any, now_ns: int) -> Any:
            answers = handle(message, now_ns)
            self.rows = ()
            for answer in answers:
                if isinstance(answer, PlanStep):
                    self.rows = answer.request_ids
            if isinstance(message, PlanDue):
                self.ask()
            return answers

        ring.scheduler.handle = questioned  # type: ignore[method-assign]

    def ask(self) -> None:
        core = self.ring.scheduler
        before = core.stats()
        by_state = {request.request_id: request.state for request in request_states(core)}
        waiting = [sequence for sequence in core._state.sequences.values() if sequence.state is State.WAITING]
        head = min(waiting, key=lambda sequence: sequence.key, default=None)
        for request_id, state in by_state.items():
            assert is_open(core, request_id)
            reason = why_waiting(core, request_id, self.rows)
            if reason is None:
                assert state == "running", "who neither runs nor ended waits for something"
                continue
            assert request_id not in self.rows
            self.reasons[reason.constraint] += 1
            if head is not None and request_id == head.request_id:
                self.hold_against(request_id, reason.constraint)
            elif state == "waiting":
                assert reason.constraint == "order"
                assert reason.num_ahead == sum(other.key < core._state.sequences[request_id].key for other in waiting)
        assert core.stats() == before, "asking changes nothing"

    def hold_against(self, head_id: RequestId, constraint: str) -> None:
        """The head of the queue is admitted once what it waits for is there, or then waits for something else."""
        core = copy.deepcopy(self.ring.scheduler, {id(self.ring): None})
        tried: list[str] = []
        while True:
            assert constraint not in tried, f"{constraint} is said to be short, and is not"
            tried.append(constraint)
            relax(core._state, constraint)
            admit(core._state)
            if core._state.sequences[head_id].state is not State.WAITING:
                self.num_admitted += 1
                return
            reason = why_waiting(core, head_id, self.rows)
            assert reason is not None
            constraint = reason.constraint


def test_what_a_request_is_said_to_wait_for_is_what_holds_it_up(tmp_path: Path) -> None:
    reasons: Counter[str] = Counter()
    num_admitted = 0
    asked: list[Questioner] = []
    for seed in range(8):
        record_ring(tmp_path / "j", seed=seed, num_steps=1200, break_ring=lambda ring: asked.append(Questioner(ring)))
        reasons += asked[-1].reasons
        num_admitted += asked[-1].num_admitted
    print(reasons)
    assert num_admitted > 100
    assert {"seats", "blocks", "token budget", "order", "sibling", "prefix match", "steps in flight"} <= set(reasons)


def test_an_unknown_request_waits_for_nothing() -> None:
    ring = CoreRing(CONFIG)
    assert why_waiting(ring.scheduler, RequestId(5)) is None
    assert not is_open(ring.scheduler, RequestId(5))
    assert request_states(ring.scheduler) == []
