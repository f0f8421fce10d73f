"""Decides what runs next: admission, token budget, preemption, ends."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import islice
from operator import attrgetter

from ...messages.errors import (
    ContextLengthExceededError,
    EngineClosedError,
    ExecutorLostError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
)
from ...messages.ids import Epoch, RequestId, StepId
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks
from ...messages.request import CancelRequest, FinishReason, RequestEnded, StopMatched, SubmitRequest
from ...messages.step import PlanDue, PlanStep, StartRequest, StepExecuted
from ...messages.system import Drain, ExecutorLost
from .config import FIRST_EPOCH, SchedulerConfig
from .sequence import Sequence, State
from .stats import SchedulerStats
from .waiting_queue import WaitingQueue

__all__ = ["SchedulerConfig", "SchedulerCore", "SchedulerInbox", "SchedulerOutbox", "SchedulerStats"]

SchedulerInbox = (
    SubmitRequest
    | CancelRequest
    | StopMatched
    | PrefixMatched
    | BlocksFreed
    | StepExecuted
    | ExecutorLost
    | Drain
    | PlanDue
)
SchedulerOutbox = PlanStep | MatchPrefix | ReleaseMatch | ResetBlocks | RequestEnded

_by_key = attrgetter("key")
_MIN_STALE_DEADLINES = 1024


class _StepInFlight:
    """What a step was planned to do, so that its results need no look-up.

    Attributes:
        sampling_ids: requests whose row samples, in the order of the rows.
        sampling: the same requests.
        computing: requests whose row only computes.
        finishing: requests whose last possible token this step samples.
    """

    __slots__ = ("computing", "finishing", "sampling", "sampling_ids", "step_id")

    def __init__(self, step_id: StepId) -> None:
        self.step_id = step_id
        self.sampling_ids: tuple[RequestId, ...] = ()
        self.sampling: list[Sequence] = []
        self.computing: list[Sequence] = []
        self.finishing: list[Sequence] = []


class SchedulerCore:
    """Plans steps under a token budget, spending blocks that it counts and never sees.

    A request has tokens, and a number of them that are computed; every row of a step computes some more, and samples a
    token when it reaches the last known one. There is no prefill or decode phase. With several steps in flight a row
    may be planned before the token it computes is known: the executor takes it from the step before.

    Blocks are counted as a credit, `free + evictable - promised`. What a request needs for the tokens it has is
    promised before its prefix is matched; growth is paid when planned; blocks come back by `BlocksFreed` alone. So the
    credit may be pessimistic but is never over-committed.

    Order is by `Sequence.key`. A request in need of a block takes it from the worst one running, never from a better
    one (then it waits), so the best one always goes on and every request ends.

    Args:
        config: checked by itself.
        epoch: the executor's incarnation to begin with.
    """

    def __init__(self, config: SchedulerConfig, epoch: Epoch = FIRST_EPOCH) -> None:
        self._config = config
        self._epoch = epoch
        self._block_size = config.block_size
        self._max_len = config.max_sequence_len
        self._chunk_limit = config.long_prefill_threshold or config.max_num_batched_tokens
        self._next_step_id = 0
        self._last_executed_step_id = -1
        self._now_ns = 0
        self._is_draining = False
        self._out: list[SchedulerOutbox] = []

        self._sequences: dict[RequestId, Sequence] = {}  # every request that has not ended
        self._waiting = WaitingQueue()
        self._num_parked = 0
        self._num_waiting_tokens = 0
        self._matching: dict[RequestId, Sequence] = {}  # `PrefixMatched` is owed; may have ended meanwhile
        self._num_matching = 0  # of them, not ended
        self._prompts: list[Sequence] = []  # by key: ready, or running with more than the newest token to compute
        self._decoding: list[Sequence] = []  # by key: running with exactly the newest token to compute
        self._decoding_before: list[Sequence] = []  # decoding rows of the last plan, and their ids
        self._decoding_ids: tuple[RequestId, ...] = ()
        self._in_flight: deque[_StepInFlight] = deque()
        self._deadlines: list[tuple[int, RequestId]] = []
        self._seats_by_priority: dict[int, int] = {}

        self._credit = config.num_blocks
        self._backlog = 0  # prompt tokens that the next step can take, of requests matching, ready or partly computed
        self._releases: list[tuple[RequestId, bytes]] = []  # go out with the next plan
        self._num_releases_owed = 0  # sent, `BlocksFreed` not seen
        self._seat_limit = config.max_num_seqs  # lowered after a loss of the executor, to find who causes it

        self._num_steps = 0
        self._num_preemptions = 0
        self._num_ended = 0
        self._num_refused = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._prefix_cache_queries = 0
        self._prefix_cache_hits = 0
        self._num_dropped_messages = 0
        self._num_executor_losses = 0

        self._handlers: dict[type, Callable[..., None]] = {
            SubmitRequest: self._on_submit,
            CancelRequest: self._on_cancel,
            StopMatched: self._on_stop_matched,
            PrefixMatched: self._on_prefix_matched,
            BlocksFreed: self._on_blocks_freed,
            StepExecuted: self._on_step_executed,
            ExecutorLost: self._on_executor_lost,
            Drain: self._on_drain,
            PlanDue: self._on_plan_due,
        }

    def handle(self, message: SchedulerInbox, now_ns: int) -> list[SchedulerOutbox]:
        """Take one message; return what to send, in order. Steps are planned on `PlanDue` alone."""
        out: list[SchedulerOutbox] = []
        self._out = out
        self._now_ns = now_ns
        if self._deadlines and self._deadlines[0][0] <= now_ns:
            self._expire()
        self._handlers[type(message)](message)
        return out

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended; a drain is complete at 0."""
        return len(self._sequences)

    @property
    def next_deadline_ns(self) -> int:
        """When to send `PlanDue` at the latest, so that a deadline is kept though nothing else happens; 0 if never."""
        return self._deadlines[0][0] if self._deadlines else 0

    # -- requests come and go -----------------------------------------------------------------------------------------

    def _on_submit(self, submit: SubmitRequest) -> None:
        if submit.request_id in self._sequences:
            self._num_dropped_messages += 1
            return
        sequence = Sequence(submit, self._max_len, self._config.priority_aging_ns)
        num_tokens = len(sequence.tokens)
        num_waiting = len(self._waiting) + self._num_parked
        if self._is_draining:
            self._refuse(submit, EngineClosedError.code, "the engine is shutting down: send the request elsewhere")
        elif sequence.num_prompt == 0:
            self._refuse(submit, InvalidRequestError.code, "the prompt is empty: it needs at least one token")
        elif sequence.num_prompt >= self._max_len:
            self._refuse(submit, ContextLengthExceededError.code, self._describe_never_fits(sequence.num_prompt))
        elif num_tokens >= sequence.max_total and self._is_complete(sequence):
            self._num_ended += 1
            self._out.append(RequestEnded(submit.request_id, "length", sequence.num_output_tokens))
        elif num_waiting >= self._config.max_num_queued_requests or (
            num_waiting and self._num_waiting_tokens + num_tokens > self._config.max_num_queued_tokens
        ):
            self._refuse(
                submit,
                QueueFullError.code,
                f"{num_waiting} requests with {self._num_waiting_tokens} tokens wait already "
                f"(limits: {self._config.max_num_queued_requests} and {self._config.max_num_queued_tokens}): "
                "try again later",
            )
        else:
            self._sequences[submit.request_id] = sequence
            if submit.deadline_ns:
                self._add_deadline(submit)
            leader = self._sequences.get(submit.fork_of)
            if leader is not None and not self._has_prompt(leader):
                sequence.state = State.PARKED
                leader.siblings.append(sequence)
                self._num_parked += 1
                sequence.num_queued_tokens = num_tokens
                self._num_waiting_tokens += num_tokens
            else:
                self._enqueue(sequence)
            if submit.deadline_ns and submit.deadline_ns <= self._now_ns:
                self._expire()

    @staticmethod
    def _is_complete(sequence: Sequence) -> bool:
        """Whether nothing is left to compute for a request that may produce no more tokens."""
        return len(sequence.tokens) > sequence.num_prompt or sequence.submit.params.prompt_logprobs is None

    def _describe_never_fits(self, num_prompt: int) -> str:
        config = self._config
        return (
            f"the prompt has {num_prompt} tokens, but with room for one output token at most {self._max_len - 1} fit "
            f"(max_model_len={config.max_model_len}; the KV cache holds {config.num_blocks} blocks of "
            f"{config.block_size} = {config.num_blocks * config.block_size} tokens): shorten the prompt"
        )

    def _refuse(self, submit: SubmitRequest, code: str, text: str) -> None:
        self._num_refused += 1
        self._out.append(RequestEnded(submit.request_id, "refused", error_code=code, error=text))

    def _add_deadline(self, submit: SubmitRequest) -> None:
        deadlines = self._deadlines
        if len(deadlines) > 2 * len(self._sequences) + _MIN_STALE_DEADLINES:
            self._deadlines = deadlines = [entry for entry in deadlines if entry[1] in self._sequences]
            heapify(deadlines)
        heappush(deadlines, (submit.deadline_ns, submit.request_id))

    def _on_cancel(self, cancel: CancelRequest) -> None:
        sequence = self._sequences.get(cancel.request_id)
        if sequence is not None:
            self._end(sequence, "abort")

    def _on_stop_matched(self, stop: StopMatched) -> None:
        sequence = self._sequences.get(stop.request_id)
        if sequence is not None:
            self._end(sequence, "stop")

    def _on_drain(self, _: Drain) -> None:
        self._is_draining = True

    def _expire(self) -> None:
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= self._now_ns:
            sequence = self._sequences.get(heappop(deadlines)[1])
            if sequence is not None:
                self._end(sequence, "abort")

    def _end(
        self, sequence: Sequence, reason: FinishReason, *, stop_token_id: int = -1, code: str = "", error: str = ""
    ) -> None:
        """End a request, whatever it is doing; its blocks go back with the next plan."""
        state = sequence.state
        sequence.state = State.ENDED
        del self._sequences[sequence.request_id]
        if state is State.WAITING:
            self._waiting.discard(sequence)
            self._num_waiting_tokens -= sequence.num_queued_tokens
        elif state is State.PARKED:
            self._num_parked -= 1
            self._num_waiting_tokens -= sequence.num_queued_tokens
            leader = self._sequences.get(sequence.fork_of)
            if leader is not None and sequence in leader.siblings:
                leader.siblings.remove(sequence)
        elif state is State.MATCHING:
            # The answer to the match, then to this, will come, and settle the account.
            self._num_matching -= 1
            self._leave_seat(sequence)
            self._send_release_match(sequence)
        elif state is State.READY:
            self._prompts.remove(sequence)
            self._leave_seat(sequence)
            self._credit += sequence.num_promised
            self._send_release_match(sequence)
        else:
            self._stop_running(sequence, forget=reason == "error")
        self._unpark(sequence)
        self._num_ended += 1
        self._out.append(
            RequestEnded(
                request_id=sequence.request_id,
                reason=reason,
                num_output_tokens=sequence.num_output_tokens,
                stop_token_id=stop_token_id,
                num_cached_tokens=sequence.num_cached_tokens,
                error_code=code,
                error=error,
                num_preemptions=sequence.num_preemptions,
                first_scheduled_ns=sequence.first_scheduled_ns,
            )
        )

    # -- the waiting queue --------------------------------------------------------------------------------------------

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.num_queued_tokens = len(sequence.tokens)
        self._num_waiting_tokens += sequence.num_queued_tokens
        self._waiting.push(sequence)

    @staticmethod
    def _has_prompt(sequence: Sequence) -> bool:
        """Whether all prompt tokens are computed by steps that were sent."""
        return sequence.state is State.RUNNING and sequence.num_computed >= sequence.num_prompt

    def _unpark(self, leader: Sequence) -> None:
        """Let the siblings that waited for this sequence's prompt be matched."""
        if leader.siblings:
            for sibling in leader.siblings:
                self._num_parked -= 1
                self._waiting.push(sibling)
            leader.siblings = []

    def _admit(self) -> None:
        """Ask for the cached prefixes of as many waiting requests as the next step could take.

        Not of more: a prefix that is computed meanwhile would be missed.
        """
        config = self._config
        while True:
            sequence = self._waiting.peek()
            if sequence is None or sequence.last_step_id > self._last_executed_step_id:
                return  # nobody, or tokens sampled before its preemption are still under way
            if self._backlog >= config.max_num_batched_tokens and not (
                self._prompts and sequence.key < self._prompts[-1].key
            ):
                return
            num_blocks = -(-len(sequence.tokens) // self._block_size)
            num_seats = self._num_seats
            num_spare = num_blocks + (self._watermark if num_seats else 0)
            if (num_seats >= self._seat_limit or num_spare > self._credit) and not self._make_room(
                sequence, num_spare, needs_seat=num_seats >= self._seat_limit
            ):
                return
            self._waiting.pop()
            self._num_waiting_tokens -= sequence.num_queued_tokens
            self._match(sequence, num_blocks)

    @property
    def _num_seats(self) -> int:
        return len(self._decoding) + len(self._prompts) + self._num_matching

    @property
    def _watermark(self) -> int:
        """Blocks kept back at admission, so that the new request is not preempted again by those that grow."""
        return max(self._config.num_blocks // 100, len(self._decoding) // 2)

    def _match(self, sequence: Sequence, num_blocks: int) -> None:
        leader = self._sequences.get(sequence.fork_of)
        params = sequence.submit.params
        sequence.state = State.MATCHING
        sequence.num_promised = num_blocks
        self._credit -= num_blocks
        self._set_backlog(sequence, len(sequence.tokens))
        self._take_seat(sequence)
        self._num_matching += 1
        self._matching[sequence.request_id] = sequence
        self._out.append(
            MatchPrefix(
                epoch=self._epoch,
                request_id=sequence.request_id,
                token_ids=sequence.tokens.tobytes(),
                cache_salt=sequence.submit.cache_salt,
                fork_of=sequence.fork_of if leader is not None and self._has_prompt(leader) else RequestId(-1),
                # Once there is output, the prompt's log-probabilities have been reported.
                skip_cache=params.prompt_logprobs is not None and len(sequence.tokens) == sequence.num_prompt,
            )
        )

    def _on_prefix_matched(self, matched: PrefixMatched) -> None:
        if matched.epoch != self._epoch:
            self._num_dropped_messages += 1
            return
        sequence = self._matching.pop(matched.request_id)
        if sequence.state is State.ENDED:
            self._credit += sequence.num_promised - matched.num_blocks_taken
            return
        num_cached_blocks = matched.num_cached_tokens // self._block_size
        # Of what was reserved, the pinned blocks nobody held are spent, the missing ones stay promised.
        self._credit += num_cached_blocks - matched.num_blocks_taken
        sequence.num_promised -= num_cached_blocks
        sequence.num_slots = sequence.num_computed = matched.num_cached_tokens
        sequence.state = State.READY
        self._num_matching -= 1
        self._set_backlog(sequence, len(sequence.tokens) - matched.num_cached_tokens)
        insort(self._prompts, sequence, key=_by_key)
        if not sequence.is_matched_before:
            sequence.is_matched_before = True
            sequence.num_cached_tokens = min(matched.num_cached_tokens, sequence.num_prompt)
            self._prefix_cache_queries += len(sequence.tokens)
            self._prefix_cache_hits += matched.num_cached_tokens

    def _on_blocks_freed(self, freed: BlocksFreed) -> None:
        if freed.epoch != self._epoch:
            self._num_dropped_messages += 1
            return
        self._credit += freed.num_blocks
        self._num_releases_owed -= freed.num_released

    def _send_release_match(self, sequence: Sequence) -> None:
        self._num_releases_owed += 1
        self._out.append(ReleaseMatch(self._epoch, sequence.request_id))

    # -- seats and blocks ---------------------------------------------------------------------------------------------

    def _take_seat(self, sequence: Sequence) -> None:
        self._seats_by_priority[sequence.priority] = self._seats_by_priority.get(sequence.priority, 0) + 1

    def _leave_seat(self, sequence: Sequence) -> None:
        num_left = self._seats_by_priority[sequence.priority] - 1
        if num_left:
            self._seats_by_priority[sequence.priority] = num_left
        else:
            del self._seats_by_priority[sequence.priority]
        self._set_backlog(sequence, 0)

    def _set_backlog(self, sequence: Sequence, num_tokens: int) -> None:
        num_tokens = min(num_tokens, self._chunk_limit)
        self._backlog += num_tokens - sequence.num_backlog
        sequence.num_backlog = num_tokens

    @property
    def _is_owed_blocks(self) -> bool:
        """Whether answers under way will change the credit; nobody else is preempted before they are here."""
        return bool(self._releases or self._num_releases_owed or self._matching)

    def _stop_running(self, sequence: Sequence, *, forget: bool = False) -> None:
        """Take a running request out of the batch; its blocks are released with the next plan.

        Args:
            forget: its KV must not be reused.
        """
        if sequence.num_computed >= len(sequence.tokens) or sequence not in self._prompts:
            self._decoding.remove(sequence)
        else:
            self._prompts.remove(sequence)
        self._leave_seat(sequence)
        self._credit += sequence.num_promised
        sequence.num_promised = 0
        token_ids = b""
        if not forget and self._config.enable_prefix_caching:
            token_ids = sequence.tokens[: sequence.num_computed].tobytes()
        self._releases.append((sequence.request_id, token_ids))

    def _preempt(self, sequence: Sequence) -> None:
        """Send a ready or running request back to the queue; it keeps its tokens and loses its blocks."""
        if sequence.state is State.READY:
            self._prompts.remove(sequence)
            self._leave_seat(sequence)
            self._credit += sequence.num_promised
            sequence.num_promised = 0
            self._send_release_match(sequence)
        else:
            self._stop_running(sequence)
            for step in self._in_flight:
                if sequence in step.sampling or sequence in step.computing:
                    sequence.last_step_id = step.step_id
            sequence.num_preemptions += 1
            self._num_preemptions += 1
            self._unpark(sequence)
        sequence.num_computed = sequence.num_slots = 0
        self._enqueue(sequence)

    def _make_room(self, sequence: Sequence, num_spare: int, *, needs_seat: bool) -> bool:
        """Preempt requests of a strictly worse priority for a waiting one.

        Returns:
            Whether it can be matched now; False also while what was preempted is on its way back.
        """
        if not any(priority > sequence.priority for priority in self._seats_by_priority):
            return False
        if self._is_owed_blocks and not needs_seat:
            return False
        holders = sorted([*self._prompts, *self._decoding], key=_by_key)
        victims: list[Sequence] = []
        num_gained = 0
        while holders and (num_spare > self._credit + num_gained or (needs_seat and not victims)):
            victim = holders.pop()
            if victim.key < sequence.key:
                break
            if victim.priority > sequence.priority:
                victims.append(victim)
                num_gained += victim.num_promised + victim.num_slots // self._block_size
        if num_spare > self._credit + num_gained or (needs_seat and not victims):
            return False
        for victim in victims:
            self._preempt(victim)
        return num_spare <= self._credit

    def _can_grow(self, sequence: Sequence) -> bool:
        """Find a block for a decoding request; False if it has to sit this step out."""
        if self._credit > 0:
            return True
        if self._is_owed_blocks:
            return False
        for ready in reversed(self._prompts):
            if ready.state is State.READY:
                self._preempt(ready)
                if self._credit > 0:
                    return True
        if self._is_owed_blocks:
            return False
        victim = self._decoding[-1]
        if self._prompts and self._prompts[-1].key > victim.key:
            victim = self._prompts[-1]
        if victim.key > sequence.key:
            self._preempt(victim)
        return False

    # -- steps --------------------------------------------------------------------------------------------------------

    def _on_plan_due(self, _: PlanDue) -> None:
        while True:
            is_planned = self._has_room and self._plan_step()
            self._admit()
            if not is_planned and not (self._releases and self._has_room):
                return

    @property
    def _has_room(self) -> bool:
        """Whether to plan now. A match is answered long before a step is done: better full than soon."""
        if not self._in_flight:
            return True
        return len(self._in_flight) < self._config.pipeline_depth and not self._matching

    def _plan_step(self) -> bool:
        """Plan one step; False if there is nothing to do or to release."""
        config = self._config
        budget = config.max_num_batched_tokens
        step = _StepInFlight(StepId(self._next_step_id))
        grow: list[tuple[RequestId, int]] = []
        start: list[StartRequest] = []
        computed: list[tuple[RequestId, int]] = []

        sampling = step.sampling
        decoding = self._decoding
        # The one loop over all running requests; what is needed now and then is behind `decode_limit`.
        for sequence in decoding if len(decoding) <= budget else islice(decoding, budget):
            num_computed = sequence.num_computed + 1
            if num_computed > sequence.decode_limit and not self._plan_decode(sequence, num_computed, grow, step):
                continue
            sequence.num_computed = num_computed
            sampling.append(sequence)
        budget -= len(sampling)
        if sampling != self._decoding_before:
            self._decoding_before = sampling.copy()
            self._decoding_ids = tuple([sequence.request_id for sequence in sampling])
        one_ids = self._decoding_ids
        late_one_ids: list[RequestId] = []
        late_ids: list[RequestId] = []
        late_chunks: list[int] = []
        late_sampling: list[Sequence] = []
        is_done = False
        for sequence in self._prompts:
            if budget <= 0:
                break
            if sequence.state is State.READY:
                self._start(sequence, start)
            chunk = min(len(sequence.tokens) - sequence.num_computed, budget, self._chunk_limit)
            budget -= chunk
            num_computed = sequence.num_computed = sequence.num_computed + chunk
            if num_computed > sequence.num_slots:
                num_blocks = -(-(num_computed - sequence.num_slots) // self._block_size)
                sequence.num_promised -= num_blocks
                sequence.num_slots += num_blocks * self._block_size
                grow.append((sequence.request_id, num_blocks))
            computed.append((sequence.request_id, num_computed))
            self._num_prompt_tokens += chunk
            if num_computed < len(sequence.tokens):
                self._set_backlog(sequence, len(sequence.tokens) - num_computed)
                step.computing.append(sequence)
            else:
                is_done = True
                if num_computed >= sequence.max_total - 1:
                    step.finishing.append(sequence)
                (sampling if chunk == 1 else late_sampling).append(sequence)
            if chunk == 1:
                late_one_ids.append(sequence.request_id)
            else:
                late_ids.append(sequence.request_id)
                late_chunks.append(chunk)
        if is_done:
            self._move_to_decoding()
        request_ids = one_ids
        if late_one_ids or late_ids:
            request_ids = (*one_ids, *late_one_ids, *late_ids)
        elif not one_ids and not self._releases:
            return False

        sampling.extend(late_sampling)
        step.sampling_ids = request_ids
        if len(sampling) != len(request_ids):
            step.sampling_ids = tuple([sequence.request_id for sequence in sampling])
        self._next_step_id += 1
        self._num_steps += 1
        self._in_flight.append(step)
        self._num_releases_owed += len(self._releases)
        self._out.append(
            PlanStep(
                epoch=self._epoch,
                step_id=step.step_id,
                request_ids=request_ids,
                num_tokens=(1,) * (len(one_ids) + len(late_one_ids)) + tuple(late_chunks),
                start=tuple(start),
                grow=tuple(grow),
                release=tuple(self._releases),
                computed_prompt_tokens=tuple(computed),
            )
        )
        self._releases = []
        return True

    def _plan_decode(
        self, sequence: Sequence, num_computed: int, grow: list[tuple[RequestId, int]], step: _StepInFlight
    ) -> bool:
        """Do what a decode row needs now and then: a block, or the end; False if it is not in this step."""
        last = sequence.max_total - 1  # computing so many samples the last token, whose KV nobody needs
        if num_computed > last:
            return False
        if num_computed > sequence.num_slots:
            if not self._can_grow(sequence):
                return False
            self._credit -= 1
            sequence.num_slots += self._block_size
            grow.append((sequence.request_id, 1))
        if num_computed == last:
            step.finishing.append(sequence)
        sequence.decode_limit = min(sequence.num_slots, last - 1)
        return True

    def _start(self, sequence: Sequence, start: list[StartRequest]) -> None:
        submit = sequence.submit
        sequence.state = State.RUNNING
        if not sequence.first_scheduled_ns:
            sequence.first_scheduled_ns = self._now_ns
        start.append(
            StartRequest(
                request_id=sequence.request_id,
                token_ids=sequence.tokens.tobytes(),
                num_prompt_tokens=sequence.num_prompt,
                num_computed_tokens=sequence.num_computed,
                params=submit.params,
                eos_token_ids=submit.eos_token_ids,
            )
        )

    def _move_to_decoding(self) -> None:
        """Move requests whose known tokens are all computed to the decoding ones."""
        left = []
        for sequence in self._prompts:
            if sequence.num_computed < len(sequence.tokens):
                left.append(sequence)
                continue
            self._set_backlog(sequence, 0)
            sequence.decode_limit = min(sequence.num_slots, sequence.max_total - 2)
            insort(self._decoding, sequence, key=_by_key)
            self._unpark(sequence)
        self._prompts = left

    def _on_step_executed(self, executed: StepExecuted) -> None:
        if executed.epoch != self._epoch or not self._in_flight or self._in_flight[0].step_id != executed.step_id:
            self._num_dropped_messages += 1
            return
        step = self._in_flight.popleft()
        self._last_executed_step_id = step.step_id
        sampling = step.sampling
        if executed.request_ids != step.sampling_ids:  # rows failed
            by_id = dict(zip(step.sampling_ids, sampling, strict=True))
            sampling = [by_id[request_id] for request_id in executed.request_ids]
        self._num_generation_tokens += len(sampling)
        for sequence, token_id in zip(sampling, executed.token_ids, strict=True):
            sequence.tokens.append(token_id)
        sequences = self._sequences
        for request_id in executed.stopped:
            stopped = sequences.get(request_id)
            if stopped is not None:
                self._end(stopped, "stop", stop_token_id=stopped.tokens[-1])
        for request_id, error in executed.failed:
            failed = sequences.get(request_id)
            if failed is not None:
                self._end(failed, "error", code=RequestFailedError.code, error=error)
        for finished in step.finishing:
            if finished.state is not State.ENDED:
                self._end(finished, "length")
        if self._seat_limit < self._config.max_num_seqs and sampling:
            self._seat_limit = min(self._seat_limit * 2, self._config.max_num_seqs)

    # -- loss of the executor -----------------------------------------------------------------------------------------

    def _on_executor_lost(self, lost: ExecutorLost) -> None:
        if lost.epoch <= self._epoch:
            self._num_dropped_messages += 1
            return
        self._epoch = lost.epoch
        self._num_executor_losses += 1
        in_flight: dict[RequestId, Sequence] = {}
        for step in self._in_flight:
            for sequence in (*step.sampling, *step.computing):
                if sequence.state is not State.ENDED:
                    in_flight[sequence.request_id] = sequence
        self._in_flight.clear()
        self._last_executed_step_id = self._next_step_id - 1
        self._out.append(ResetBlocks(self._epoch))
        returning = [*self._decoding, *self._prompts]
        returning.extend(sequence for sequence in self._matching.values() if sequence.state is State.MATCHING)
        self._decoding = []
        self._prompts = []
        self._matching = {}
        self._num_matching = 0
        self._releases = []
        self._num_releases_owed = 0
        self._credit = self._config.num_blocks
        for sequence in returning:
            self._leave_seat(sequence)
            sequence.num_promised = sequence.num_computed = sequence.num_slots = 0
            self._enqueue(sequence)
        for sequence in returning:
            if sequence.state is State.WAITING:
                self._unpark(sequence)
        self._blame(list(in_flight.values()), lost.why)

    def _blame(self, suspects: list[Sequence], why: str) -> None:
        """Count a loss against those in flight; end the one that must be its cause.

        Half as many requests may run after each loss, so that whoever causes it is soon alone, and the others gain a
        token, which clears them.
        """
        if not suspects:
            return
        self._seat_limit = max(1, len(suspects) // 2)
        for sequence in suspects:
            if len(sequence.tokens) > sequence.num_tokens_at_loss:
                sequence.num_losses = 0
            sequence.num_losses += 1
            sequence.num_tokens_at_loss = len(sequence.tokens)
        worst = max(suspects, key=attrgetter("num_losses"))
        is_alone = sum(sequence.num_losses == worst.num_losses for sequence in suspects) == 1
        if is_alone and worst.num_losses > self._config.max_executor_losses:
            self._end(
                worst,
                "error",
                code=ExecutorLostError.code,
                error=f"the executor was lost {worst.num_losses} times in a row while computing this request: {why}",
            )

    # -- for metrics and tests ----------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        """Return counts for metrics; changes nothing."""
        return SchedulerStats(
            num_running=self._num_seats,
            num_waiting=len(self._waiting) + self._num_parked,
            num_steps_in_flight=len(self._in_flight),
            num_blocks=self._config.num_blocks,
            credit=self._credit,
            num_promised_blocks=sum(sequence.num_promised for sequence in self._prompts)
            + sum(sequence.num_promised for sequence in self._matching.values()),
            num_steps=self._num_steps,
            num_preemptions=self._num_preemptions,
            num_ended=self._num_ended,
            num_refused=self._num_refused,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generation_tokens,
            prefix_cache_queries=self._prefix_cache_queries,
            prefix_cache_hits=self._prefix_cache_hits,
            num_dropped_messages=self._num_dropped_messages,
            num_executor_losses=self._num_executor_losses,
        )

    def check(self) -> None:
        """Assert that every request is in exactly one place and that counts agree with what they count."""
        self._waiting.check()
        seated = [*self._decoding, *self._prompts]
        seated.extend(sequence for sequence in self._matching.values() if sequence.state is State.MATCHING)
        assert len(seated) == self._num_seats
        assert len(self._sequences) == len(seated) + len(self._waiting) + self._num_parked
        by_priority: dict[int, int] = {}
        for sequence in seated:
            by_priority[sequence.priority] = by_priority.get(sequence.priority, 0) + 1
        assert by_priority == self._seats_by_priority
        for group in (self._decoding, self._prompts):
            assert [sequence.key for sequence in group] == sorted(sequence.key for sequence in group)
        for sequence in self._decoding:
            assert sequence.state is State.RUNNING
            assert sequence.num_promised == 0
            assert len(sequence.tokens) <= sequence.num_computed + 1 <= max(sequence.max_total, sequence.num_prompt + 1)
        for sequence in self._prompts:
            assert sequence.state in {State.READY, State.RUNNING}
            assert sequence.num_computed < len(sequence.tokens)
            assert sequence.num_slots + sequence.num_promised * self._block_size >= len(sequence.tokens)
        unseated = [
            sequence for sequence in self._sequences.values() if sequence.state in {State.WAITING, State.PARKED}
        ]
        assert sum(sequence.num_queued_tokens for sequence in unseated) == self._num_waiting_tokens
        assert sum(sequence.num_backlog for sequence in seated) == self._backlog
        assert 0 <= self._credit <= self._config.num_blocks
        assert len(self._in_flight) <= self._config.pipeline_depth
