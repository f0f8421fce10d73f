"""What the scheduler knows about one request."""

from __future__ import annotations

import enum
from array import array

from ...messages.request import SubmitRequest

NOT_DECODING = -1

TYPECODE = "I"
"""Of arrays of tokens: int32, which are never negative. An unsigned array appends in two thirds of the time."""


class State(enum.Enum):
    """Where a request is in its life; a preempted one is waiting again."""

    PARKED = "parked"  # waits until a sibling's prompt is computed, to share its blocks
    WAITING = "waiting"
    MATCHING = "matching"  # `MatchPrefix` is under way
    READY = "ready"  # its cached prefix is pinned
    RUNNING = "running"  # in the executor's batch
    ENDED = "ended"


class Sequence:
    """State of one request. There is no phase: `num_computed` catches up with the tokens the request has.

    Attributes:
        key: place in every order, smallest first: arrival plus the fixed waiting time that its priority is worth.
        tokens: int32; prompt, then the outputs that are known.
        max_total: tokens at which it ends by length.
        num_computed: tokens whose KV is in the cache once all steps sent are executed; while decoding, see
            `DecodingRows.num_computed`.
        num_slots: tokens that the blocks in its block table hold.
        num_promised: blocks set aside for tokens it has already.
        num_queued_tokens: tokens it had when it was queued.
        num_backlog: its share of the prompt tokens the next step can take.
        decode_base: while decoding, tokens computed before the clock of `DecodingRows` began.
        due_clock: clock at which its row needs a closer look; `NOT_DECODING` if it is no decoding row.
        fork_of: sibling that it waits for, then shares blocks with.
        siblings: parked sequences that wait for this one.
        last_step_id: a step in flight when it was preempted; its tokens may still come.
        num_losses: losses of the executor in a row that it was in flight at, without a new token between them.
    """

    __slots__ = (
        "decode_base",
        "due_clock",
        "first_scheduled_ns",
        "fork_of",
        "is_matched_before",
        "key",
        "last_step_id",
        "max_total",
        "num_backlog",
        "num_cached_tokens",
        "num_computed",
        "num_losses",
        "num_preemptions",
        "num_promised",
        "num_prompt",
        "num_queued_tokens",
        "num_slots",
        "num_tokens_at_loss",
        "priority",
        "request_id",
        "siblings",
        "state",
        "submit",
        "tokens",
    )

    def __init__(self, submit: SubmitRequest, max_sequence_len: int, priority_aging_ns: int) -> None:
        self.submit = submit
        self.request_id = submit.request_id
        self.priority = submit.priority
        self.key = (submit.arrival_ns + submit.priority * priority_aging_ns, submit.request_id)
        self.tokens = array(TYPECODE, submit.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.tokens.frombytes(submit.output_token_ids)
        max_tokens = submit.params.max_tokens
        self.max_total = max_sequence_len
        if max_tokens is not None:
            self.max_total = min(self.num_prompt + max_tokens, max_sequence_len)
        self.state = State.WAITING
        self.num_computed = 0
        self.num_slots = 0
        self.num_promised = 0
        self.num_queued_tokens = 0
        self.num_backlog = 0
        self.decode_base = 0
        self.due_clock = NOT_DECODING
        self.fork_of = submit.fork_of
        self.siblings: list[Sequence] = []
        self.last_step_id = -1
        self.num_losses = submit.num_losses
        self.num_tokens_at_loss = len(self.tokens) if submit.num_losses else -1
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.first_scheduled_ns = 0
        self.is_matched_before = False

    @property
    def num_output_tokens(self) -> int:
        """Outputs that are known and belong to the answer."""
        return max(0, min(len(self.tokens), self.max_total) - self.num_prompt)

    @property
    def has_prompt(self) -> bool:
        """Whether all prompt tokens are computed by steps that were sent."""
        return self.state is State.RUNNING and self.num_computed >= self.num_prompt

    @property
    def is_decoding(self) -> bool:
        """Whether it is one of `DecodingRows`."""
        return self.due_clock != NOT_DECODING
