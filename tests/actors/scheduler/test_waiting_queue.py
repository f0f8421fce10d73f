"""The queue against a sorted list."""

from __future__ import annotations

import random

from core_ring import submit
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.scheduler.sequence import Sequence, State
from octavo.actors.scheduler.waiting_queue import WaitingQueue


def sequence(request_id: int, arrival_ns: int, priority: int = 0) -> Sequence:
    return Sequence(submit(request_id, [1], arrival_ns=arrival_ns, priority=priority), 16, priority_aging_ns=50)


def end(queue: WaitingQueue, ended: Sequence) -> None:
    ended.state = State.ENDED
    queue.discard(ended)


@given(st.integers(0, 2**32))
def test_the_most_urgent_that_still_waits_comes_first(seed: int) -> None:
    rng = random.Random(seed)
    queue, waiting = WaitingQueue(), list[Sequence]()
    for request_id in range(400):
        match rng.randrange(5):
            case 0 | 1 | 2:
                added = sequence(request_id, rng.randrange(100), rng.randrange(3))
                queue.push(added)
                waiting.append(added)
            case 3 if waiting:
                end(queue, waiting.pop(rng.randrange(len(waiting))))
            case 4 if waiting:
                first = min(waiting, key=lambda one: one.key)
                assert queue.peek() is first
                queue.pop()
                waiting.remove(first)
                first.state = State.MATCHING
        assert len(queue) == len(waiting)
        queue.check()
    for first in sorted(waiting, key=lambda one: one.key):
        assert queue.peek() is first
        queue.pop()
    assert queue.peek() is None
    assert len(queue) == 0


def test_those_who_give_up_behind_one_who_waits_for_ever_take_no_more_memory() -> None:
    queue = WaitingQueue()
    patient = sequence(0, arrival_ns=0)
    queue.push(patient)
    for request_id in range(1, 5000):
        passing = sequence(request_id, arrival_ns=request_id)
        queue.push(passing)
        end(queue, passing)
        assert len(queue._heap) <= 100
    assert len(queue) == 1
    assert queue.peek() is patient
