"""What the scheduler knows, and the account of seats and blocks."""

from __future__ import annotations

from collections import deque

from ...messages.ids import Epoch, RequestId
from ...messages.kv import MatchPrefix, ReleaseMatch, ResetBlocks
from ...messages.request import RequestEnded
from ...messages.step import PlanStep, StepExecuted
from ...messages.system import ExecutorFailed
from .config import MAX_GROWTH, SchedulerConfig
from .deadlines import Deadlines
from .decoding_rows import DecodingRows
from .numerics_watch import NumericsWatch
from .quarantine import Quarantine
from .sequence import Sequence, State
from .stats import SchedulerStats
from .step_in_flight import StepInFlight
from .step_sizes import StepSizes
from .waiting_queue import WaitingQueue

NOBODY = RequestId(-1)

SchedulerOutbox = PlanStep | MatchPrefix | ReleaseMatch | ResetBlocks | StepExecuted | RequestEnded | ExecutorFailed


class SchedulerState:
    """All state of one scheduler core, which alone owns it; each of this folder's modules is one of its decisions.

    Blocks are counted as a credit, `free + evictable - promised`. What a request needs for the tokens it has is
    promised before its prefix is matched; growth is paid when planned; blocks come back by `BlocksFreed` alone. So the
    credit may be pessimistic but is never over-committed.

    A request that has not ended waits in the queue, is parked beside the sibling it waits for, or has a seat: it is
    matching, or among the prompts, or decoding.
    """

    def __init__(self, config: SchedulerConfig, epoch: Epoch, quarantine: Quarantine) -> None:
        self.config = config
        self.epoch = epoch
        self.faulty_epoch = Epoch(-1)  # whose executor said something that cannot be
        self.block_size = config.block_size
        self.max_len = config.max_sequence_len
        self.num_blocks_plenty = config.num_blocks_plenty
        self.chunk_limit = config.long_prefill_threshold or config.max_num_batched_tokens
        self.next_step_id = 0
        self.last_executed_step_id = -1
        self.now_ns = 0
        self.is_draining = False
        self.out: list[SchedulerOutbox] = []  # what the message being handled makes us send

        self.sequences: dict[RequestId, Sequence] = {}  # every request that has not ended
        self.waiting = WaitingQueue()
        self.num_parked = 0
        self.num_waiting_tokens = 0
        self.matching: dict[RequestId, Sequence] = {}  # `PrefixMatched` is owed; may have ended meanwhile
        self.num_matching = 0  # of them, not ended
        self.prompts: list[Sequence] = []  # by key: ready, or running with more than the newest token to compute
        self.decoding = DecodingRows()
        self.in_flight: deque[StepInFlight] = deque()
        self.deadlines = Deadlines()
        self.expiring_id = NOBODY  # whose deadline is found to have passed, at a message about others
        self.seats_by_priority: dict[int, int] = {}
        self.seat_limit = config.max_num_seqs  # lowered after a loss of the executor, to find who causes it
        self.most_seats = config.max_num_seqs  # lowered for good when so many were too much for the device's memory
        self.bad_seat_limit = 0  # with so many running it was lost; 0: not known
        self.last_sampled_ids: tuple[RequestId, ...] = ()  # in the newest step executed since a loss
        self.trusted_ids: frozenset[RequestId] = frozenset()  # that sampled together since the limit was lowered
        self.quarantine = quarantine
        self.numerics = NumericsWatch()
        self.horizon = 0  # laps known to be pure decode, since the last message

        self.credit = config.num_blocks
        self.backlog = 0  # prompt tokens that the next step can take, of requests matching, ready or partly computed
        self.releases: list[tuple[RequestId, bytes]] = []  # go out with the next plan
        self.num_releases_owed = 0  # sent, `BlocksFreed` not seen

        self.num_steps = 0
        self.step_sizes = StepSizes()
        self.num_preemptions = 0
        self.num_ended = 0
        self.num_completed = 0
        self.num_accepted = 0
        self.num_failed = 0
        self.num_cancelled = 0
        self.num_refused = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.num_dropped_messages = 0
        self.num_executor_losses = 0
        self.num_faulty_results = 0
        self.num_requeued = 0
        self.num_resumed = 0
        self.num_quarantined = 0
        self.num_numerics_losses = 0

    def num_computed(self, sequence: Sequence) -> int:
        """Return how many tokens of a request are computed by steps that were sent."""
        return self.decoding.num_computed(sequence) if sequence.is_decoding else sequence.num_computed

    # -- the waiting queue --------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that hold neither a seat nor blocks."""
        return len(self.waiting) + self.num_parked

    def enqueue(self, sequence: Sequence) -> None:
        """Let a request wait for a seat."""
        sequence.num_queued_tokens = len(sequence.tokens)
        self.num_waiting_tokens += sequence.num_queued_tokens
        self.waiting.push(sequence)

    def park(self, sequence: Sequence, leader: Sequence) -> None:
        """Let a request wait until its sibling's prompt is computed."""
        sequence.state = State.PARKED
        sequence.num_queued_tokens = len(sequence.tokens)
        self.num_waiting_tokens += sequence.num_queued_tokens
        leader.siblings.append(sequence)
        self.num_parked += 1

    def unpark(self, leader: Sequence) -> None:
        """Let the siblings that waited for this sequence's prompt be matched."""
        if leader.siblings:
            for sibling in leader.siblings:
                self.num_parked -= 1
                self.waiting.push(sibling)
            leader.siblings = []

    # -- seats and blocks ---------------------------------------------------------------------------------------------

    @property
    def num_seats(self) -> int:
        """Seats taken."""
        return len(self.decoding.rows) + len(self.prompts) + self.num_matching

    def take_seat(self, sequence: Sequence) -> None:
        """Count a request among those that have a seat."""
        self.seats_by_priority[sequence.priority] = self.seats_by_priority.get(sequence.priority, 0) + 1

    def leave_seat(self, sequence: Sequence) -> None:
        """Give up a seat, and what was promised for it."""
        num_left = self.seats_by_priority[sequence.priority] - 1
        if num_left:
            self.seats_by_priority[sequence.priority] = num_left
        else:
            del self.seats_by_priority[sequence.priority]
        self.set_backlog(sequence, 0)

    @property
    def has_plenty(self) -> bool:
        """Whether rows that decode take more blocks than they need at once."""
        return self.credit > self.num_blocks_plenty

    def set_backlog(self, sequence: Sequence, num_tokens: int) -> None:
        """Note how many tokens a request could compute in the next step beside the newest one."""
        num_tokens = min(num_tokens, self.chunk_limit)
        self.backlog += num_tokens - sequence.num_backlog
        sequence.num_backlog = num_tokens

    @property
    def watermark(self) -> int:
        """Blocks kept back at admission, so that the new request is not preempted again by those that grow."""
        return max(self.config.num_blocks // 100, len(self.decoding.rows) // 2)

    @property
    def is_owed_blocks(self) -> bool:
        """Whether answers under way will change the credit; nobody else is preempted before they are here."""
        return bool(self.releases or self.num_releases_owed or self.matching)

    def release_match(self, sequence: Sequence) -> None:
        """Ask for the blocks that were pinned for a request that does not run."""
        self.num_releases_owed += 1
        self.out.append(ReleaseMatch(self.epoch, sequence.request_id))

    # -- for metrics and tests ----------------------------------------------------------------------------------------

    def stats(self) -> SchedulerStats:
        """Return counts for metrics; changes nothing."""
        return SchedulerStats(
            num_running=self.num_seats,
            num_waiting=self.num_waiting,
            num_steps_in_flight=len(self.in_flight),
            num_blocks=self.config.num_blocks,
            credit=self.credit,
            num_promised_blocks=sum(sequence.num_promised for sequence in self.prompts)
            + sum(sequence.num_promised for sequence in self.matching.values()),
            num_steps=self.num_steps,
            num_preemptions=self.num_preemptions,
            num_ended=self.num_ended,
            num_refused=self.num_refused,
            prompt_tokens=self.num_prompt_tokens,
            generation_tokens=self.num_generation_tokens,
            prefix_cache_queries=self.prefix_cache_queries,
            prefix_cache_hits=self.prefix_cache_hits,
            num_dropped_messages=self.num_dropped_messages,
            num_executor_losses=self.num_executor_losses,
            num_faulty_results=self.num_faulty_results,
            num_requeued=self.num_requeued,
            num_resumed=self.num_resumed,
            num_quarantined=self.num_quarantined,
            num_numerics_losses=self.num_numerics_losses,
            step_sizes=tuple(self.step_sizes.counts),
            step_tokens=self.step_sizes.num_tokens,
            num_completed=self.num_completed,
            num_accepted=self.num_accepted,
            num_failed=self.num_failed,
            num_cancelled=self.num_cancelled,
        )

    def check(self) -> None:
        """Assert that every request is in exactly one place and that counts agree with what they count."""
        self.waiting.check()
        self.decoding.check()
        seated = [*self.decoding.rows, *self.prompts]
        seated.extend(sequence for sequence in self.matching.values() if sequence.state is State.MATCHING)
        assert len(seated) == self.num_seats
        assert len(self.sequences) == len(seated) + len(self.waiting) + self.num_parked
        num_over = self.num_completed + self.num_failed + self.num_cancelled
        assert self.num_accepted == num_over + len(self.sequences)
        by_priority: dict[int, int] = {}
        for sequence in seated:
            by_priority[sequence.priority] = by_priority.get(sequence.priority, 0) + 1
        assert by_priority == self.seats_by_priority
        for sequence in self.decoding.rows:
            num_computed = self.num_computed(sequence)
            assert sequence.state is State.RUNNING
            assert sequence.num_promised == 0
            assert len(sequence.tokens) <= num_computed + 1 <= max(sequence.max_total, sequence.num_prompt + 1)
            assert 0 <= sequence.num_slots - num_computed < self.block_size * MAX_GROWTH
            assert sequence.num_slots - max(sequence.max_total - 1, num_computed) < self.block_size
        assert [sequence.key for sequence in self.prompts] == sorted(sequence.key for sequence in self.prompts)
        for sequence in self.prompts:
            assert sequence.state in {State.READY, State.RUNNING}
            assert not sequence.is_decoding
            assert sequence.num_computed < len(sequence.tokens)
            assert sequence.num_slots + sequence.num_promised * self.block_size >= len(sequence.tokens)
        unseated = [sequence for sequence in self.sequences.values() if sequence.state in {State.WAITING, State.PARKED}]
        assert sum(sequence.num_queued_tokens for sequence in unseated) == self.num_waiting_tokens
        assert sum(sequence.num_backlog for sequence in seated) == self.backlog
        assert 0 <= self.credit <= self.config.num_blocks
        assert len(self.in_flight) <= self.config.pipeline_depth
