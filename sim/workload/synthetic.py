"""Workloads made of chance: arrivals, lengths, common system prompts, conversations, closed loops."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, takewhile

import msgspec

from ...messages.errors import InvalidWorkloadError
from .arrivals import ArrivalProcess
from .content_ids import FIRST_PRIVATE_ID, MAX_CONTENT_ID, ContentIds
from .distributions import Distribution, Fixed
from .draws import Stream
from .request import TraceRequest, Workload, WorkloadCounts

MAX_TURNS = 100
_MAX_TOKENS = 2**31 - 1


class SyntheticSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to make up. A conversation of one turn is a plain request.

    Attributes:
        arrivals: of conversations; None: a closed loop of `concurrency` users.
        num_conversations: how many in all; None: as many as arrive within `duration_s`.
        duration_s: no arrival after; None: no such bound.
        concurrency: users of a closed loop, each of whom begins at time 0 and asks again `think` after each answer.
        prompt: user tokens of a first turn.
        followup: user tokens of later turns.
        output: tokens of an answer.
        lengths_from: requests whose (prompt, output) pairs are drawn instead.
        num_groups, group_tokens, zipf: so many system prompts of so many tokens, the r-th as popular as `r ** -zipf`.
        turns: of a conversation, at most `MAX_TURNS`; each holds all before it.
        think: from an answer's end to the next turn, seconds.
        max_prompt, max_output: bounds of what is drawn.
        seed: of every draw.
    """

    arrivals: ArrivalProcess | None
    num_conversations: int | None = None
    duration_s: float | None = None
    concurrency: int = 0
    prompt: Distribution = Fixed(512)
    followup: Distribution | None = None
    output: Distribution = Fixed(128)
    lengths_from: Workload | None = None
    num_groups: int = 0
    group_tokens: int = 0
    zipf: float = 1.0
    turns: Distribution = Fixed(1)
    think: Distribution = Fixed(0)
    max_prompt: int = _MAX_TOKENS
    max_output: int = _MAX_TOKENS
    seed: int = 0


