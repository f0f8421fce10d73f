"""An executor in a process of its own: blocking, one thread for steps and one for its beats."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections import deque

import msgspec
import psutil
import structlog

from ...messages.base import Message
from ...messages.errors import ExecutorLostError, OctavoError
from ...messages.ids import Epoch
from ...messages.nodes import Listening, MeetAt
from ...messages.processes import ExecutorLoaded, LoadFailed, PeerStarted
from ...messages.step import ExecuteStep, StepExecuted
from ...messages.system import Beat, ExecutorFailed, ExecutorReady, StartExecutor
from ..runtime.addresses import EDGE, ENGINE, as_called_from, endpoint_of, in_brackets, is_everywhere
from ..runtime.endpoints import numeric_host
from ..runtime.logs import configure_logs
from ..runtime.port import Allowed, Port, UnsendableError
from ..runtime.port_record import drops_of
from .config import ExecutorConfig, ExecutorProcessSpec
from .out_of_memory import is_out_of_memory
from .oversized_step import without_logprobs
from .rank import RankExecutor

log = structlog.get_logger("octavo.executor")

BEAT_S = 0.25
_FLUSH_MS = 200
_POLL_S = 20e-6
"""How often a device is asked whether it is done, where a step may still come that it could begin before."""
_MAX_REPEATED = 16
"""Answers kept for an engine that is heard before it is known where it is; more than there are steps in flight."""

_FROM_EDGE = (StartExecutor, PeerStarted, MeetAt)


def run(arguments: bytes) -> int:
    """Be an executor until killed; `arguments` is an `ExecutorProcessSpec` in msgpack."""
    spec = msgspec.msgpack.decode(arguments, type=ExecutorProcessSpec)
    configure_logs(spec.log_format)
    # A terminal's Ctrl-C is for the edge, which lets open streams end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _ExecutorProcess(spec).run()


class _Gauge:
    """What the thread of the steps is at, for the thread of the beats; single assignments, so no lock."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.num_steps = 0
        self.busy_since_ns = 0
        self.busy_tokens = 0
        self.longest = (0, 0)  # nanoseconds and tokens, since the last beat


