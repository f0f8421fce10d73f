"""The benchmark's end of a worker: start it, ask it with a deadline, stop it while another one is measured."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from .adapter import LoadOptions, Request

_LOG_CHARACTERS = 20_000
_WORKER = Path(__file__).with_name("worker.py")


class PeerFailedError(Exception):
    """A peer crashed, hung or refused; it is over for this peer and for nobody else."""


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        elapsed_s: wall clock, from all requests to all outputs.
        outputs: token ids.
        cpu_s: processor time of all of the peer's processes.
        foreign_cores: processors that something else kept busy meanwhile, on average.
    """

    elapsed_s: float
    outputs: list[list[int]]
    cpu_s: float
    foreign_cores: float


class PeerProcess:
    """One engine in a process group of its own.

    Args:
        name: of the catalog.
        timeout_s: for any answer.
        python: interpreter in which the peer is installed; None takes the one that runs this.
        num_threads: told to it by the environment as well, since some engines ask nothing else.
    """

    def __init__(self, name: str, *, timeout_s: float, python: str | None = None, num_threads: int = 1) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self.deadline = math.inf  # for all answers together, of the monotonic clock; whoever measures may set it
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(num_threads)}
        # By its file under a foreign interpreter: octavo is not installed there.
        command = [python, str(_WORKER)] if python else [sys.executable, "-m", f"{__package__}.worker"]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - a list of our own making, no shell
                [*command, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise PeerFailedError(f"cannot start {command[0]}: {error}") from error
        self._buffer = b""

    def probe(self, options: LoadOptions) -> str:
        """Empty, or why it is not available."""
        return str(self._ask({"do": "probe", "options": vars(options)})["why_not"])

    def load(self, options: LoadOptions) -> dict[str, Any]:
        """Load the model: `facts`, `versions` and `load_s`."""
        return self._ask({"do": "load", "options": vars(options)})

    def run(self, requests: Sequence[Request]) -> Timed:
        """Send all requests at once and wait for all outputs."""
        command = {"do": "run", "requests": [[request.token_ids, request.num_output_tokens] for request in requests]}
        cpu_before, busy_before, wall_before = self._cpu_s(), _busy_s(), time.perf_counter()
        answer = self._ask(command)
        cpu_s = self._cpu_s() - cpu_before
        foreign_s = _busy_s() - busy_before - cpu_s
        return Timed(
            elapsed_s=answer["elapsed_s"],
            outputs=answer["outputs"],
            cpu_s=cpu_s,
            foreign_cores=max(0.0, foreign_s / (time.perf_counter() - wall_before)),
        )

    def pause(self) -> None:
        """Stop the whole group: an engine that polls while it has nothing to do would slow the one that is measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the group, whatever it is doing. May be called twice."""
        if self._errors.closed:
            return
        self._signal(signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:  # a command that it never read
                    continue
        self._process.wait()
        self._errors.close()

    def log(self) -> str:
        """The end of what the engine has written to standard error; until `close`."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-_LOG_CHARACTERS:]

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(command).encode() + b"\n")
            pipe.flush()
        except OSError as error:
            raise self._failure(f"{command['do']}: its process has ended") from error
        answer: dict[str, Any] = json.loads(self._read_line(command["do"]))
        if "error" in answer:
            raise self._failure(f"{command['do']}: {answer['error']}", with_log=False)
        return answer

    def _read_line(self, what: str) -> bytes:
        assert self._process.stdout is not None
        deadline = min(time.monotonic() + self._timeout_s, self.deadline)
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise self._failure(f"{what}: no answer in {self._timeout_s:g} s")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                status = self._process.wait()
                how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
                raise self._failure(f"{what}: its process ended {how}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failure(self, why: str, with_log: bool = True) -> PeerFailedError:
        """The error, with the last line that the engine printed where that may explain it."""
        if not with_log or self._errors.closed:
            return PeerFailedError(why)
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return PeerFailedError(f"{why} ({lines[-1][:300]})" if lines else why)

    def _cpu_s(self) -> float:
        """Processor time of the worker and of all processes that it started."""
        total = 0.0
        try:
            root = psutil.Process(self._process.pid)
            family = [root, *root.children(recursive=True)]
        except psutil.Error:
            return 0.0
        for process in family:
            try:
                times = process.cpu_times()
            except psutil.Error:
                continue
            total += times.user + times.system
        return total


def _busy_s() -> float:
    """Processor time of the whole machine that was not idle."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))
