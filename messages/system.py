"""Supervision: who is alive, and what the executor offers."""

from __future__ import annotations

from .base import Message
from .ids import Epoch


class ExecutorReady(Message, frozen=True):
    """Executor -> supervisor: weights are loaded, the cache is empty, steps of this epoch will be executed."""

    epoch: Epoch


class ExecutorLost(Message, frozen=True):
    """Supervisor -> scheduler: the executor of `epoch` died; its KV and its steps in flight are gone.

    Attributes:
        epoch: the next epoch, which the replacement serves.
        why: for logs.
        is_innocent: no request is to be held to be the cause: the executor was stopped from outside, ended with its
            nursery or its host, was not let run, could not load, or computed what are no numbers, which is seen row by
            row.
        is_out_of_memory: what it was to compute at once was too much.
    """

    epoch: Epoch
    why: str = ""
    is_innocent: bool = False
    is_out_of_memory: bool = False


class Drain(Message, frozen=True):
    """Gateway -> scheduler: refuse new requests, finish those that were accepted."""


class ExecutorFailed(Message, frozen=True):
    """Executor -> supervisor: a step raised; everything in flight is lost.

    Attributes:
        epoch: the incarnation that failed.
        why: type and text of the exception.
        is_out_of_memory: it says that the device, or the host, has no memory left.
        is_numerics: no row of a step came to numbers, so what it holds (weights, a device's context) is suspect: it is
            not to go on as it is.
    """

    epoch: Epoch
    why: str
    is_out_of_memory: bool = False
    is_numerics: bool = False


class StartExecutor(Message, frozen=True):
    """Supervisor -> executor: begin (again) as `epoch`, with an empty batch and an empty cache.

    Repeated to an executor whose beats name an older epoch; one that names no newer epoch than the executor's own
    changes nothing.

    Attributes:
        epoch: of the steps to come.
        engine: incarnation of the engine that sends them; 0 where the engine is no process of its own.
    """

    epoch: Epoch
    engine: int = 0


class EngineLost(Message, frozen=True):
    """Supervisor -> ledger: the engine (scheduler and KV allocator) died, and a new one hears what is said from now on.

    Attributes:
        epoch: the next epoch, which the new engine begins with; results of an older one are dropped.
        why: for logs.
        incarnation: of the new engine, which is ready; 0 where the engine is no process of its own.
    """

    epoch: Epoch
    why: str = ""
    incarnation: int = 0


class EngineReady(Message, frozen=True):
    """Engine -> supervisor: this incarnation takes requests."""

    incarnation: int


class Beat(Message, frozen=True):
    """A child process -> supervisor, four times a second, from a thread that no step holds up: alive, and at what.

    Attributes:
        child: its name, such as `executor 0`.
        incarnation: which start of it.
        progress: steps (of an executor) or messages handled so far; it only grows.
        busy_ns: for how long the step in progress has been running; 0 between steps.
        busy_tokens: tokens of that step.
        longest_ns: the longest step that ended since the last beat; 0 if none did.
        longest_tokens: tokens of that step.
        epoch: of the steps that it takes; 0 for other children than executors.
        messages_dropped: `(reason, number)` of those that its ports threw away so far; of executors and nodes.
        num_late_compilations: kernels compiled and graphs captured since an executor was ready.
    """

    child: str
    incarnation: int
    progress: int = 0
    busy_ns: int = 0
    busy_tokens: int = 0
    longest_ns: int = 0
    longest_tokens: int = 0
    epoch: Epoch = Epoch(0)
    messages_dropped: tuple[tuple[str, int], ...] = ()
    num_late_compilations: int = 0


class ProcessExited(Message, frozen=True):
    """Carrier -> supervisor: the process has ended, or could not be started.

    Attributes:
        child, incarnation: which.
        why: how it ended.
        was_refused: the system had no room for another process; the child is no worse for it.
        is_innocent: nothing that it did was the cause: it was never there, or its nursery ended, or its host.
    """

    child: str
    incarnation: int
    why: str
    was_refused: bool = False
    is_innocent: bool = False


class ProcessHalted(Message, frozen=True):
    """Carrier -> supervisor: the system says that a child is stopped (SIGSTOP); said again at each look at which it is.

    Attributes:
        child, incarnation: which.
    """

    child: str
    incarnation: int


class ProcessObserved(Message, frozen=True):
    """Carrier -> supervisor: what a child was at since the look before; of one that is silent, or long at a step.

    Attributes:
        child, incarnation: which.
        ran_ns: for how long it computed.
        hindered_ns: for how long it would have, but was given no processor, or the kernel had it wait (for a disk, for
            memory); or its host was out of reach.
    """

    child: str
    incarnation: int
    ran_ns: int
    hindered_ns: int


class ProcessStarted(Message, frozen=True):
    """Carrier -> supervisor: the process runs; whether it is of any use, it tells itself.

    Attributes:
        child, incarnation: which.
        pid: its process id.
    """

    child: str
    incarnation: int
    pid: int


class Tick(Message, frozen=True):
    """Carrier -> supervisor, ten times a second: time goes by."""


class StopAll(Message, frozen=True):
    """Carrier -> supervisor: end every child; none is started again."""

    grace_ns: int = 5_000_000_000


class StartProcess(Message, frozen=True):
    """Supervisor -> carrier: start a child. No other incarnation of it is alive.

    Attributes:
        child: its name.
        incarnation: which start of it this is, from 1.
        epoch: that executor steps begin with.
        engine: incarnation of the engine at this moment; 0 if the engine is no process of its own.
    """

    child: str
    incarnation: int
    epoch: Epoch
    engine: int = 0


class KillProcess(Message, frozen=True):
    """Supervisor -> carrier: end a child at once (SIGKILL). Answered by its `ProcessExited`."""

    child: str
    incarnation: int
    why: str


class StopProcess(Message, frozen=True):
    """Supervisor -> carrier: ask a child to end (SIGTERM), kill it after `grace_ns`. Answered by `ProcessExited`."""

    child: str
    incarnation: int
    grace_ns: int


class SupervisorGaveUp(Message, frozen=True):
    """Supervisor -> front end: restarts are no repair; nothing is started any more.

    Attributes:
        kind: of the child that failed too often.
        why: its last failure.
    """

    kind: str
    why: str
