"""What an earlier stage of a pipeline waits for, and what it does not."""

from __future__ import annotations

from collections import deque

from octavo.actors.executor.pending_tokens import PendingTokens
from octavo.messages.ids import RequestId

A, B, C = RequestId(1), RequestId(2), RequestId(3)


class Stage:
    """What comes from the last stage, and what has been appended."""

    def __init__(self, *messages: list[int]) -> None:
        self.messages = deque(messages)
        self.appended: list[tuple[RequestId, int]] = []
        self.pending = PendingTokens(
            self._receive, lambda ids, tokens: self.appended.extend(zip(ids, tokens, strict=True))
        )

    def _receive(self, count: int) -> list[int]:
        message = self.messages.popleft()
        assert len(message) == count
        return message


def test_a_step_of_requests_that_wait_for_nothing_is_not_held_up() -> None:
    stage = Stage([10])
    stage.pending.expect([A])
    stage.pending.settle([B, C])
    assert len(stage.messages) == 1 and not stage.appended


def test_a_request_waits_for_its_token_and_for_those_of_the_steps_before_alone() -> None:
    stage = Stage([10, 11], [20], [30])
    stage.pending.expect([A, B])
    stage.pending.expect([C])
    stage.pending.expect([A])  # its token of the first step came in between, or it could not be here
    stage.pending.settle([C])
    assert stage.appended == [(A, 10), (B, 11), (C, 20)]
    stage.pending.settle([C, B])
    assert len(stage.messages) == 1
    stage.pending.settle([A])
    assert stage.appended[-1] == (A, 30)


def test_a_step_that_samples_nothing_is_not_waited_for() -> None:
    stage = Stage([10])
    stage.pending.expect([])
    stage.pending.expect([A])
    stage.pending.settle([A])
    assert stage.appended == [(A, 10)]


def test_a_token_for_a_request_that_was_dropped_is_let_go_also_when_it_starts_anew() -> None:
    stage = Stage([10, 11], [20])
    stage.pending.expect([A, B])
    stage.pending.forget(A)
    stage.pending.settle([A])  # started again: it brings its tokens with it
    assert not stage.appended
    stage.pending.expect([A])
    stage.pending.settle([A])
    assert stage.appended == [(B, 11), (A, 20)]


def test_a_row_that_failed_gets_no_token() -> None:
    stage = Stage([-1, 11])
    stage.pending.expect([A, B])
    stage.pending.settle([A])
    assert stage.appended == [(B, 11)]


def test_a_new_epoch_begins_with_nothing_on_the_way() -> None:
    stage = Stage([10], [20], [30])
    stage.pending.expect([A])
    stage.pending.expect([B])
    stage.pending.drain()
    assert len(stage.messages) == 1 and not stage.appended
    stage.pending.expect([A])
    stage.pending.settle([A])
    assert stage.appended == [(A, 30)]
