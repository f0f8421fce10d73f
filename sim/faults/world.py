"""One run of a scenario: the production actors in their processes, their clients, and what goes wrong."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

import msgspec

from ...actors.detokenizer.core import DetokenizerCore
from ...actors.kv_allocator.core import AllocatorConfig, KVAllocatorCore
from ...actors.runtime.routes import Address
from ...actors.scheduler.core import SchedulerCore
from ...actors.supervisor.core import SupervisorConfig, SupervisorCore
from ...actors.tokenizer.core import TokenizerConfig, TokenizerCore
from ...messages.base import Message
from ...messages.ids import Epoch, RequestId
from ...messages.kv import BlocksFreed, PrefixMatched, ResetPrefixCache
from ...messages.request import CancelRequest, RequestEnded, SubmitPrompt, SubmitRequest
from ...messages.step import PlanDue, PlanStep, StepExecuted
from ...messages.system import Drain, ExecutorFailed, ExecutorLost, ExecutorReady, StartExecutor
from ..agenda import Agenda
from .clients import FrontEndModel, Stream
from .device import Device
from .executor_model import ExecutorModel
from .network import ADDRESSES, Link, Process, VirtualClock
from .oracle import Oracle
from .scenario import HEALED_NS, MS, Fault, Scenario, Topology, stream
from .trace import RunHash, describe_event
from .violation import Violation, as_violation
from .vocabulary import Vocabulary

TICK_NS = 250 * MS
"""How often deadlines are looked at while nothing else happens, as in the engine."""

REPEAT_NS = 2 * MS
"""When a supervisor tells again of a loss, under a transport that duplicates."""

MAX_EVENTS = 60_000
MAX_NS = 300_000 * MS
"""Everything has ended long before this, hangs and clogs included, or never will."""

_PLACES: dict[Topology, dict[Address, str]] = {
    "one": dict.fromkeys(ADDRESSES, "one"),
    "edge+engine": {
        "frontend": "edge",
        "tokenizer": "edge",
        "detokenizer": "edge",
        "scheduler": "engine",
        "kv_allocator": "engine",
        "supervisor": "engine",
        "executor": "device",
    },
    "edge+scheduler+allocator": {
        "frontend": "edge",
        "tokenizer": "edge",
        "detokenizer": "edge",
        "scheduler": "engine",
        "kv_allocator": "blocks",
        "supervisor": "engine",
        "executor": "device",
    },
}


class _InjectedError(Exception):
    """A defect that was put into an actor."""


class RunResult(msgspec.Struct, frozen=True):
    """What became of a scenario.

    Attributes:
        hash: of every message handled: when, by whom, and its ids.
        num_events: entries of the agenda that were run.
        kind, detail: of the violation; empty if all was well.
        events: the last ones, or all, in words; only if asked for.
        waits: who waits for whom; only if the run did not come to its end.
    """

    hash: str
    num_events: int
    kind: str = ""
    detail: str = ""
    events: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()


class World:
    """Everything of one run.

    Args:
        scenario: what happens.
        max_recorded: how many of the last events to keep for a report.
    """

    def __init__(self, scenario: Scenario, max_recorded: int = 0) -> None:
        self.scenario = scenario
        config = scenario.scheduler
        self._agenda = Agenda()
        self._clock = VirtualClock(self._agenda)
        self._violation: Violation | None = None
        self._is_broken = False
        self._hash = RunHash()
        self._recorded: deque[tuple[int, Address, Message]] = deque(maxlen=max_recorded)
        self._records = max_recorded > 0

        self._vocabulary = Vocabulary(scenario.vocab)
        self._oracles: dict[RequestId, Oracle] = {}
        self._scheduler = SchedulerCore(config)
        self._allocator = KVAllocatorCore(
            AllocatorConfig(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
            )
        )
        self._supervisor_config = SupervisorConfig(max_restarts=scenario.max_restarts)
        self._supervisor = SupervisorCore(self._supervisor_config)
        self._tokenizer = TokenizerCore(
            TokenizerConfig(vocab_size=scenario.vocab, max_model_len=config.max_model_len), self._vocabulary
        )
        self._detokenizer = DetokenizerCore(self._vocabulary)

        self._num_poisons = sum(client.params.n for client in scenario.clients if client.is_poison)
        self._loses_executors = any(fault.kind in {"crash", "hang"} for fault in scenario.faults)

        # What the run has shown so far.
        self._checks_each_message = scenario.checks_each_message
        self._ended: dict[RequestId, RequestEnded] = {}  # as the scheduler said
        self._submitted: dict[RequestId, None] = {}
        self._next_step_id = 0
        self._num_to_allocator = 0  # messages between scheduler and allocator that are under way
        self._num_to_scheduler = 0
        self._num_losses = 0
        self._epoch_heard = Epoch(0)  # by the scheduler
        self._held_back: list[StepExecuted] = []
        self._has_drained = False
        self._num_row_failures = 0
        self._cancelled: dict[RequestId, None] = {}  # as the scheduler heard
        self._epoch_started = Epoch(0)
        self._restarts_ns: list[int] = []
        self._defective: Address | None = None  # the actor whose next message finds a defect
        self._has_defect = False
        self._is_defect_told = False
        self._build()

    # -- building -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        scenario, agenda = self.scenario, self._agenda
        places = _PLACES[scenario.topology]
        hops = stream(scenario.seed, "hops")
        delays = stream(scenario.seed, "delays")
        processes = {
            name: Process(agenda, self._clock, hops, hop_ns=scenario.hop_ns, on_failure=self._on_failure)
            for name in dict.fromkeys(places.values())
        }
        self._front_end = FrontEndModel(
            agenda,
            self._clock,
            self._oracles,
            self._vocabulary,
            partial(processes[places["frontend"]].runtime.send, "frontend"),
            self._may_end_so,
            scenario.scheduler.max_sequence_len - 1,
        )
        handlers: dict[Address, Callable[[Message, int], Iterable[Message]]] = {
            "frontend": self._front_end.handle,
            "tokenizer": self._handle_tokenizer,
            "scheduler": self._handle_scheduler,
            "kv_allocator": self._handle_allocator,
            "detokenizer": self._detokenizer.handle,  # type: ignore[dict-item]  # hears what its routes say
            "supervisor": self._handle_supervisor,
        }
        for address, handler in handlers.items():
            after = PlanDue() if address == "scheduler" else None
            processes[places[address]].add(address, self._watch(address, handler), after)
        self._links: dict[tuple[str, str], Link] = {}
        home = processes[places["executor"]]
        if scenario.topology == "one":
            send: Callable[[Message], None] = partial(home.runtime.send_from_thread, "executor")
        else:
            send = partial(home.runtime.send, "executor")
        self._device = Device(
            agenda,
            stream(scenario.seed, "device"),
            self._make_model,
            send=send,
            send_late=self._send_late,
            step_ns=scenario.step_ns,
            step_token_ns=scenario.step_token_ns,
            load_ns=scenario.load_ns,
            notice_ns=scenario.notice_ns,
        )
        posts: dict[Address, Callable[[Message], None]] = {
            address: processes[places[address]].mailboxes[address].post for address in handlers
        }
        posts["executor"] = self._device.post
        for name, process in processes.items():
            for address in ADDRESSES:
                place = places[address]
                if place != name or address == "executor":
                    link = self._links.get((name, place))
                    if link is None:
                        link = self._links[name, place] = Link(
                            agenda,
                            delays,
                            max_delay_ns=scenario.link_ns,
                            duplicate_rate=scenario.duplicate_rate,
                            encodes=scenario.encodes and place != name,
                        )
                    process.link(address, link, posts[address])
            process.runtime.connect()
        self._processes = processes
        self._scheduler_post = posts["scheduler"]
        self._scheduler_mailbox = processes[places["scheduler"]].mailboxes["scheduler"]

    def _make_model(self, epoch: Epoch) -> ExecutorModel:
        config = self.scenario.scheduler
        return ExecutorModel(
            epoch,
            self._oracles,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_sequence_len=config.max_sequence_len,
        )

    def _send_late(self, message: Message) -> None:
        """What an executor says that was given up: its link to the edge was cut, the engine hears it, later."""
        places = _PLACES[self.scenario.topology]
        home, engine = places["executor"], places["scheduler"]
        process = self._processes[home]
        if not isinstance(message, StepExecuted):
            process.runtime.send("executor", message)
        elif message.epoch >= self._epoch_heard:
            self._held_back.append(message)
        elif home == engine:
            process.loop.call_soon_threadsafe(self._scheduler_post, message)
        else:
            self._links[home, engine].send("scheduler", self._scheduler_post, message)

    # -- watching -----------------------------------------------------------------------------------------------------

    def _watch(
        self, address: Address, handler: Callable[[Message, int], Iterable[Message]]
    ) -> Callable[[Message, int], Iterable[Message]]:
        note = self._hash.noter(ADDRESSES.index(address), self._agenda)
        if not self._records:

            def handle(message: Message, now_ns: int) -> Iterable[Message]:
                note(message)
                if self._defective is not None:
                    self._meet_defect(address)
                return handler(message, now_ns)

            return handle
        recorded, agenda = self._recorded, self._agenda

        def record(message: Message, now_ns: int) -> Iterable[Message]:
            note(message)
            recorded.append((agenda.now_ns, address, message))
            if self._defective is not None:
                self._meet_defect(address)
            return handler(message, now_ns)

        return record

    def _meet_defect(self, address: Address) -> None:
        if address == self._defective:
            self._defective = None
            self._has_defect = True
            raise _InjectedError(f"a defect of the {address}")

    def _handle_tokenizer(self, message: Message, now_ns: int) -> Iterable[Message]:
        if isinstance(message, CancelRequest):
            return (message,)
        assert isinstance(message, SubmitPrompt), message
        answers = self._tokenizer.handle(message, now_ns)
        config = self.scenario.scheduler
        for answer in answers:
            if isinstance(answer, SubmitRequest):
                request_id = answer.request_id
                client = self._front_end.streams[request_id].client
                self._oracles[request_id] = Oracle(
                    answer, config.max_sequence_len, self.scenario.vocab, is_poison=client.is_poison
                )
        return answers

    def _handle_scheduler(self, message: Message, now_ns: int) -> Iterable[Message]:
        kind = type(message)
        if isinstance(message, SubmitRequest):
            self._submitted[message.request_id] = None
            if message.request_id in self._cancelled:
                raise Violation("a cancel overtakes the request that it cancels", f"request {message.request_id}")
        elif isinstance(message, ExecutorLost):
            if message.epoch > self._epoch_heard:
                self._num_losses += 1
                self._epoch_heard = message.epoch
                held_back, self._held_back = self._held_back, []
                for late in held_back:
                    self._send_late(late)
        elif isinstance(message, StepExecuted):
            self._num_row_failures += len(message.failed)
        elif isinstance(message, PrefixMatched | BlocksFreed):
            self._num_to_scheduler -= 1
        answers = self._scheduler.handle(message, now_ns)  # type: ignore[arg-type]  # hears what its routes say
        if isinstance(message, SubmitRequest):
            if self._has_drained and not any(isinstance(answer, RequestEnded) for answer in answers):
                raise Violation("a draining engine accepts a request", f"request {message.request_id}")
            self._check_queue()
        elif isinstance(message, CancelRequest):
            self._cancelled[message.request_id] = None
        elif isinstance(message, Drain):
            self._has_drained = True
        for answer in answers:
            if isinstance(answer, RequestEnded):
                self._note_end(answer)
                continue
            self._num_to_allocator += 1
            if isinstance(answer, PlanStep):
                self._check_plan(answer)
        if isinstance(message, CancelRequest) and message.request_id in self._submitted:
            if message.request_id not in self._ended:
                raise Violation("a cancelled request goes on", f"request {message.request_id}")
        elif kind is StepExecuted:
            self._scheduler.check()
            self._check_credit()
        elif self._checks_each_message:
            self._check_cores()
        return answers

    def _handle_allocator(self, message: Message, now_ns: int) -> Iterable[Message]:
        kind = type(message)
        if kind is not ResetPrefixCache:
            self._num_to_allocator -= 1
        answers = self._allocator.handle(message, now_ns)  # type: ignore[arg-type]  # hears what its routes say
        for answer in answers:
            if isinstance(answer, PrefixMatched | BlocksFreed):
                self._num_to_scheduler += 1
        if kind is PlanStep:
            self._allocator.check()
        elif self._checks_each_message:
            self._check_cores()
        return answers

    def _handle_supervisor(self, message: Message, now_ns: int) -> Iterable[Message]:
        supervisor = self._supervisor
        was_ready = supervisor.is_executor_ready
        answers = supervisor.handle(message, now_ns)
        if isinstance(message, ExecutorReady):
            if supervisor.is_executor_ready and not was_ready and message.epoch != self._epoch_started:
                raise Violation("the executor counts as ready though another epoch's is", f"{message}")
        elif isinstance(message, ExecutorFailed) and message.epoch == self._epoch_started:
            if supervisor.is_executor_ready:
                raise Violation("the executor counts as ready though it failed", f"{message}")
            self._check_restarts(now_ns, any(isinstance(answer, StartExecutor) for answer in answers))
        for answer in answers:
            if isinstance(answer, StartExecutor):
                self._epoch_started = answer.epoch
        if supervisor.gave_up_because and not self._is_broken:
            self._break(supervisor.gave_up_because)
        if self.scenario.duplicate_rate:  # it may not know what the scheduler has heard
            tell = self._processes[_PLACES[self.scenario.topology]["supervisor"]].runtime.send
            for answer in answers:
                if isinstance(answer, ExecutorLost):
                    self._agenda.add(self._agenda.now_ns + REPEAT_NS, 0, partial(tell, "supervisor", answer))
        return answers

    def _check_restarts(self, now_ns: int, is_restarted: bool) -> None:
        """A failed executor is started again if there were fewer restarts lately than the budget."""
        config = self._supervisor_config
        num_lately = sum(now_ns - restart_ns <= config.period_ns for restart_ns in self._restarts_ns)
        if is_restarted != (num_lately < config.max_restarts):
            raise Violation(
                "the supervisor does not keep to its restart budget",
                f"{num_lately} restarts lately of {config.max_restarts}, {is_restarted=}",
            )
        if is_restarted:
            self._restarts_ns.append(now_ns)

    def _break(self, why: str) -> None:
        """What the engine does when it cannot go on."""
        self._is_broken = True
        self._front_end.end_all(why)

    def _on_failure(self, address: Address, error: Exception) -> None:
        if isinstance(error, _InjectedError):
            self._is_defect_told = True
            self._break(str(error))
        else:
            self._violation = self._violation or as_violation(address, error)

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _note_end(self, ended: RequestEnded) -> None:
        if ended.request_id in self._ended:
            raise Violation("a request ends twice", f"{ended}")
        if ended.request_id not in self._submitted:
            raise Violation("a request ends that nobody submitted", f"{ended}")
        self._ended[ended.request_id] = ended

    def _check_plan(self, plan: PlanStep) -> None:
        if plan.step_id != self._next_step_id:
            raise Violation("step ids do not count up by one", f"{plan.step_id}, not {self._next_step_id}")
        self._next_step_id += 1
        for request_id in plan.request_ids:
            if request_id in self._ended:
                raise Violation("an ended request is planned", f"request {request_id}, step {plan.step_id}")

    def _check_queue(self) -> None:
        """The queue is bounded; who comes back to it (preempted, or after a loss) had a seat."""
        config = self.scenario.scheduler
        num_waiting = self._scheduler.stats().num_waiting
        if num_waiting > config.max_num_queued_requests + config.max_num_seqs:
            raise Violation("the queue grows beyond its bound", f"{num_waiting} of {config.max_num_queued_requests}")

    def _check_cores(self) -> None:
        self._scheduler.check()
        self._allocator.check()
        self._check_credit()

    def _check_credit(self) -> None:
        if not self._num_to_allocator and not self._num_to_scheduler:
            scheduler, allocator = self._scheduler.stats(), self._allocator.stats()
            can_be_had = allocator.num_free + allocator.num_cached
            if scheduler.credit + scheduler.num_promised_blocks != can_be_had:
                raise Violation(
                    "the scheduler's credit is not what the allocator has",
                    f"{scheduler.credit} + {scheduler.num_promised_blocks} promised, {can_be_had} free or cached",
                )

    def _may_end_so(self, stream: Stream, ended: RequestEnded, now_ns: int) -> bool:
        """Whether something explains an end that the oracle does not know."""
        config = self.scenario.scheduler
        if ended.reason == "abort":
            return 0 < stream.deadline_ns <= now_ns
        if ended.reason == "refused":
            return self._may_be_refused(stream, ended)
        if ended.error_code == "executor_lost":
            # Held to be the cause of losses: right for a poison, a wrong guess only where losses have several causes.
            if self._num_losses <= config.max_executor_losses:
                return False
            return stream.client.is_poison or self._num_poisons > 1 or self._loses_executors
        return ended.error_code == "request_failed" and self._num_row_failures > 0

    def _may_be_refused(self, stream: Stream, ended: RequestEnded) -> bool:
        config, client = self.scenario.scheduler, stream.client
        if ended.error_code == "engine_closed":
            return self._has_drained
        if ended.error_code == "queue_full":
            num_sequences = len(self._front_end.streams)
            num_tokens = num_sequences * config.max_sequence_len
            return num_sequences > config.max_num_queued_requests or num_tokens > config.max_num_queued_tokens
        max_tokens = client.params.max_tokens or 1
        return ended.error_code == "context_length_exceeded" and (
            stream.num_prompt + max_tokens > config.max_model_len or stream.num_prompt >= config.max_sequence_len
        )

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self) -> RunResult:
        """Run to the end, or to the first violation."""
        agenda = self._agenda
        num_events = 0
        waits: tuple[str, ...] = ()
        try:
            self._begin()
            run_next = agenda.run_next
            while self._violation is None and run_next():
                num_events += 1
                if num_events > MAX_EVENTS or agenda.now_ns > MAX_NS:
                    waits = self._describe_waits()
                    raise Violation("there is no end in sight", f"{num_events} events, {agenda.now_ns} ns")
                if self._is_broken:
                    break
            if self._violation is None:
                waits = self._describe_waits()
                self._check_end()
                waits = ()
        except Violation as violation:
            self._violation = violation
        except Exception as error:
            if "RealWorldError" in type(error).__name__:
                raise
            self._violation = as_violation("simulation", error)
            self._violation.detail += "\n" + traceback.format_exc(limit=-4)
        found = self._violation
        return RunResult(
            self._hash.hexdigest(),
            num_events,
            found.kind if found else "",
            found.detail if found else "",
            tuple(describe_event(*event) for event in self._recorded),
            waits if found else (),
        )

    def _begin(self) -> None:
        agenda, scenario = self._agenda, self.scenario
        # The first start is the runtime's, not the supervisor's.
        self._device.post(StartExecutor(Epoch(0)))
        for number, client in enumerate(scenario.clients):
            agenda.add(client.at_ns, 0, partial(self._front_end.submit, number, client))
        for fault in scenario.faults:
            agenda.add(fault.at_ns, 0, partial(self._inject, fault))
        agenda.add(HEALED_NS, 0, self._device.heal)
        agenda.add(TICK_NS, 0, self._tick)

    def _tick(self) -> None:
        if self._front_end.num_live_with_deadline:
            self._front_end.check_deadlines()
            self._scheduler_mailbox.wake()
        if self._front_end.num_live_with_deadline or self._agenda.now_ns < HEALED_NS:
            self._agenda.add(self._agenda.now_ns + TICK_NS, 0, self._tick)

    def _inject(self, fault: Fault) -> None:
        front_runtime = self._processes[_PLACES[self.scenario.topology]["frontend"]].runtime
        match fault.kind:
            case "crash":
                self._device.crash()
            case "hang":
                self._device.hang(fault.duration_ns)
            case "fail_row":
                self._device.fail_row()
            case "clock_jump":
                self._clock.jumped_ns += fault.duration_ns
            case "clog":
                links = list(self._links.values())
                link = links[int(fault.choice * len(links))]
                link.clogged_until_ns = self._agenda.now_ns + fault.duration_ns
            case "stall":
                processes = list(self._processes.values())
                process = processes[int(fault.choice * len(processes))]
                process.loop.stalled_until_ns = self._agenda.now_ns + fault.duration_ns
            case "reset_cache":
                front_runtime.send("frontend", ResetPrefixCache())
            case "drain":
                front_runtime.send("frontend", Drain())
            case "defect":
                actors = [address for address in ADDRESSES if address != "executor"]
                self._defective = actors[int(fault.choice * len(actors))]

    # -- the end ------------------------------------------------------------------------------------------------------

    def _check_end(self) -> None:
        """Nothing happens any more: everything has ended, and nothing is held."""
        if self._has_defect and not self._is_defect_told:
            raise Violation("an actor's exception is not told to anybody")
        for stream in self._front_end.streams.values():
            if stream.is_live:
                raise Violation("a request never ends", f"request {stream.request_id}")
        if self._num_losses > self._device.num_deaths:
            raise Violation("an executor was replaced that nothing had happened to", f"{self._num_losses} losses")
        if self._is_broken:
            if not self._is_defect_told and self._num_poisons == 1 and not self._loses_executors:
                raise Violation("the request that kills executors was not found", f"{self._num_losses} losses")
            return
        for request_id in self._submitted:
            if request_id not in self._ended:
                raise Violation("an accepted request never ends", f"request {request_id}")
        self._check_cores()
        scheduler, allocator = self._scheduler.stats(), self._allocator.stats()
        left = {
            "requests of the scheduler": self._scheduler.num_requests,
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "steps in flight": scheduler.num_steps_in_flight,
            "blocks missing from the credit": scheduler.num_blocks - scheduler.credit,
            "blocks held": allocator.num_held,
            "rows on the executor": len(self._device.model.rows),
            "streams of the detokenizer": self._detokenizer.num_streams,
            "messages to the allocator": self._num_to_allocator,
            "messages to the scheduler": self._num_to_scheduler,
        }
        for what, number in left.items():
            if number:
                raise Violation(f"something is left when all is done: {what}", str(number))

    def _describe_waits(self) -> tuple[str, ...]:
        """Who waits for whom."""
        lines = []
        for stream in self._front_end.streams.values():
            request_id = stream.request_id
            if stream.is_live and request_id in self._ended:
                lines.append(f"client of {request_id} waits for the detokenizer: {self._ended[request_id]}")
            elif stream.is_live:
                whom = "scheduler" if request_id in self._submitted else "tokenizer"
                lines.append(f"client of {request_id} waits for the {whom}; it has {stream.num_tokens} tokens")
        lines.append(f"scheduler: {self._scheduler.stats()}")
        lines.append(f"allocator: {self._allocator.stats()}")
        lines.append(f"executor: {self._device.describe()}")
        lines.append(f"between scheduler and allocator: {self._num_to_allocator} there, {self._num_to_scheduler} back")
        for process in self._processes.values():
            lines += [f"mailbox of {name}: {len(box)} messages" for name, box in process.mailboxes.items() if len(box)]
        return tuple(lines)


def run_scenario(scenario: Scenario, max_recorded: int = 0) -> RunResult:
    """Run a scenario once."""
    return World(scenario, max_recorded).run()


__all__ = ["RunResult", "World", "run_scenario"]
