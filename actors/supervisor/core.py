"""Who is alive: incarnations, epochs, deadlines and restart budgets."""

from __future__ import annotations

from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.processes import LoadFailed
from ...messages.system import (
    Beat,
    EngineLost,
    EngineReady,
    ExecutorFailed,
    ExecutorLost,
    ExecutorReady,
    KillProcess,
    ProcessExited,
    ProcessHalted,
    ProcessObserved,
    ProcessStarted,
    StartExecutor,
    StartProcess,
    StopAll,
    StopProcess,
    SupervisorGaveUp,
    Tick,
)
from .child import Child
from .config import START_ORDER, TICK_NS, ChildKind
from .config import SupervisorConfig as SupervisorConfig  # noqa: PLC0414, others import it from here
from .restarts import Restarts
from .step_times import StepTimes
from .verdicts import Verdict, judge_silence, judge_step, silence_ns, usual_silence_ns

SupervisorInbox = (
    ExecutorReady
    | ExecutorFailed
    | LoadFailed
    | EngineReady
    | Beat
    | ProcessStarted
    | ProcessHalted
    | ProcessObserved
    | ProcessExited
    | Tick
    | StopAll
)
SupervisorOutbox = (
    StartExecutor | ExecutorLost | EngineLost | StartProcess | KillProcess | StopProcess | SupervisorGaveUp
)

_RESEND_NS = 500_000_000
"""Between two `StartExecutor`s to an executor that still names an older epoch."""

_MAX_INNOCENT_STARTS = 3
"""Losses in a row, with no readiness between, up to which one that was starting is no request's doing."""

_HALT_GAP_NS = 3 * TICK_NS
"""Between two `ProcessHalted`s about the same halt, at most."""


