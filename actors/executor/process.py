"""An executor in a process of its own: blocking, one thread for steps and one for its beats."""

from __future__ import annotations

import signal
import threading
import time

import msgspec
import structlog

from ...messages.errors import ExecutorLostError, OctavoError
from ...messages.ids import Epoch
from ...messages.processes import ExecutorLoaded, LoadFailed
from ...messages.step import ExecuteStep
from ...messages.system import Beat, ExecutorFailed, ExecutorReady, StartExecutor
from ..runtime.addresses import EDGE, EDGE_INCARNATION, ENGINE, endpoint_of
from ..runtime.logs import configure_logs
from ..runtime.port import Port
from .config import ExecutorProcessSpec
from .rank import RankExecutor

log = structlog.get_logger("octavo.executor")

BEAT_S = 0.25
_FLUSH_MS = 200


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
        self._speaks = False
        self._ready_epoch = spec.epoch
        self._executor = RankExecutor(spec.config, spec.rank)
        self._port = Port(spec.child, spec.incarnation, allowed={ENGINE: (ExecuteStep,), EDGE: (StartExecutor,)})
        self._port.bind(endpoint_of(spec.run_dir, spec.child, spec.incarnation))
        self._port.connect(EDGE, EDGE_INCARNATION, endpoint_of(spec.run_dir, EDGE, EDGE_INCARNATION))
        self._connect_engine(spec.engine)

    def run(self) -> int:
        spec, port = self._spec, self._port
        threading.Thread(target=self._beat, name="octavo-beats", daemon=True).start()
        try:
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
                ),
            )
            port.send(EDGE, ExecutorReady(spec.epoch))
        while True:
            port.wait(1000)
            for _, message in port.receive():
                if isinstance(message, StartExecutor):
                    self._connect_engine(message.engine)
                    self._begin(message.epoch)
                elif isinstance(message, ExecuteStep) and not self._execute(message):
                    self._flush()
                    return 1
            port.events.clear()

    def _execute(self, step: ExecuteStep) -> bool:
        """Compute a step; False if this process is of no use any more."""
        gauge = self._gauge
        if step.epoch < gauge.epoch:
            return True  # of an engine or an executor that is lost
        self._begin(step.epoch)  # the engine may be quicker than the supervisor
        started_ns = time.monotonic_ns()
        num_tokens = sum(step.num_tokens)
        gauge.busy_tokens, gauge.busy_since_ns = num_tokens, started_ns
        try:
            executed = self._executor.execute(step)
        except Exception as error:
            log.exception("step.failed", epoch=step.epoch, step_id=step.step_id)
            self._port.send(EDGE, ExecutorFailed(step.epoch, f"{type(error).__name__}: {error}"))
            if self._spec.config.tensor_parallel_size * self._spec.config.pipeline_parallel_size > 1:
                return False  # the others wait for this rank in a collective
            gauge.epoch = Epoch(gauge.epoch + 1)  # the rest of this epoch's steps are lost
            self._executor.begin_epoch(gauge.epoch)
            return True
        finally:
            gauge.busy_since_ns = 0
        took_ns = time.monotonic_ns() - started_ns
        gauge.num_steps += 1
        if took_ns > gauge.longest[0]:
            gauge.longest = (took_ns, num_tokens)
        if executed is not None:
            self._port.send(self._spec.engine_name, executed)
        return True

    def _begin(self, epoch: Epoch) -> None:
        if epoch > self._gauge.epoch:
            self._executor.begin_epoch(epoch)
            self._gauge.epoch = epoch
        if epoch == self._gauge.epoch != self._ready_epoch and self._speaks:
            self._port.send(EDGE, ExecutorReady(epoch))
        self._ready_epoch = self._gauge.epoch

    def _connect_engine(self, incarnation: int) -> None:
        if incarnation > self._engine:
            self._engine = incarnation
            name = self._spec.engine_name
            self._port.connect(name, incarnation, endpoint_of(self._spec.run_dir, name, incarnation))

    def _flush(self) -> None:
        """Give the last words a moment to leave."""
        deadline = time.monotonic() + 1.0
        while self._port.num_queued(EDGE) and time.monotonic() < deadline:
            self._port.wait(_FLUSH_MS)
            self._port.receive()

    def _beat(self) -> None:
        """Tell the supervisor four times a second that this process lives; by a port of this thread's own."""
        spec, gauge = self._spec, self._gauge
        port = Port(f"beat {spec.child.rpartition(' ')[2]}", spec.incarnation)
        port.connect(EDGE, EDGE_INCARNATION, endpoint_of(spec.run_dir, EDGE, EDGE_INCARNATION))
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
            )
            port.send(EDGE, beat)
            deadline = time.monotonic() + BEAT_S
            while (left_s := deadline - time.monotonic()) > 0:
                port.wait(int(left_s * 1000) + 1)
                port.receive()
                port.events.clear()