class _ExecutorProcess:
    def __init__(self, spec: ExecutorProcessSpec) -> None:
        self._spec = spec
        self._gauge = _Gauge(spec.epoch)
        self._engine = 0
        self._engine_is_heard = False
        self._engine_elsewhere: PeerStarted | None = None
        self._speaks = False
        self._ready_epoch = spec.epoch
        self._begun: deque[tuple[int, int]] = deque()  # steps in flight: when each was begun, and its tokens
        self._num_late = 0  # kernels compiled and graphs captured since this process was ready
        self._early: list[Message] = []  # came before this rank knew where to meet the others
        self._answers: deque[StepExecuted] = deque(maxlen=_MAX_REPEATED)
        self._executor: RankExecutor
        self._port = _make_port(spec, spec.child, allowed={ENGINE: (ExecuteStep,), EDGE: _FROM_EDGE})
        endpoint = ""
        if spec.tcp is None:
            self._port.bind(endpoint_of(spec.run_dir, spec.child, spec.incarnation))
        else:
            endpoint = self._port.bind(spec.tcp.endpoint)
        self._meet_at = _free_endpoint(spec.address) if spec.address and spec.rank == 0 else ""
        _connect_edge(spec, self._port)
        if endpoint or self._meet_at:
            self._port.send(EDGE, Listening(spec.child, spec.incarnation, endpoint, self._meet_at))
        if spec.tcp is None:
            self._connect_engine(spec.engine)

    def run(self) -> int:
        spec, port = self._spec, self._port
        threading.Thread(target=self._beat, name="octavo-beats", daemon=True).start()
        try:
            self._executor = RankExecutor(self._met(), spec.rank)
            facts = self._executor.load()
        except Exception as error:
            code, why = (
                (error.code, str(error)) if isinstance(error, OctavoError) else ("", f"{type(error).__name__}: {error}")
            )
            if not code:
                log.exception("executor.cannot_load", child=spec.child)
            port.send(EDGE, LoadFailed(spec.child, spec.incarnation, code or ExecutorLostError.code, why))
            self._flush()
            return 1
        # What is here stays: a full collection would look at all of it, in the middle of some step.
        gc.collect()
        gc.freeze()
        self._executor.begin_epoch(spec.epoch)
        self._speaks = facts.speaks
        if facts.speaks:
            port.send(
                EDGE,
                ExecutorLoaded(
                    spec.child,
                    spec.incarnation,
                    vocab_size=facts.vocab_size,
                    max_model_len=facts.max_model_len,
                    num_blocks=facts.num_blocks,
                    kv_cache_bytes=facts.kv_cache_bytes,
                    dtype=facts.dtype,
                    load_seconds=facts.load_seconds,
                    is_deterministic=facts.is_deterministic,
                ),
            )
            port.send(EDGE, ExecutorReady(spec.epoch))
        inbox = deque(self._early)
        self._early = []
        launched = self._executor.launched
        while True:
            if not inbox and not launched.is_full:
                has_come = port.wait(0 if launched else 1000)
                if has_come or not launched:  # with a step on the device this loop turns every 20 microseconds
                    inbox.extend(self._receive())
            if launched.is_due(has_step=bool(inbox)):
                is_of_use = self._collect()
            elif inbox:
                is_of_use = self._take(inbox.popleft())
            else:
                if launched:
                    time.sleep(_POLL_S)
                continue
            if not is_of_use:
                self._flush()
                return 1

    def _take(self, message: Message) -> bool:
        """React to a message; False if this process is of no use any more."""
        if isinstance(message, StartExecutor):
            if self._spec.tcp is None:
                self._connect_engine(message.engine)
            self._begin(message.epoch)
        elif isinstance(message, PeerStarted):
            self._engine_elsewhere = message
            self._connect_engine_elsewhere()
        elif isinstance(message, ExecuteStep):
            return self._launch(message)
        return True

    def _receive(self) -> list[Message]:
        messages = [message for _, message in self._port.receive()]
        for event in list(self._port.events):
            if event.what == "heard" and event.peer == self._spec.engine_name:
                self._engine_is_heard = True
                self._connect_engine_elsewhere()
        self._port.events.clear()
        return messages

    def _connect_engine_elsewhere(self) -> None:
        """Talk to an engine on another host once it has talked to us: then it knows by which key to know us."""
        if self._engine_is_heard and (engine := self._engine_elsewhere) is not None:
            self._connect_engine(engine.incarnation, engine.endpoint)

    def _met(self) -> ExecutorConfig:
        """The configuration, with the place where the ranks of a group on several hosts meet."""
        config, port = self._spec.config, self._port
        if self._spec.address:
            _use_interface_of(self._spec.address)
        is_met = config.tensor_parallel_size * config.pipeline_parallel_size == 1 or bool(config.init_method)
        meet_at = self._meet_at
        # Until edge 0 hears where this rank is, too: loading leaves no time to talk. The supervisor ends long waits.
        while not ((is_met or meet_at) and port.is_up(EDGE)):
            port.wait(1000)
            for message in self._receive():
                if isinstance(message, MeetAt):
                    meet_at = message.init_method
                elif isinstance(message, StartExecutor | PeerStarted | ExecuteStep):
                    self._early.append(message)
        if is_met:
            return config
        if self._spec.edge_endpoint and self._spec.rank:
            meet_at = as_called_from(meet_at, self._spec.edge_endpoint)
        return msgspec.structs.replace(config, init_method=meet_at)

    def _launch(self, step: ExecuteStep) -> bool:
        """Begin a step; False if this process is of no use any more."""
        gauge = self._gauge
        if step.epoch < gauge.epoch:
            return True  # of an engine or an executor that is lost
        self._begin(step.epoch)  # the engine may be quicker than the supervisor
        self._begun.append((time.monotonic_ns(), sum(step.num_tokens)))
        if len(self._begun) == 1:
            gauge.busy_since_ns, gauge.busy_tokens = self._begun[0]
        try:
            if not self._executor.launch(step):
                self._begun.pop()
        except Exception as error:
            return self._fail(error)
        return True

    def _collect(self) -> bool:
        """Answer the oldest step that was begun; False if this process is of no use any more."""
        gauge = self._gauge
        try:
            executed = self._executor.collect()
        except Exception as error:
            return self._fail(error)
        now_ns = time.monotonic_ns()
        _, num_tokens = self._begun.popleft()
        took_ns = now_ns - gauge.busy_since_ns
        gauge.num_steps += 1
        if took_ns > gauge.longest[0]:
            gauge.longest = (took_ns, num_tokens)
        num_late = self._executor.num_late
        if num_late > self._num_late:
            self._num_late = num_late
            log.warning("executor.compiled", after_ready=num_late, step_ns=took_ns, step_tokens=num_tokens)
        if self._begun:
            gauge.busy_since_ns, gauge.busy_tokens = now_ns, self._begun[0][1]
        else:
            gauge.busy_since_ns = 0
        return executed is None or self._answer(executed)

    def _fail(self, error: Exception) -> bool:
        """A step could not be computed, and with it the rest of its epoch; False if this process is of no use."""
        gauge = self._gauge
        gauge.busy_since_ns = 0
        self._begun.clear()
        log.error("step.failed", epoch=gauge.epoch, exc_info=error)
        why = f"{type(error).__name__}: {error}"
        self._port.send(EDGE, ExecutorFailed(gauge.epoch, why, is_out_of_memory(error)))
        if self._spec.config.tensor_parallel_size * self._spec.config.pipeline_parallel_size > 1:
            return False  # the others wait for this rank in a collective
        gauge.epoch = Epoch(gauge.epoch + 1)  # the rest of this epoch's steps are lost
        self._executor.begin_epoch(gauge.epoch)
        return True

    def _answer(self, executed: StepExecuted) -> bool:
        """Send a step's results; False if they cannot be sent, and the engine would wait for them for ever."""
        name = self._spec.engine_name
        try:
            is_sent = self._port.send(name, executed)
        except UnsendableError as error:
            executed = without_logprobs(executed, f"{error}: ask for fewer log-probabilities")
            is_sent = self._port.send(name, executed)
        self._answers.append(executed)
        return is_sent or bool(self._spec.tcp)  # what other hosts' engines miss they hear again

    def _begin(self, epoch: Epoch) -> None:
        if epoch > self._gauge.epoch:
            self._executor.begin_epoch(epoch)
            self._gauge.epoch = epoch
            self._gauge.busy_since_ns = 0
            self._begun.clear()
        if epoch == self._gauge.epoch != self._ready_epoch and self._speaks:
            self._port.send(EDGE, ExecutorReady(epoch))
        self._ready_epoch = self._gauge.epoch

    def _connect_engine(self, incarnation: int, endpoint: str = "") -> None:
        if incarnation <= self._engine:
            return
        spec = self._spec
        self._engine = incarnation
        name = spec.engine_name
        if not endpoint:
            self._port.connect(name, incarnation, endpoint_of(spec.run_dir, name, incarnation))
            return
        endpoint = as_called_from(endpoint, spec.edge_endpoint)
        self._port.connect(name, incarnation, endpoint, server_key=spec.edge_key.encode())
        for executed in self._answers:  # to steps of this engine that were quicker than the news of where it is
            if executed.epoch == self._gauge.epoch:
                self._port.send(name, executed)

    def _flush(self) -> None:
        """Give the last words a moment to leave."""
        deadline = time.monotonic() + 1.0
        while self._port.num_queued(EDGE) and time.monotonic() < deadline:
            self._port.wait(_FLUSH_MS)
            self._port.receive()

    def _beat(self) -> None:
        """Tell the supervisor four times a second that this process lives; by a port of this thread's own."""
        spec, gauge = self._spec, self._gauge
        port = _make_port(spec, f"beat {spec.child.rpartition(' ')[2]}", allowed={})
        _connect_edge(spec, port)
        while True:
            (longest_ns, longest_tokens), gauge.longest = gauge.longest, (0, 0)
            since_ns = gauge.busy_since_ns
            beat = Beat(
                spec.child,
                spec.incarnation,
                progress=gauge.num_steps,
                busy_ns=time.monotonic_ns() - since_ns if since_ns else 0,
                busy_tokens=gauge.busy_tokens,
                longest_ns=longest_ns,
                longest_tokens=longest_tokens,
                epoch=gauge.epoch,
                messages_dropped=drops_of(self._port.counters, port.counters),
                num_late_compilations=self._num_late,
            )
            port.send(EDGE, beat)
            deadline = time.monotonic() + BEAT_S
            while (left_s := deadline - time.monotonic()) > 0:
                port.wait(int(left_s * 1000) + 1)
                port.receive()
                port.events.clear()


def _make_port(spec: ExecutorProcessSpec, name: str, allowed: Allowed) -> Port:
    if spec.tcp is None:
        return Port(name, spec.incarnation, allowed=allowed)
    keys = spec.tcp.read_keys()
    return Port(name, spec.incarnation, keys=keys, allowed=allowed, allow_plain_loopback=keys is None)


def _connect_edge(spec: ExecutorProcessSpec, port: Port) -> None:
    endpoint = spec.edge_endpoint or endpoint_of(spec.run_dir, EDGE, spec.edge_incarnation)
    port.connect(EDGE, spec.edge_incarnation, endpoint, server_key=spec.edge_key.encode())


def _free_endpoint(address: str) -> str:
    """A TCP port of this host that is free now, as an endpoint."""
    host = numeric_host("0.0.0.0" if address == "*" else address)  # noqa: S104  # as the user asked
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return f"tcp://{in_brackets(host)}:{probe.getsockname()[1]}"


def _use_interface_of(address: str) -> None:
    """Have tensors take the interface that messages take, unless the user chose one."""
    if is_everywhere(address):
        return
    host = numeric_host(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == host for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