class SyntheticWorkload:
    """A workload drawn from a `SyntheticSpec`.

    Turn `t` of conversation `c` is a function of the seed, `c` and `t` alone, so followers are found from a request's
    `answer_id`.
    """

    def __init__(self, spec: SyntheticSpec, *, name: str) -> None:
        """Prepare.

        Raises:
            InvalidWorkloadError: the spec contradicts itself, or holds more content than there are ids.
        """
        self.name = name
        self._spec = spec
        if (spec.arrivals is None) == (spec.concurrency < 1):
            raise InvalidWorkloadError("give arrivals, or a concurrency of 1 or more for a closed loop")
        if spec.arrivals is None and spec.num_conversations is None:
            raise InvalidWorkloadError("a closed loop ends after n requests: give n")
        if spec.num_conversations is None and spec.duration_s is None:
            raise InvalidWorkloadError("this would never end: give n (how many) or duration (seconds)")
        if (spec.num_groups > 0) != (spec.group_tokens > 0):
            raise InvalidWorkloadError("a common system prompt needs both groups and group_tokens above 0")
        self._max_turns = int(min(spec.turns.max_value, MAX_TURNS))
        self._num_conversations = (
            spec.num_conversations if spec.duration_s is None else sum(1 for _ in self._arrival_times())
        ) or 0
        if not self._num_conversations:
            raise InvalidWorkloadError(
                f"nothing arrives within {spec.duration_s:g} s: give a longer duration or a rate"
            )
        num_private = self._num_conversations * self._max_turns * 2
        if FIRST_PRIVATE_ID + num_private > MAX_CONTENT_ID + 1:
            raise InvalidWorkloadError(
                f"{self._num_conversations} conversations of up to {self._max_turns} turns are more than "
                f"{FIRST_PRIVATE_ID // 2} requests: give less"
            )
        self.content_ids = ContentIds(spec.num_groups, num_private)
        self.has_shared_prefixes = spec.num_groups > 0 or self._max_turns > 1
        self.has_followers = spec.concurrency > 0 or self._max_turns > 1
        self._popularity = list(accumulate((rank + 1) ** -spec.zipf for rank in range(spec.num_groups)))
        self._pairs = (
            [(request.num_prompt_tokens, request.num_output_tokens) for request in spec.lengths_from.arrivals()]
            if spec.lengths_from is not None
            else []
        )
        self._lengths = Stream(spec.seed, "lengths")
        self._conversations = Stream(spec.seed, "conversation")
        self._thinking = Stream(spec.seed, "think")
        self._num_arrived = self._num_followed = 0

    @property
    def counts(self) -> WorkloadCounts:
        """Requests offered in the last pass over the arrivals, and since."""
        num = self._num_arrived + self._num_followed
        return WorkloadCounts(num_rows=num, num_requests=num)

    def arrivals(self) -> Iterator[TraceRequest]:
        """First turns (in a closed loop, the users' first)."""
        self._num_arrived = self._num_followed = 0
        return self._first_turns()

    def _first_turns(self) -> Iterator[TraceRequest]:
        for conversation, arrival_ns in enumerate(self._arrival_times()):
            self._num_arrived = max(self._num_arrived, conversation + 1)
            yield self._turn(conversation, 0, arrival_ns)

    def _arrival_times(self) -> Iterator[int]:
        spec = self._spec
        if spec.arrivals is None:
            return iter([0] * min(spec.concurrency, spec.num_conversations or 0))
        times = spec.arrivals.times(spec.seed)
        if spec.duration_s is not None:
            end_ns = round(spec.duration_s * 1e9)
            times = takewhile(lambda time_ns: time_ns < end_ns, times)
        return islice(times, spec.num_conversations)

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        """The conversation's next turn; after its last, in a closed loop, the user's next conversation."""
        place = (request.answer_id - FIRST_PRIVATE_ID) // 2
        conversation, turn = divmod(place, self._max_turns)
        if turn + 1 < self._num_turns(conversation):
            upcoming = (conversation, turn + 1)
        elif self._spec.concurrency and conversation + self._spec.concurrency < self._num_conversations:
            upcoming = (conversation + self._spec.concurrency, 0)
        else:
            return ()
        think_ns = round(self._spec.think.draw(self._thinking.at(place)) * 1e9)
        self._num_followed += 1
        return (self._turn(*upcoming, ended_ns + think_ns),)

    def _num_turns(self, conversation: int) -> int:
        if self._max_turns == 1:
            return 1
        drawn = round(self._spec.turns.draw(self._conversations.at(conversation)))
        return min(max(drawn, 1), self._max_turns)

    def _turn(self, conversation: int, turn: int, arrival_ns: int) -> TraceRequest:
        first_id = FIRST_PRIVATE_ID + conversation * self._max_turns * 2
        segments: list[tuple[int, int]] = []
        if self._popularity:
            draw = self._conversations.at(-1 - conversation).uniform()
            group = bisect_right(self._popularity, draw * self._popularity[-1])
            segments.append((min(group, self._spec.num_groups - 1), self._spec.group_tokens))
        num_output = 0
        for each in range(turn + 1):
            num_user, num_output = self._draw_lengths(conversation * self._max_turns + each, each)
            segments.append((first_id + 2 * each, num_user))
            if each < turn:
                segments.append((first_id + 2 * each + 1, num_output))
        session = conversation if self._max_turns > 1 else -1
        return TraceRequest(arrival_ns, tuple(segments), num_output, first_id + 2 * turn + 1, session=session)

    def _draw_lengths(self, place: int, turn: int) -> tuple[int, int]:
        spec, draw = self._spec, self._lengths.at(place)
        if self._pairs:
            num_user, num_output = self._pairs[int(draw.uniform() * len(self._pairs))]
        else:
            user = spec.prompt if turn == 0 or spec.followup is None else spec.followup
            num_user, num_output = round(user.draw(draw)), round(spec.output.draw(draw))
        return min(max(num_user, 1), spec.max_prompt), min(max(num_output, 1), spec.max_output)
