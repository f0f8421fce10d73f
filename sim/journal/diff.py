"""Compares two journals: the first message that was not the same in both."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from ...actors.journal.core import JournalHeader, decisions_of
from ...messages.base import Message
from ...messages.kv import MatchPrefix
from ...messages.request import RequestEnded, SubmitRequest
from ...messages.sampling import SamplingParams
from ...messages.step import ExecuteStep, PlanDue, PlanStep, StartRequest, StepExecuted
from .describe import describe
from .player import CannotHappenError, CoreName, Player
from .reader import JournalReader


class Side(msgspec.Struct, frozen=True):
    """One journal, where the two part.

    Attributes:
        message: what was heard or said; empty: the journal ends here.
        frame, step, time_s: where; step is the newest planned before.
        trouble: why the journal cannot be followed further with today's cores; else empty.
    """

    message: str
    frame: int = -1
    step: int = -1
    time_s: float = -1.0
    trouble: str = ""


class DiffReport(msgspec.Struct, frozen=True):
    """What a comparison found.

    Attributes:
        is_same: both cores heard and said the same, in the same order each, from begin to end.
        config: fields of the two configurations that differ: name -> (left, right).
        num_same: messages before the first difference.
        core: whose message it is; empty if there is none.
        kind: whether the core heard or said it.
        left, right: the first difference.
        has_compared_tokens: token ids or their hashes counted too; those under different keys cannot be compared.
    """

    left_path: str
    right_path: str
    is_same: bool
    config: dict[str, tuple[str, str]]
    num_same: int
    core: CoreName | Literal[""] = ""
    kind: Literal["heard", "said", ""] = ""
    left: Side | None = None
    right: Side | None = None
    has_compared_tokens: bool = True


class _Item(msgspec.Struct, frozen=True):
    core: CoreName
    kind: Literal["heard", "said"]
    message: Message
    frame: int
    step: int
    time_s: float


class _Lanes:
    """The messages of one journal, split by core."""

    def __init__(self, reader: JournalReader) -> None:
        self._items = self._play(reader)
        self._queues: dict[CoreName, deque[_Item]] = {"scheduler": deque(), "kv_allocator": deque()}
        self.trouble = ""

    def _play(self, reader: JournalReader) -> Iterator[_Item]:
        player = Player(reader.header)
        for entry in reader.entries():
            step, time_s = player.last_step_id, (entry.now_ns - reader.header.start_ns) / 1e9
            try:
                played = player.play(entry)
            except CannotHappenError as error:
                self.trouble = str(error)
                return
            if type(played.message) is not PlanDue:  # how often a scheduler was asked says nothing
                yield _Item(played.core, "heard", played.message, entry.frame, step, time_s)
            if played.difference or (played.raised and not entry.raised):
                self.trouble = f"replayed, the {played.core.replace('_', ' ')} decides otherwise from here on"
                return
            for answer in decisions_of(played.message, played.answers):
                yield _Item(played.core, "said", answer, entry.frame, step, time_s)

    def next(self) -> _Item | None:
        """The next message of whichever core."""
        for queue in self._queues.values():
            if queue:
                return queue.popleft()
        return next(self._items, None)

    def next_of(self, core: CoreName) -> _Item | None:
        """The next message of one core; the other's are kept."""
        if self._queues[core]:
            return self._queues[core].popleft()
        for item in self._items:
            if item.core == core:
                return item
            self._queues[item.core].append(item)
        return None


def diff(left_path: str | Path, right_path: str | Path) -> DiffReport:
    """Compare two journals, message by message for each core.

    Times do not count, nor how often the scheduler was asked to plan: two live runs never agree on them.

    Raises:
        InvalidJournalError: one of the files is no journal, or was changed.
    """
    with JournalReader(left_path) as left, JournalReader(right_path) as right:
        config = _config_difference(left.header, right.header)
        with_tokens = left.header.has_tokens == right.header.has_tokens and left.header.key_id == right.header.key_id
        lanes, others = _Lanes(left), _Lanes(right)
        num_same = 0
        core: CoreName | None = None
        ours: _Item | None
        theirs: _Item | None
        while True:
            ours = lanes.next()
            core = ours.core if ours is not None else None
            theirs = others.next_of(core) if core is not None else others.next()
            if ours is None or theirs is None or not _is_same(ours, theirs, with_tokens=with_tokens):
                break
            num_same += 1
        first = ours or theirs
        is_same = first is None and not lanes.trouble and not others.trouble
        return DiffReport(
            left_path=str(left_path),
            right_path=str(right_path),
            is_same=is_same and not config,
            config=config,
            num_same=num_same,
            core="" if first is None else first.core,
            kind="" if first is None else first.kind,
            left=None if is_same else _side(ours, lanes.trouble),
            right=None if is_same else _side(theirs, others.trouble),
            has_compared_tokens=with_tokens,
        )


def _side(item: _Item | None, trouble: str) -> Side:
    if item is None:
        return Side("", trouble=trouble)
    return Side(describe(item.message), item.frame, item.step, item.time_s)


def _config_difference(left: JournalHeader, right: JournalHeader) -> dict[str, tuple[str, str]]:
    found = {}
    for part in ("scheduler", "allocator"):
        ours, theirs = getattr(left, part), getattr(right, part)
        for name in ours.__struct_fields__:
            values = str(getattr(ours, name)), str(getattr(theirs, name))
            if values[0] != values[1]:
                found[f"{part}.{name}"] = values
    return found


def _is_same(left: _Item, right: _Item, *, with_tokens: bool) -> bool:
    if left.kind != right.kind or type(left.message) is not type(right.message):
        return False
    return _timeless(left.message, with_tokens) == _timeless(right.message, with_tokens)


def _timeless(message: Message, with_tokens: bool) -> Message:
    """A message without what differs between two runs that decide alike."""
    replace = msgspec.structs.replace
    match message:
        case SubmitRequest():
            message = replace(
                message,
                arrival_ns=0,
                deadline_ns=int(message.deadline_ns > 0),
                cache_salt=str(bool(message.cache_salt)),  # always hashed, and each engine draws its own key
            )
            if with_tokens:
                return message
            return replace(
                message,
                prompt_token_ids=_count(message.prompt_token_ids),
                output_token_ids=_count(message.output_token_ids),
                params=SamplingParams(max_tokens=message.params.max_tokens),
                eos_token_ids=(),
            )
        case StepExecuted():
            return replace(message, execute_ns=0, token_ids=message.token_ids if with_tokens else ())
        case RequestEnded():
            stop_token_id = message.stop_token_id if with_tokens else min(message.stop_token_id, 0)
            return replace(message, first_scheduled_ns=0, stop_token_id=stop_token_id)
        case MatchPrefix():
            token_ids = message.token_ids if with_tokens else _count(message.token_ids)
            return replace(message, token_ids=token_ids, cache_salt=str(bool(message.cache_salt)))
        case PlanStep() if not with_tokens:
            release = tuple((request_id, _count(token_ids)) for request_id, token_ids in message.release)
            return replace(message, start=_starts(message.start), release=release)
        case ExecuteStep() if not with_tokens:
            return replace(message, start=_starts(message.start))
        case _:
            return message


def _starts(starts: tuple[StartRequest, ...]) -> tuple[StartRequest, ...]:
    return tuple(
        msgspec.structs.replace(start, token_ids=_count(start.token_ids), params=SamplingParams(), eos_token_ids=())
        for start in starts
    )


def _count(token_ids: bytes) -> bytes:
    return len(token_ids).to_bytes(8, "little")
