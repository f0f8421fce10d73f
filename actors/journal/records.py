"""What stands in a journal: one record for each message heard, and the check of what was said in answer.

A record is an integer wherever one will do, for most of them come with every step:

    n >= 0     the clock moves on by n ns
    -1         the scheduler hears `PlanDue`
    -2         the scheduler hears the oldest message of the allocator that it has not heard
    -3         the allocator hears the oldest message of the scheduler that it has not heard
    -4         the scheduler hears `Drain`
    -5         the allocator hears `ResetPrefixCache`
    n <= -64   the check of the answers to the message before; without one there were none

and a short array, its first element the tag, for the rest. So a message between the two cores is never stored: it is
made again.
"""

from __future__ import annotations

import msgspec

from ...messages.ids import Epoch, RequestId, StepId
from ...messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks
from ...messages.sampling import SamplingParams
from ...messages.step import PlanStep

PLAN_DUE = -1
SCHEDULER_TAKES = -2
ALLOCATOR_TAKES = -3
DRAIN = -4
RESET_PREFIX_CACHE = -5

FIRST_CHECK = -64
_CHECK_BITS = (1 << 30) - 1

MAX_UNHEARD = 4096
"""Messages under way from one core to the other that recorder and replay remember; older ones are forgotten."""


def encode_check(crc: int) -> int:
    """Return the record that holds 30 bits of a running checksum."""
    return FIRST_CHECK - (crc & _CHECK_BITS)


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    pass


class Submitted(_Record, frozen=True, tag=1):
    """The scheduler hears `SubmitRequest`.

    Attributes:
        tokens: of prompt and outputs together: int32 as they are, or the marks of `TokenDisguise`.
        params: without tokens, only what the scheduler looks at.
        age_ns: clock minus arrival.
        timeout_ns: deadline minus arrival; 0 if there is no deadline.
        cache_salt: its keyed hash.
    """

    request_id: RequestId
    num_prompt_tokens: int
    num_output_tokens: int
    tokens: bytes
    params: SamplingParams
    age_ns: int
    timeout_ns: int
    priority: int
    cache_salt: str
    fork_of: RequestId
    eos_token_ids: tuple[int, ...]


class SubmittedAgain(Submitted, frozen=True, tag=14):
    """Likewise, of a request that an earlier engine knew, or one like it.

    Attributes:
        is_taken_up_again: as in the message.
        is_stopped: its last token was found to be one that ends it.
        is_quarantined: it was refused because an equal one killed executors.
        num_losses: as in the message.
    """

    is_taken_up_again: bool
    is_stopped: bool
    is_quarantined: bool
    num_losses: int = 0


class Executed(_Record, frozen=True, tag=2):
    """The scheduler hears `StepExecuted` of the oldest step in flight, and passes it on.

    Attributes:
        request_ids: None: those of the `Executed` before.
        token_ids: one for each, disguised unless the journal has tokens.
    """

    request_ids: tuple[RequestId, ...] | None
    token_ids: tuple[int, ...]
    stopped: tuple[RequestId, ...]
    failed: tuple[tuple[RequestId, str], ...]
    execute_ns: int
    nonfinite: tuple[RequestId, ...] = ()


class ExecutedLate(_Record, frozen=True, tag=3):
    """The scheduler hears `StepExecuted` of another epoch or step than it waits for; the tokens are left out."""

    epoch: Epoch
    step_id: StepId
    request_ids: tuple[RequestId, ...]


class Cancelled(_Record, frozen=True, tag=4):
    """The scheduler hears `CancelRequest`."""

    request_id: RequestId


class Stopped(_Record, frozen=True, tag=5):
    """The scheduler hears `StopMatched`."""

    request_id: RequestId


class Lost(_Record, frozen=True, tag=6):
    """The scheduler hears `ExecutorLost`."""

    epoch: Epoch
    why: str
    is_innocent: bool = False
    is_out_of_memory: bool = False


class SchedulerTakes(_Record, frozen=True, tag=7):
    """The scheduler hears a message of the allocator that is not the oldest; `index` counts from the oldest."""

    index: int


class AllocatorTakes(_Record, frozen=True, tag=8):
    """The allocator hears a message of the scheduler that is not the oldest; `index` counts from the oldest."""

    index: int


class SchedulerHears(_Record, frozen=True, tag=9):
    """The scheduler hears what the allocator never said, or said once and is heard again."""

    message: PrefixMatched | BlocksFreed


class AllocatorHears(_Record, frozen=True, tag=10):
    """The allocator hears what the scheduler never said, or said once and is heard again; tokens disguised."""

    message: PlanStep | MatchPrefix | ReleaseMatch | ResetBlocks


class Raised(_Record, frozen=True, tag=11):
    """The core raised while it handled the message before."""

    error: str


class Ended(_Record, frozen=True, tag=12):
    """The last record.

    Attributes:
        why_incomplete: why the journal stops before the engine did; empty if it does not.
    """

    why_incomplete: str


class ExecutedFaulty(_Record, frozen=True, tag=13):
    """The scheduler hears `StepExecuted` of the oldest step in flight, and refuses it.

    Attributes:
        why: what was wrong; all that is kept of it if it cannot be.
        nonfinite: rows that came to no numbers, if that is what was wrong.
    """

    why: str
    nonfinite: tuple[RequestId, ...] = ()


HeardRecord = (
    Submitted
    | SubmittedAgain
    | Executed
    | ExecutedLate
    | ExecutedFaulty
    | Cancelled
    | Stopped
    | Lost
    | SchedulerTakes
    | AllocatorTakes
    | SchedulerHears
    | AllocatorHears
)
Record = int | HeardRecord | Raised | Ended
