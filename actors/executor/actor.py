"""Carries steps to the executor's own thread and its results back to the loop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from ...kernels.thread_binding import release_team
from ...messages.base import Message
from ...messages.ids import Epoch
from ...messages.step import ExecuteStep
from ...messages.system import ExecutorFailed, ExecutorReady, StartExecutor
from .config import ExecutorConfig
from .device import Device
from .gpu.runner import GpuRunner
from .launch_ahead import LaunchAhead
from .out_of_memory import is_out_of_memory
from .runner import StepRunner, load_runner

_STOP = None
_POLL_S = 50e-6
"""How often a device is asked whether it is done, where a step may still come that it could begin before."""


class ExecutorThread:
    """An executor on a thread of its own, beside the event loop; torch releases the GIL while it computes.

    Args:
        config: what to load and how much to hold.
        send: called on the executor's thread with each message it has to say.
    """

    def __init__(self, config: ExecutorConfig, send: Callable[[Message], None]) -> None:
        self._config = config
        self._send = send
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="octavo-executor", daemon=True)
        self._runner: StepRunner | GpuRunner | None = None
        self._epoch = Epoch(0)
        self._busy_since_ns = 0

    def busy_for_ns(self) -> int:
        """How long the oldest step that is running has run, or what came of the last; 0 if none is."""
        since_ns = self._busy_since_ns
        return time.monotonic_ns() - since_ns if since_ns else 0

    @property
    def num_late(self) -> int:
        """See `GpuRunner.num_late`."""
        return 0 if self._runner is None else self._runner.num_late

    def load(self) -> Device:
        """Load the model, allocate the KV cache and warm up. Blocks.

        Raises:
            UnsupportedModelError: the checkpoint cannot be served; the message names what is missing.
            KVCacheTooSmallError: the asked-for context does not fit.
        """
        self._runner = load_runner(self._config)
        release_team()  # the steps are computed on another thread
        return self._runner.device

    def start(self) -> None:
        """Begin to take messages; `load` has to have returned."""
        self._thread.start()

    def post(self, message: Message) -> None:
        """Queue a step. Bounded by the scheduler's pipeline depth."""
        self._inbox.put(message)

    def stop(self) -> None:
        """End the thread after the step it is in, and wait for it."""
        self._inbox.put(_STOP)
        if self._thread.is_alive():
            self._thread.join()
        self._runner = None

    def _run(self) -> None:
        runner = self._runner
        assert runner is not None, "load() comes before start()"
        runner.bind_threads()
        ahead: LaunchAhead[Any] = LaunchAhead(runner)
        has_failed = False
        while True:
            try:
                if ahead.is_due(has_step=not self._inbox.empty()):
                    self._send(ahead.collect())
                    self._busy_since_ns = time.monotonic_ns() if ahead else 0
                    continue
                message = self._inbox.get(timeout=_POLL_S if ahead else None)
                if message is _STOP:
                    return
                if isinstance(message, StartExecutor):
                    self._epoch = message.epoch
                    ahead.clear()
                    self._busy_since_ns = 0
                    has_failed = not self._begin_epoch(runner)
                    continue
                assert isinstance(message, ExecuteStep), message
                if has_failed or message.epoch != self._epoch:
                    continue  # the supervisor was told; a later epoch is on its way
                self._busy_since_ns = self._busy_since_ns or time.monotonic_ns()
                ahead.launch(message)
            except queue.Empty:
                continue
            except Exception as error:
                has_failed = True
                ahead.clear()
                self._busy_since_ns = 0
                self._send(ExecutorFailed(self._epoch, f"{type(error).__name__}: {error}", is_out_of_memory(error)))

    def _begin_epoch(self, runner: StepRunner | GpuRunner) -> bool:
        try:
            if self._epoch:
                runner.reset()
            self._send(ExecutorReady(self._epoch))
        except Exception as error:
            self._send(ExecutorFailed(self._epoch, f"{type(error).__name__}: {error}"))
            return False
        return True
