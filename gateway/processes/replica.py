"""One replica of a model: an engine process and its executor processes, kept alive by the edge that started them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import structlog

from ... import __version__
from ...actors.engine.process import EngineProcessSpec, EngineSetup
from ...actors.runtime.addresses import EDGE, TcpSettings, endpoint_of, remove_socket, split_endpoint
from ...actors.runtime.clock import MonotonicClock
from ...actors.runtime.processes import ProcessSpec
from ...actors.scheduler.quarantine import Quarantine
from ...actors.supervisor.actor import Supervisor
from ...actors.supervisor.config import ChildConfig, SupervisorConfig
from ...actors.supervisor.lost_steps import LostStepWatch
from ...messages import errors
from ...messages.base import Message
from ...messages.errors import InvalidConfigError, OctavoError
from ...messages.ids import Epoch
from ...messages.nodes import Listening, MeetAt
from ...messages.processes import (
    EdgeShed,
    EngineFailed,
    EngineReport,
    EngineStuck,
    EngineUp,
    ExecutorLoaded,
    LoadFailed,
    PeerStarted,
    SetUpEngine,
)
from ...messages.request import RequestEnded
from ...messages.step import StepExecuted
from ...messages.system import (
    Beat,
    EngineLost,
    EngineReady,
    ExecutorFailed,
    ExecutorLost,
    ExecutorReady,
    StartExecutor,
    StartProcess,
    SupervisorGaveUp,
)
from ..accelerator import Device, resolve_device
from ..config import EngineConfig
from ..engine_setup import allocator_config, executor_process_spec, journal_file, scheduler_config
from ..graph import ModelFacts
from .engine_link import EngineLink, FromEngine
from .shed_edge import take_up_again

if TYPE_CHECKING:
    from ...actors.runtime.asyncio_port import AsyncioPort
    from .nodes import Nodes
    from .other_edges import OtherEdges

log = structlog.get_logger("octavo.replica")

ENGINE_MODULE = "octavo.actors.engine.process"
EXECUTOR_MODULE = "octavo.actors.executor.process"
PRELOAD_MODULE = "octavo.actors.executor.preload"


def preload_module(device: Device) -> str:
    """What is imported before executors are forked; with the C kernels, but for a GPU, which can do without."""
    return EXECUTOR_MODULE if resolve_device(device) == "cuda" else PRELOAD_MODULE


def executor_names(config: EngineConfig, index: int) -> list[str]:
    """The executors of a replica, by rank."""
    num_ranks = config.tensor_parallel_size * config.pipeline_parallel_size
    return [f"executor {index * num_ranks + rank}" for rank in range(num_ranks)]


class Replica:
    """Starts the processes of one replica, and replaces those that die or hang.

    Args:
        index: of the replicas; numbers its executors.
        engine_name: of its engine process.
        config: of the whole engine.
        folder: of the checkpoint.
        carrier: the edge's port; messages of this replica's processes are to be given to `take`.
        run_dir: of the sockets.
        deliver: where steps and ends go that the edge's streams wait for.
        others: edges beside this one, which use this replica as well.
        on_change: called whenever `why_not_ready` may have changed.
        on_give_up: called once when restarts are no repair.
        log_format: of the processes.
        edge_incarnation: of the edge.
        nodes: other hosts, on which some of its executors run; None: all are here.
        tcp: how its engine listens to those hosts.
        quarantine: of requests that this edge saw convicted, at any replica.
        num_before: incarnations and epochs that a supervisor before this one may have used.

    Attributes:
        link: to the engine.
        loaded: what the executors have loaded.
        ready: set once the engine takes requests.
    """

    def __init__(
        self,
        index: int,
        engine_name: str,
        config: EngineConfig,
        folder: str,
        *,
        carrier: AsyncioPort,
        run_dir: str,
        deliver: Callable[[FromEngine], None],
        on_give_up: Callable[[str], None],
        on_change: Callable[[], None] = lambda: None,
        others: OtherEdges | None = None,
        log_format: str,
        edge_incarnation: int,
        nodes: Nodes | None = None,
        tcp: TcpSettings | None = None,
        quarantine: Quarantine | None = None,
        num_before: int = 0,
    ) -> None:
        self.engine_name = engine_name
        self.executor_names = executor_names(config, index)
        self.loaded: asyncio.Future[ExecutorLoaded] = asyncio.get_running_loop().create_future()
        # Of several replicas that fail, the start tells of one.
        self.loaded.add_done_callback(lambda loaded: loaded.cancelled() or loaded.exception())
        self.ready = asyncio.Event()
        self._config = config
        self._folder = folder
        self._carrier = carrier
        self._run_dir = run_dir
        self._on_give_up = on_give_up
        self._on_change = on_change
        self._others = others
        self._log_format = log_format
        self._edge_incarnation = edge_incarnation
        self._nodes = nodes
        self._tcp = tcp
        self._is_elsewhere = nodes is not None and any(map(nodes.hosts, self.executor_names))
        self._elsewhere: dict[str, PeerStarted] = {}  # who listens to other hosts, as of its present incarnation
        self._meet_at = ("", Epoch(-1))  # where the ranks of the group meet that were started for this epoch
        self._facts: ModelFacts | None = None
        self._why_not_loaded = ""  # of the latest executor
        self._mailbox_capacity = 0
        self._incarnations: dict[str, int] = {}
        self._epochs: dict[str, Epoch] = {}  # that each was started for
        self._clock = MonotonicClock()
        self._lost_steps = LostStepWatch()
        self.link = EngineLink(
            self.engine_name, carrier, run_dir, deliver=deliver, on_stuck=self._kill_engine, quarantine=quarantine
        )
        children = [
            ChildConfig(f"nursery {index}" if index else "nursery", "nursery"),
            ChildConfig(self.engine_name, "engine"),
            *(ChildConfig(name, "executor") for name in self.executor_names),
        ]
        max_restarts = config.max_restarts
        if max_restarts is None:
            # Room to find the one of `max_num_seqs` requests that kills its executor: half as many run after each loss.
            max_restarts = 8 + 2 * config.max_num_seqs.bit_length()
        supervisors = SupervisorConfig(
            max_restarts=max_restarts,
            max_restarts_of_others=max(8, max_restarts),
            children=tuple(children),
            num_before=num_before,
        )
        self._supervisor = Supervisor(
            supervisors,
            make_spec=self._make_spec,
            send=self._send,
            modules=(preload_module(config.device), ENGINE_MODULE),
            elsewhere=nodes,
            on_change=self._take_note,
        )

    # ---- life ----

    async def start(self) -> None:
        """Start the processes; `loaded` tells what they have loaded.

        Raises:
            ProcessStartError: no process can be started.
        """
        await self._supervisor.start()

    def assume(self, facts: ModelFacts, mailbox_capacity: int) -> None:
        """What will be loaded is known before the start."""
        self._facts = facts
        self._mailbox_capacity = mailbox_capacity

    def set_up(self, facts: ModelFacts, mailbox_capacity: int) -> None:
        """Let the engine begin; `ready` is set once it has.

        Raises:
            InvalidConfigError: its journal cannot be made.
        """
        self.assume(facts, mailbox_capacity)
        setup = self._setup(journal_file(self._config.journal, self.engine_name))
        self._carrier.send(self.engine_name, SetUpEngine(msgspec.msgpack.encode(setup)))

    def give_up(self, why: str) -> None:
        """Let nobody wait for it any more."""
        if not self.loaded.done():
            self.loaded.set_exception(errors.ExecutorLostError(why))
        self.ready.set()
        self._on_give_up(why)

    async def close(self) -> None:
        """End the processes: what they hold is of no use to anybody."""
        await self._supervisor.stop(grace_s=0.5)

    # ---- what the edge asks ----

    @property
    def has_given_up(self) -> bool:
        """Whether its processes failed too often to be started again."""
        return bool(self._supervisor.core.gave_up_because)

    @property
    def why_not_ready(self) -> str:
        core = self._supervisor.core
        if core.gave_up_because:
            return f"processes failed too often: {self._why_not_loaded or core.gave_up_because}"
        if not core.is_executor_ready:
            why_waiting = self._nodes.why_waiting if self._nodes is not None and self._is_elsewhere else ""
            if self._why_not_loaded:
                return f"the executor could not load: {self._why_not_loaded}"
            return why_waiting or "the executor is starting"
        if not core.is_ready:
            return "the engine is starting"
        return ""

    @property
    def num_late_messages(self) -> int:
        """Of older incarnations of its processes, which their supervisor dropped."""
        return self._supervisor.core.num_late_messages

    @property
    def restarts(self) -> dict[str, int]:
        """By kind of child."""
        return {str(kind): number for kind, number in self._supervisor.core.restarts_by_kind.items()}

    # ---- messages ----

    def take(self, message: Message) -> None:
        """Take a message of one of this replica's processes."""
        if isinstance(message, StepExecuted | RequestEnded | EngineFailed):
            self.link.take(message)
        elif isinstance(message, EngineReport):
            self.link.take(message)
            self._look_for_lost_step(message)
        elif isinstance(message, EdgeShed):
            take_up_again(self.link, message)
        elif isinstance(message, ExecutorLoaded):
            if not self.loaded.done():
                self.loaded.set_result(message)
        elif isinstance(message, LoadFailed):
            log.error("executor.cannot_load", child=message.child, why=message.error)
            self._why_not_loaded = message.error
            self._supervisor.handle(message)
            if not self.loaded.done():
                self.loaded.set_exception(_public_error(message))
        elif isinstance(message, EngineReady):
            self._take_engine_ready(message)
        elif isinstance(message, EngineStuck):
            if message.incarnation == self.link.incarnation:
                self._kill_engine()
        elif isinstance(message, Beat | ExecutorReady | ExecutorFailed):
            if isinstance(message, Beat) and message.child in self.executor_names:
                self._lost_steps.note_beat(message, self._clock.now_ns())
            self._supervisor.handle(message)
        elif isinstance(message, Listening):
            self._handle_listening(message)

    def _take_engine_ready(self, message: EngineReady) -> None:
        core = self._supervisor.core
        if not core.is_starting(self.engine_name, message.incarnation):
            self._supervisor.handle(message)  # late: it has been given up
            return
        self.link.is_up = True
        for name in self.executor_names:
            self._introduce(name)
        if self._others is not None:
            for name, incarnation in self._others.running:  # some may have started since this engine was described
                self.link.send(PeerStarted(name, incarnation))
        self._supervisor.handle(message)
        if self._others is not None:
            self._others.tell(EngineUp(self.engine_name, message.incarnation, core.epoch))

    def _take_note(self) -> None:
        """Whether the replica is ready has changed."""
        if self._supervisor.core.is_ready:
            self._why_not_loaded = ""
            self.ready.set()
        self._on_change()

    # ---- other hosts ----

    def _hosts(self, child: str) -> bool:
        return self._nodes is not None and self._nodes.hosts(child)

    def _introduce(self, executor: str) -> None:
        """Tell the engine where an executor listens, if that is known."""
        if self._hosts(executor):
            if executor in self._elsewhere:
                self.link.send(self._elsewhere[executor])
        elif incarnation := self._incarnations.get(executor):
            self.link.send(PeerStarted(executor, incarnation))

    def _handle_listening(self, message: Listening) -> None:
        """Connect whoever listens to other hosts, and let those who need to know it know."""
        child, incarnation = message.child, message.incarnation
        if incarnation != self._incarnations.get(child):
            return
        if child == self.engine_name:
            self._elsewhere[child] = PeerStarted(child, incarnation, message.endpoint)
            for name in self.executor_names:
                if name in self._elsewhere:
                    self._carrier.send(name, self._elsewhere[child])
            return
        if message.meet_at:
            self._meet_at = (message.meet_at, self._epochs[child])
        if self._nodes is not None and self._nodes.hosts(child):
            try:
                split_endpoint(message.endpoint)
                server_key = self._nodes.key_of(child)
                self._carrier.port.connect(child, incarnation, message.endpoint, server_key=server_key.encode())
            except InvalidConfigError as error:
                log.error("executor.not_reachable", child=child, endpoint=message.endpoint, why=str(error))
                return
            self._elsewhere[child] = PeerStarted(child, incarnation, message.endpoint, server_key)
            if self.engine_name in self._elsewhere:
                self._carrier.send(child, self._elsewhere[self.engine_name])
            self.link.send(self._elsewhere[child])
        for name in self.executor_names if message.meet_at else (child,):
            self._tell_meeting(name)

    def _tell_meeting(self, executor: str) -> None:
        """Tell a rank where to meet the first one, if that one was started for the same epoch and both are known.

        Each rank starts when its last incarnation has ended, and not as often as the others: what they have in common
        is the epoch.
        """
        meet_at, epoch = self._meet_at
        is_there = executor in self._elsewhere or not self._hosts(executor)
        if executor != self.executor_names[0] and is_there and epoch == self._epochs.get(executor):
            self._carrier.send(executor, MeetAt(meet_at))

    def _look_for_lost_step(self, report: EngineReport) -> None:
        is_ready = self._supervisor.core.is_ready
        if self._lost_steps.is_lost(report, is_ready=is_ready, now_ns=self._clock.now_ns()):
            log.error("step.lost", engine=self.engine_name, num_in_flight=report.num_steps_in_flight)
            self._kill_engine()  # the next one plans everything anew

    def _kill_engine(self) -> None:
        if (process := self._supervisor.process(self.engine_name)) is not None:
            process.kill()

    def _send(self, message: Message) -> None:
        """Carry what the supervisor says."""
        if isinstance(message, StartExecutor):
            for name in self.executor_names:
                self._carrier.send(name, message)
        elif isinstance(message, ExecutorLost):
            log.error("executor.lost", epoch=message.epoch, why=message.why, is_innocent=message.is_innocent)
            self.link.send(message)
        elif isinstance(message, EngineLost):
            self.link.resubmit(message.epoch, message.why)
        elif isinstance(message, SupervisorGaveUp):
            if not self.loaded.done():
                self.loaded.set_exception(errors.ExecutorLostError(message.why))
            self.give_up(f"{message.kind} failed too often: {self._why_not_loaded or message.why}")

    # ---- processes ----

    def _make_spec(self, start: StartProcess) -> ProcessSpec:
        """What to start; from here on only this incarnation of the child is talked to."""
        child, incarnation = start.child, start.incarnation
        remove_socket(self._run_dir, child, self._incarnations.get(child, 0))
        self._incarnations[child] = incarnation
        self._epochs[child] = start.epoch
        self._elsewhere.pop(child, None)
        self._on_change()
        if child == self.engine_name:
            self.link.connect(incarnation)
            arguments: msgspec.Struct = self._engine_spec(start)
            target = f"{ENGINE_MODULE}:run"
        else:
            if not self._hosts(child):
                self._carrier.port.connect(child, incarnation, endpoint_of(self._run_dir, child, incarnation))
                self._hear_beats_of(child)
                self._introduce(child)
                self._tell_meeting(child)
            rank = self.executor_names.index(child)
            arguments = executor_process_spec(
                self._config,
                self._folder,
                self._facts or self._loaded_before,
                start,
                rank=rank,
                engine_name=self.engine_name,
                run_dir=self._run_dir,
                log_format=self._log_format,
                edge_incarnation=self._edge_incarnation,
                address=self._tcp.host if self._tcp is not None and self._is_elsewhere else "",
                is_one_host=self._nodes is None,
            )
            target = f"{EXECUTOR_MODULE}:run"
        return ProcessSpec(
            title=child, target=target, arguments=msgspec.msgpack.encode(arguments), incarnation=incarnation
        )

    @property
    def _loaded_before(self) -> ExecutorLoaded | None:
        """What the first executor made of the free memory: the engine counts on it, so the next ones do the same."""
        is_known = self.loaded.done() and not self.loaded.cancelled() and self.loaded.exception() is None
        return self.loaded.result() if is_known else None

    def _hear_beats_of(self, child: str) -> None:
        """The thread of an executor's beats has a name of its own, in which nobody else may speak."""
        name = f"beat {child.rpartition(' ')[2]}"
        self._carrier.port.expect(name, self._incarnations[child])
        self._carrier.port.vouch(name, "")

    def _engine_spec(self, start: StartProcess) -> EngineProcessSpec:
        executors = [
            (name, self._incarnations[name])
            for name in self.executor_names
            if name in self._incarnations and not self._hosts(name)
        ]
        return EngineProcessSpec(
            name=self.engine_name,
            incarnation=start.incarnation,
            epoch=start.epoch,
            run_dir=self._run_dir,
            edges=((EDGE, self._edge_incarnation), *(self._others.running if self._others else ())),
            executors=tuple(executors),
            setup=self._setup(self._journal_if_it_can_be()) if self._facts is not None else None,
            log_format=self._log_format,
            tcp=self._tcp if self._is_elsewhere else None,
            elsewhere=tuple(self._elsewhere[name] for name in self.executor_names if name in self._elsewhere),
        )

    def _journal_if_it_can_be(self) -> str | None:
        """Where an engine records that takes another one's place: whatever has become of the folder, it serves."""
        try:
            return journal_file(self._config.journal, self.engine_name)
        except InvalidConfigError as error:
            log.error("journal.not_made", engine=self.engine_name, why=str(error))
            return None

    def _setup(self, journal: str | None) -> EngineSetup:
        assert self._facts is not None
        config = self._config
        return EngineSetup(
            scheduler=scheduler_config(config, self._facts),
            allocator=allocator_config(config, self._facts),
            mailbox_capacity=self._mailbox_capacity,
            octavo=__version__,
            model=self._facts.name,
            journal=journal,
            journal_prompts=config.journal_prompts,
        )


def _public_error(failed: LoadFailed) -> OctavoError:
    """The public error that a child process met, as if it had been met here."""
    kinds = (errors.ModelNotFoundError, errors.UnsupportedModelError, errors.InvalidConfigError)
    for kind in kinds:
        if kind.code == failed.code:
            return kind(failed.error)
    error = OctavoError(failed.error)
    error.code = failed.code
    return error