class SupervisorCore:
    """Replaces what died or hangs, under a new incarnation and epoch, until restarts are no repair any more.

    - The ranks of the executor group live and die together: one that dies leaves the others in a collective that never
      ends, so they are killed. A single rank whose step raised begins again as it is, with the weights that it has
      loaded; if it cannot, its process is replaced.
    - An engine that dies is replaced, and the executors begin a new epoch, for whose steps the new engine stands. Once
      it is ready, `EngineLost` has the live requests submitted to it again.
    - An edge is replaced alone; the others keep their clients. A nursery takes its children with it: their exits are
      seen one by one.

    A child counts as lost, and its epoch as ended, from the moment that it is found dead or hung; the replacement
    starts after the exit, so two incarnations never live at once. What an older incarnation or epoch says changes
    nothing. Silence is no death by itself: a child that is not let run is given longer, and if that is of no avail, no
    request is held to be the cause.

    Source: Erlang/OTP design principles, supervisor behaviour (`one_for_all`, `one_for_one`, intensity and period).
    """

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._epoch = Epoch(config.num_before)
        self._is_ready = False
        self._gave_up_because = ""
        self._is_stopping = False
        self._restarts = Restarts(config)
        self._children = {
            child.name: Child(child, config.num_before)
            for kind in START_ORDER
            for child in config.children
            if child.kind == kind
        }
        self._ranks = [child for child in self._children.values() if child.config.kind == "executor"]
        self._engine = next((child for child in self._children.values() if child.config.kind == "engine"), None)
        self._edges_given_up = False
        self._step_times = StepTimes(config.first_step_ns)
        self._executor_told_ns = 0
        self._latest_ns = -1
        self._listens_since_ns = -1  # since when it has without a break
        self._num_late_messages = 0
        self._num_stalls = 0
        self._out: list[Message] = []

    # ---- what others read ----

    @property
    def epoch(self) -> Epoch:
        """Of the steps that the executors take, or will once they are ready."""
        return self._epoch

    @property
    def is_executor_ready(self) -> bool:
        return self._is_ready

    @property
    def is_ready(self) -> bool:
        """Whether a request would be served now."""
        is_engine_ready = self._engine is None or self._engine.state == "ready"
        return self._is_ready and is_engine_ready and not self._gave_up_because and not self._is_stopping

    @property
    def gave_up_because(self) -> str:
        """Empty while restarts are within budget."""
        return self._gave_up_because

    @property
    def num_restarts(self) -> int:
        """Of the executor."""
        return self._restarts.by_kind["executor"]

    @property
    def restarts_by_kind(self) -> dict[ChildKind, int]:
        """Of each kind of child."""
        return self._restarts.by_kind

    @property
    def num_late_messages(self) -> int:
        """Of older incarnations or epochs; they changed nothing."""
        return self._num_late_messages

    @property
    def num_stalls(self) -> int:
        """How often this process was found to have stood still."""
        return self._num_stalls

    @property
    def wake_at_ns(self) -> int:
        """When a child is due to start; a `Tick` then, not later, starts it. -1 if none is."""
        absent = [child.start_at_ns for child in self._children.values() if child.state == "absent"]
        return min((start_at_ns for start_at_ns in absent if start_at_ns >= 0), default=-1)

    def is_starting(self, child: str, incarnation: int) -> bool:
        """Whether this incarnation of a child is the present one, and not ready yet."""
        current = self._current(child, incarnation)
        return current is not None and current.state == "starting"

    def is_suspect(self, child: str, now_ns: int) -> bool:
        """Whether a child may soon count as hung, so that it matters what it is at: see `ProcessObserved`."""
        suspect = self._children[child]
        if not suspect.is_running or suspect.config.kind == "nursery":
            return False
        return suspect.is_long_at_step or 3 * silence_ns(suspect, now_ns) > usual_silence_ns(suspect, self._config)

    @property
    def is_stopped(self) -> bool:
        """Whether `StopAll` is done: no child is left."""
        return self._is_stopping and all(child.state == "absent" for child in self._children.values())

    # ---- what is heard ----

    def handle(self, message: Message, now_ns: int) -> list[Message]:
        """React to news of a child, or of time: a `SupervisorInbox`, answered by `SupervisorOutbox`es."""
        self._out = []
        if self._children:
            self._excuse_stall(now_ns)
        match message:
            case ExecutorReady():
                self._handle_executor_ready(message, now_ns)
            case ExecutorFailed():
                self._handle_executor_failed(message, now_ns)
            case LoadFailed():
                self._handle_load_failed(message)
            case EngineReady():
                self._handle_engine_ready(message, now_ns)
            case Beat():
                self._handle_beat(message, now_ns)
            case ProcessStarted():
                self._handle_started(message, now_ns)
            case ProcessHalted():
                self._handle_halted(message, now_ns)
            case ProcessObserved():
                self._handle_observed(message, now_ns)
            case ProcessExited():
                self._handle_exited(message, now_ns)
            case Tick():
                self._find_hung(now_ns)
            case StopAll():
                self._stop_all(message)
            case _:
                raise AssertionError(message)
        self._start_due(now_ns)
        return self._out

    def _handle_executor_ready(self, message: ExecutorReady, now_ns: int) -> None:
        if message.epoch == self._epoch:
            self._is_ready = True
            for rank in self._ranks:
                self._note_ready(rank, now_ns)
        else:
            self._num_late_messages += 1

    def _handle_executor_failed(self, message: ExecutorFailed, now_ns: int) -> None:
        if message.epoch != self._epoch or self._gave_up_because:
            self._num_late_messages += 1
            return
        if self._is_stopping:
            return
        # One that cannot even begin an epoch needs more than a new epoch; and in a group, the peers of the one that
        # raised wait for it in a collective.
        is_hopeless = not self._is_ready or len(self._ranks) > 1 or message.is_numerics
        self._lose_executor(
            message.why,
            now_ns,
            is_hard=bool(self._ranks) and is_hopeless,
            is_innocent=message.is_numerics,
            is_out_of_memory=message.is_out_of_memory,
        )

    def _handle_load_failed(self, message: LoadFailed) -> None:
        child = self._current(message.child, message.incarnation)
        if child is None or not child.is_running:
            self._num_late_messages += 1
        else:
            child.cannot_load = True  # it ends itself

    def _handle_engine_ready(self, message: EngineReady, now_ns: int) -> None:
        engine = self._engine
        if engine is None or message.incarnation != engine.incarnation or engine.state != "starting":
            self._num_late_messages += 1
            return
        self._note_ready(engine, now_ns)
        if engine.epoch != self._epoch:  # the executor was lost in the meantime, and nobody was there to hear of it
            self._out.append(ExecutorLost(self._epoch, "it was lost while the engine started"))
        if engine.incarnation > 1:
            self._out.append(EngineLost(self._epoch, engine.why, engine.incarnation))

    def _handle_beat(self, beat: Beat, now_ns: int) -> None:
        child = self._current(beat.child, beat.incarnation)
        if child is None or not child.is_running:
            self._num_late_messages += 1
            return
        child.heard_ns = now_ns
        child.ran_ns = child.hindered_ns = 0
        child.progress = beat.progress
        if child.config.kind == "edge":
            self._note_ready(child, now_ns)
        if child.config.kind != "executor":
            return
        self._learn_step_time(child, beat, now_ns)
        busy_ns = beat.busy_ns - child.stalled.since(now_ns - beat.busy_ns)
        limit_ns = self._step_times.limit_ns(beat.busy_tokens, beat.progress)
        child.is_long_at_step = 2 * busy_ns > limit_ns
        hindered_ns = child.hindered.since(now_ns - beat.busy_ns)
        verdict = judge_step(child, busy_ns, hindered_ns, limit_ns, self._config) if child.state == "ready" else None
        if verdict is not None:
            self._condemn(child, verdict, now_ns)
        elif beat.epoch < self._epoch and now_ns - self._executor_told_ns >= _RESEND_NS:
            self._tell_executor(now_ns)

    def _learn_step_time(self, executor: Child, beat: Beat, now_ns: int) -> None:
        """Take note of the step that a beat tells of, as far as it says something of other steps.

        One during which this process stood still does not; of one that was not let run, the rest of its time does.
        """
        since_ns = now_ns - beat.longest_ns
        own_ns = beat.longest_ns - executor.hindered.since(since_ns)
        if own_ns > 0 and not executor.stalled.since(since_ns):
            self._step_times.observe(beat.longest_tokens, own_ns, beat.progress)

    def _handle_started(self, message: ProcessStarted, now_ns: int) -> None:
        child = self._current(message.child, message.incarnation)
        if child is None or not child.is_running:
            self._num_late_messages += 1
        elif child.config.kind == "nursery":
            self._note_ready(child, now_ns)

    def _handle_halted(self, message: ProcessHalted, now_ns: int) -> None:
        child = self._current(message.child, message.incarnation)
        if child is None or not child.is_running:
            self._num_late_messages += 1
            return
        if child.halt_seen_ns < 0 or now_ns - child.halt_seen_ns > _HALT_GAP_NS:
            child.halted_ns = now_ns
        child.halt_seen_ns = now_ns
        if now_ns - child.halted_ns >= self._config.max_halt_ns:
            seconds = (now_ns - child.halted_ns) / 1e9
            self._lose(
                child, f"{child.config.name} hangs: it has been stopped for {seconds:.1f} s", now_ns, is_innocent=True
            )

    def _handle_observed(self, message: ProcessObserved, now_ns: int) -> None:
        child = self._current(message.child, message.incarnation)
        if child is None or not child.is_running:
            self._num_late_messages += 1
            return
        if child.config.kind == "executor":  # what is excused as stalled is so once
            child.hindered.add(min(message.hindered_ns, now_ns - self._listens_since_ns), now_ns)
        # No more than there was of silence: a look may reach back to before it.
        silent_ns = silence_ns(child, now_ns)
        child.ran_ns = min(child.ran_ns + message.ran_ns, silent_ns)
        child.hindered_ns = min(child.hindered_ns + message.hindered_ns, silent_ns)

    def _handle_exited(self, message: ProcessExited, now_ns: int) -> None:
        child = self._current(message.child, message.incarnation)
        if child is None or child.state == "absent":
            self._num_late_messages += 1
            return
        was_running, was_starting = child.is_running, child.state == "starting"
        child.state = "absent"
        if message.was_refused:
            self._restarts.note_refused(child, now_ns)
        elif was_running:
            self._restarts.note_run(child)
        if was_running:
            is_innocent = message.is_innocent or child.cannot_load or (was_starting and self._is_start_innocent(child))
            self._lose(child, f"{child.config.name} {message.why}", now_ns, is_innocent=is_innocent)

    def _is_start_innocent(self, child: Child) -> bool:
        """Whether a child's end before it was ready is held against no request.

        It has computed nothing, as far as is known; but it may have begun a step before anybody heard that it was
        ready. If so many in a row end like that, rather all of them have.
        """
        return self._restarts.num_unready(child) <= _MAX_INNOCENT_STARTS

    def _find_hung(self, now_ns: int) -> None:
        are_all_silent = self._are_all_silent(now_ns)
        for child in self._children.values():
            if child.is_running and child.config.kind != "nursery":  # which has no beats
                verdict = judge_silence(child, now_ns, self._config, are_all_silent=are_all_silent)
                if verdict is not None:
                    self._condemn(child, verdict, now_ns)
        # Alive, told of its epoch, and never ready for it: of no use either.
        is_engine_ready = self._engine is None or self._engine.state == "ready"
        told_ns = now_ns - self._executor_told_ns
        if (
            not self._is_ready
            and is_engine_ready
            and self._ranks
            and all(rank.state == "ready" for rank in self._ranks)
            and told_ns > self._config.max_silence_at_start_ns
        ):
            why = f"the executor did not begin epoch {self._epoch}"
            self._condemn(self._ranks[0], Verdict(why, is_innocent=False, useless_ns=told_ns), now_ns)

    def _are_all_silent(self, now_ns: int) -> bool:
        """Whether several children have fallen silent together: rather a host with no time for anybody."""
        heard_ns = [
            child.heard_ns
            for child in self._children.values()
            if child.state == "ready" and child.config.kind != "nursery"
        ]
        return len(heard_ns) > 1 and now_ns - max(heard_ns) > self._config.max_silence_ns // 2

    def _excuse_stall(self, now_ns: int) -> None:
        """Count no silence against the children while this process did not listen."""
        stalled_ns = now_ns - self._latest_ns if self._latest_ns >= 0 else 0
        self._latest_ns = now_ns
        if stalled_ns > self._config.stall_ns // 2 or self._listens_since_ns < 0:
            self._listens_since_ns = now_ns
            for rank in self._ranks:
                rank.stalled.add(stalled_ns, now_ns)
        if stalled_ns <= TICK_NS + self._config.stall_ns:
            return
        self._num_stalls += 1
        self._executor_told_ns += stalled_ns
        for child in self._children.values():
            child.since_ns += stalled_ns
            if child.ready_ns >= 0:
                child.ready_ns += stalled_ns
            child.ran_ns = child.hindered_ns = 0
            if child.heard_ns >= 0:
                child.heard_ns = now_ns

    def _stop_all(self, message: StopAll) -> None:
        self._is_stopping = True
        self._is_ready = False
        for child in reversed(self._children.values()):
            child.start_at_ns = -1
            if child.is_running:
                child.state = "stopping"
                self._out.append(StopProcess(child.config.name, child.incarnation, message.grace_ns))

    # ---- what follows ----

    def _condemn(self, child: Child, verdict: Verdict, now_ns: int) -> None:
        self._lose(child, verdict.why, now_ns, is_innocent=verdict.is_innocent, useless_ns=verdict.useless_ns)

    def _lose(
        self, child: Child, why: str, now_ns: int, *, is_innocent: bool = False, useless_ns: int | None = None
    ) -> None:
        """A running child is dead, or as good as that; by a verdict, if it is known for how long it was of no use."""
        if self._gave_up_because or self._is_stopping:
            return
        child.why = why
        if child.config.kind == "executor":
            self._lose_executor(why, now_ns, is_hard=True, is_innocent=is_innocent, useless_ns=useless_ns)
            return
        self._end(child, why)
        if child.config.kind == "edge" and self._edges_given_up:
            return
        if not self._restarts.take([child], now_ns, useless_ns):
            self._give_up(child.config.kind, why)
            return
        if child is not self._engine:
            self._schedule([child], now_ns)
            return
        self._is_ready = False
        self._raise_epoch()
        self._schedule([child], now_ns)
        if len(self._ranks) > 1:
            # It may have died between telling one rank of a step and telling the other, and the one waits for ever.
            for rank in self._ranks:
                self._end(rank, why)
            self._schedule(self._ranks, now_ns)

    def _lose_executor(
        self,
        why: str,
        now_ns: int,
        *,
        is_hard: bool,
        is_innocent: bool = False,
        is_out_of_memory: bool = False,
        useless_ns: int | None = None,
    ) -> None:
        self._is_ready = False
        if is_hard:
            for rank in self._ranks:
                self._end(rank, why)
        if not self._restarts.take(self._ranks, now_ns, useless_ns):
            self._give_up("executor", why)
            return
        self._raise_epoch()
        if is_hard:
            self._schedule(self._ranks, now_ns)
        else:
            # The executor hears of its new epoch first: the steps of that epoch come behind.
            self._tell_executor(now_ns)
        self._out.append(ExecutorLost(self._epoch, why, is_innocent, is_out_of_memory))

    def _raise_epoch(self) -> None:
        self._epoch = Epoch(self._epoch + 1)

    def _end(self, child: Child, why: str) -> None:
        """See to it that a child ends, if it has not."""
        if child.is_running:
            child.state = "killed"
            self._out.append(KillProcess(child.config.name, child.incarnation, why))

    def _give_up(self, kind: ChildKind, why: str) -> None:
        if kind == "edge":  # the others go on: each of them serves whoever is connected to it
            self._edges_given_up = True
            self._out.append(SupervisorGaveUp(kind, why))
            return
        self._gave_up_because = why
        self._is_ready = False
        if not self._children:
            return
        for child in self._children.values():
            child.start_at_ns = -1
            if child.config.kind != "edge":  # it tells its clients
                self._end(child, "the supervisor gave up")
        self._out.append(SupervisorGaveUp(kind, why))

    def _note_ready(self, child: Child, now_ns: int) -> None:
        if child.state == "starting":
            child.state = "ready"
            child.heard_ns = child.ready_ns = now_ns
            self._restarts.note_ready(child)

    def _schedule(self, children: list[Child], now_ns: int) -> None:
        """Have children started once they are gone."""
        start_at_ns = now_ns + self._restarts.backoff_ns(children)
        for child in children:
            child.start_at_ns = start_at_ns

    def _start_due(self, now_ns: int) -> None:
        for child in self._children.values():
            if child.state == "absent" and 0 <= child.start_at_ns <= now_ns:
                child.incarnation += 1
                child.state = "starting"
                child.start_at_ns = -1
                child.since_ns = now_ns
                child.heard_ns = child.ready_ns = child.halted_ns = child.halt_seen_ns = -1
                child.progress = child.ran_ns = child.hindered_ns = 0
                child.hindered.clear()
                child.stalled.clear()
                child.is_long_at_step = child.cannot_load = False
                child.epoch = self._epoch
                engine = self._engine.incarnation if self._engine is not None else 0
                self._out.append(StartProcess(child.config.name, child.incarnation, self._epoch, engine))
                if child is self._engine and any(rank.is_running for rank in self._ranks):
                    self._tell_executor(now_ns)

    def _tell_executor(self, now_ns: int) -> None:
        self._executor_told_ns = now_ns
        self._out.append(StartExecutor(self._epoch, self._engine.incarnation if self._engine is not None else 0))

    def _current(self, name: str, incarnation: int) -> Child | None:
        child = self._children.get(name)
        return child if child is not None and child.incarnation == incarnation else None
