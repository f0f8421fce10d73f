"""Planted bugs of supervisor, runtime and detokenizer; see `mutant_table`."""

from __future__ import annotations

from .mutation import Mutant

_D = "actors/detokenizer/"
_R = "actors/runtime/in_process.py"
_V = "actors/supervisor/core.py"

RUNTIME_MUTANTS: tuple[Mutant, ...] = (
    # -- supervisor ----------------------------------------------------------------------------------------------------
    Mutant(
        "late news of a failure kill the healthy successor",
        _V,
        "if message.epoch != self._epoch or self._gave_up_because:",
        "if self._gave_up_because:",
        "I10, F-08: a zombie's last words are taken for its successor's",
    ),
    Mutant(
        "a restart keeps the epoch",
        _V,
        "self._epoch = Epoch(self._epoch + 1)",
        "self._epoch = Epoch(self._epoch + 0)",
        "F-34: old and new incarnation cannot be told apart",
    ),
    Mutant(
        "an old executor's readiness counts",
        _V,
        "if message.epoch == self._epoch:",
        "if message.epoch <= self._epoch:",
        "I8, sglang#6624: health is green while nobody serves",
    ),
    Mutant(
        "a failed executor still counts as ready",
        _V,
        "self._is_ready = False\n        if is_hard:",
        "self._is_ready = True\n        if is_hard:",
        "I8, vllm#39863: the engine is dead, health says 200",
    ),
    Mutant(
        "one restart more than the budget",
        "actors/supervisor/restart_budget.py",
        "if len(self._counted_until_ns) >= self._max_restarts:",
        "if len(self._counted_until_ns) > self._max_restarts:",
        "F-05, TensorRT-LLM#18663: a crash loop that nobody ends",
    ),
    Mutant(
        "silence is no death",
        "actors/supervisor/verdicts.py",
        "if silent_ns <= limit_ns + min(child.hindered_ns, config.max_hindered_ns):",
        "if silent_ns >= 0:",
        "F-07, sglang#6624: a process that hangs is waited for for ever",
    ),
    Mutant(
        "a stopped process is given the time of a silent one",
        _V,
        "if now_ns - child.halted_ns >= self._config.max_halt_ns:",
        "if now_ns - child.halted_ns < 0:",
        "F-07: SIGSTOP, which the system tells of at once",
    ),
    Mutant(
        "nobody hears of the new engine",
        _V,
        "if engine.incarnation > 1:",
        "if engine.incarnation > 99:",
        "F-21: a new scheduler that is given nothing",
    ),
    Mutant(
        "a new engine is not told of the executor that died meanwhile",
        _V,
        "if engine.epoch != self._epoch:",
        "if engine.epoch < 0:",
        "F-34: steps of an epoch that nobody serves",
    ),
    Mutant(
        "a process that stood still itself takes the others for dead",
        _V,
        "if stalled_ns <= TICK_NS + self._config.stall_ns:",
        "if stalled_ns >= 0:",
        "F-48: mass kills after a pause",
    ),
    Mutant(
        "a step that got lost is waited for for ever",
        "actors/supervisor/lost_steps.py",
        "is_overdue and are_heard and now_ns - self._idle_since_ns > LOST_NS",
        "is_overdue and are_heard and now_ns < self._idle_since_ns",
        "F-26: results that were dropped, and streams that hang",
    ),
    Mutant(
        "a step that nobody wants any more is waited for for ever",
        "actors/engine/report.py",
        "or scheduler.num_waiting or scheduler.num_steps_in_flight",
        "or scheduler.num_waiting",
        "F-26: the results of cancelled requests were dropped, and the pipeline stays full",
    ),
    # -- runtime -------------------------------------------------------------------------------------------------------
    Mutant(
        "a mailbox is not woken again",
        _R,
        "    def _drain(self) -> None:\n        self._is_scheduled = False",
        "    def _drain(self) -> None:\n        self._is_scheduled = True",
        "vllm#51921: the first request after an idle spell is never served",
    ),
    Mutant(
        "a mailbox is emptied from the wrong end",
        _R,
        "handler(inbox.popleft(), now_ns)",
        "handler(inbox.pop(), now_ns)",
        "F-28: messages are reordered within a link",
    ),
    Mutant(
        "nothing is planned once the mailbox is empty",
        _R,
        "elif self._after_batch is not None:",
        "elif self._after_batch is None:",
        "vllm#25890: the engine idles over a full queue",
    ),
    Mutant(
        "receivers are looked up once for a mixed batch",
        _R,
        "if type(message) is not kind:",
        "if kind is None:",
        "F-30 class: a message lands in another actor's mailbox",
    ),
    Mutant(
        "an actor's exception is swallowed",
        _R,
        "            self._on_failure(address, error)",
        "            self._has_failed = True",
        "CVE-2026-114051: an input thread dies, health stays 200; F-13",
    ),
    Mutant(
        "an idle mailbox cannot be woken for a deadline",
        _R,
        "if not self._is_scheduled:",
        "if self._inbox:",
        "F-57: a timeout in the queue is noticed only when something else happens",
        after="def wake(self) -> None:",
    ),
    Mutant(
        "a cancel takes the short way",
        "actors/runtime/routes.py",
        '("frontend", CancelRequest): ("tokenizer",)',
        '("frontend", CancelRequest): ("scheduler",)',
        "vllm#57061: a cancel overtakes the request that it cancels; I7",
    ),
    # -- detokenizer ---------------------------------------------------------------------------------------------------
    Mutant(
        "ended streams are kept",
        _D + "core.py",
        "        del self._streams[stream.request_id]",
        "        self._streams[stream.request_id] = stream",
        "vllm#28726: memory grows until the pod is killed",
    ),
    Mutant(
        "text that waited for a stop string is lost at the end",
        _D + "core.py",
        "        text += stream.flush()",
        '        text += ""',
        "vllm#39757 class: streamed and unstreamed answers differ",
    ),
    Mutant(
        "half a character is lost between two tokens",
        _D + "incremental.py",
        "self._pending = data[consumed:]",
        'self._pending = b""',
        "HI-130: half code points in a stream",
    ),
    Mutant(
        "the beginning of a stop string is sent",
        _D + "stop_strings.py",
        "cut = len(whole) - self.strings.depth[self._state]",
        "cut = len(whole)",
        "a stop string that spans two tokens shows its first half",
    ),
    Mutant(
        "a stop string inside another's beginning is missed",
        _D + "stop_strings.py",
        "state = fail[state]\n            state = tables",
        "state = 0\n            state = tables",
        "HI-065: stop strings that share beginnings",
    ),
)
