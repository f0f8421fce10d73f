"""Child processes that outlive their parent: they have something to finish, and end by themselves when that is done.

Each is an interpreter of its own, not a fork of a nursery, which would take it along. `python -m
octavo.actors.runtime.independent` is such a process; it reads from its standard input what it is to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import faulthandler
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import structlog

from .awake_time import wait_awake
from .process_title import set_title
from .processes import ProcessExit, ProcessRefusedError, ProcessSpec, ProcessStartError, describe_status


class IndependentProcess:
    """A running one.

    Attributes:
        pid: its process id.
        is_here: on this host, so that the pid means something.
    """

    is_here = True

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process
        self._ended = asyncio.ensure_future(process.wait())

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Signal it; nothing if it has ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signum)

    async def wait(self) -> ProcessExit:
        """How it ended, once it has."""
        status = await asyncio.shield(self._ended)
        return ProcessExit(status, describe_status(status))

    async def stop(self, grace_s: float = 5.0) -> ProcessExit:
        """Ask it to end (SIGTERM), and kill it if it has not after `grace_s` seconds."""
        self.kill(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            return await wait_awake(self.wait(), grace_s)
        self.kill()
        return await self.wait()


class IndependentProcesses:
    """Starts all children of a supervisor as independent processes."""

    def hosts(self, child: str) -> bool:
        return True

    def is_out_of_reach(self, child: str) -> bool:
        return False  # on this host

    def withdraw(self, child: str) -> None:
        """One that is not there yet is killed as soon as it is."""

    async def spawn(self, spec: ProcessSpec) -> IndependentProcess:
        """Start one.

        Raises:
            ProcessStartError: the system gives no process.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                __name__,
                stdin=subprocess.PIPE,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
                | dict(spec.env),
                # A terminal's Ctrl-C is for the parent, who tells the others when it is time.
                start_new_session=True,
            )
        except OSError as error:
            kind = ProcessRefusedError if error.errno in (errno.EAGAIN, errno.ENOMEM) else ProcessStartError
            raise kind(f"{spec.title} cannot be started: {error}") from error
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it died: `wait` tells
            process.stdin.write(msgspec.msgpack.encode(spec))
            await process.stdin.drain()
            process.stdin.close()
        return IndependentProcess(process)


def main() -> int:
    """Be what standard input says."""
    spec = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=ProcessSpec)
    set_title(spec.title)
    faulthandler.enable()
    module, _, function = spec.target.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(spec.arguments)
    except Exception:
        if not structlog.is_configured():  # by the target: otherwise structlog would write to standard output
            raise
        structlog.get_logger().error("process.failed", title=spec.title, exc_info=True)
        return 1
    return 0 if result is None else int(result)


if __name__ == "__main__":
    sys.exit(main())
