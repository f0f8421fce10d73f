"""The running checksum of what the cores say: equal as long as every decision is."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence

import msgspec

from ...messages.base import Message
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks
from ...messages.request import RequestEnded
from ...messages.step import ExecuteStep, PlanStep, StartRequest
from ...messages.system import ExecutorFailed

_encode = msgspec.msgpack.Encoder().encode


def decisions_of(message: Message, answers: Sequence[Message]) -> Sequence[Message]:
    """What a core decided, of what it said: results of a step that the scheduler passes on are none of it."""
    return answers[1:] if answers and answers[0] is message else answers


class DecisionChecksum:
    """A CRC over everything said, in order, but for token ids, of which only the number is a decision.

    Args:
        has_tokens: token ids stand in the journal as they are, so an end's stop token counts too.
    """

    def __init__(self, *, has_tokens: bool) -> None:
        self._has_tokens = has_tokens
        self.crc = 0

    def add(self, messages: Iterable[Message]) -> int:
        """Take in the answers to one message; return the checksum so far."""
        crc = self.crc
        for message in messages:
            crc = zlib.crc32(_encode(self.decision(message)), crc)
        self.crc = crc
        return crc

    def decision(self, message: Message) -> tuple[object, ...]:
        """What a message decides, as plain values."""
        if type(message) is RequestEnded and not self._has_tokens:
            message = msgspec.structs.replace(message, stop_token_id=min(message.stop_token_id, 0))  # -1: none
        return _DECISIONS[type(message)](message)


def _of_plan(plan: PlanStep) -> tuple[object, ...]:
    return (
        1,
        plan.epoch,
        plan.step_id,
        plan.request_ids,
        plan.num_tokens,
        _of_starts(plan.start) if plan.start else (),
        plan.grow,
        [(request_id, len(token_ids)) for request_id, token_ids in plan.release] if plan.release else (),
        plan.computed_prompt_tokens,
    )


def _of_placement(step: ExecuteStep) -> tuple[object, ...]:
    return (
        2,
        step.epoch,
        step.step_id,
        step.request_ids,
        step.num_tokens,
        _of_starts(step.start) if step.start else (),
        step.block_tables,
        step.append_blocks,
        step.drop,
    )


def _of_starts(starts: tuple[StartRequest, ...]) -> list[tuple[int, int, int, int]]:
    return [
        (start.request_id, len(start.token_ids), start.num_prompt_tokens, start.num_computed_tokens) for start in starts
    ]


def _of_matched(matched: PrefixMatched) -> tuple[object, ...]:
    return 3, matched.epoch, matched.request_id, matched.num_cached_tokens, matched.num_blocks_taken


def _of_freed(freed: BlocksFreed) -> tuple[object, ...]:
    return 4, freed.epoch, freed.num_blocks, freed.num_cached_blocks, freed.num_released


def _of_match(match: MatchPrefix) -> tuple[object, ...]:
    return (
        5,
        match.epoch,
        match.request_id,
        len(match.token_ids),
        bool(match.cache_salt),
        match.adapter,
        match.fork_of,
        match.skip_cache,
    )


def _of_release(release: ReleaseMatch) -> tuple[object, ...]:
    return 6, release.epoch, release.request_id


def _of_reset(reset: ResetBlocks) -> tuple[object, ...]:
    return 7, reset.epoch


def _of_end(ended: RequestEnded) -> tuple[object, ...]:
    return (
        8,
        ended.request_id,
        ended.reason,
        ended.num_output_tokens,
        ended.stop_token_id,
        ended.num_cached_tokens,
        ended.error_code,
        ended.error,
        ended.num_preemptions,
        ended.first_scheduled_ns,
        ended.error_param,
    )


def _of_failure(failed: ExecutorFailed) -> tuple[object, ...]:
    return 9, failed.epoch  # what was wrong with results that were refused does not stand in a journal


_DECISIONS: dict[type, Callable[..., tuple[object, ...]]] = {
    PlanStep: _of_plan,
    ExecuteStep: _of_placement,
    PrefixMatched: _of_matched,
    BlocksFreed: _of_freed,
    MatchPrefix: _of_match,
    ReleaseMatch: _of_release,
    ResetBlocks: _of_reset,
    RequestEnded: _of_end,
    ExecutorFailed: _of_failure,
}
"""Field by field, so that a field that a later version adds does not make its older journals differ."""
