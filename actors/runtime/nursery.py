"""The nursery: a process that has everything imported and forks the others, so that a restart costs no imports.

Run as `python -m octavo.actors.runtime.nursery` by `processes.Nursery`, which holds the other end of its socket. It has
one thread and computes nothing: a fork copies only the thread that forks, so the locks and thread pools of others would
be copied in whatever state they are in. It dies with its parent, and its children die with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path

import structlog

from .nursery_frames import (
    Failed,
    FrameReader,
    Prepare,
    Prepared,
    Reaped,
    Report,
    Signal,
    Spawn,
    Spawned,
    SpawnRefused,
    decode_request,
    to_frame,
)
from .parent_death import die_with_parent
from .pidfd import open_pidfd
from .process_title import set_title

_RECEIVE_BYTES = 1 << 16
_NO_POOL = {"OPENBLAS_NUM_THREADS": "1", "GOTO_NUM_THREADS": "1", "BLIS_NUM_THREADS": "1"}
"""Numpy's OpenBLAS starts its threads when it is imported. Torch's OpenMP and MKL start theirs at the first
computation, so their variables stay as they are, for the children to read."""


class NurseryProcess:
    """What runs in the nursery.

    Args:
        to_parent: a stream socket; its end of file ends the nursery and all its children.
    """

    def __init__(self, to_parent: socket.socket) -> None:
        self._to_parent = to_parent
        self._frames = FrameReader()
        self._children: dict[int, None] = {}  # pids that have not been reaped
        self._pid = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._wakeup_read, self._wakeup_write = os.pipe()
        os.set_blocking(self._wakeup_read, False)
        os.set_blocking(self._wakeup_write, False)

    def serve(self) -> None:
        """Answer requests until the parent is gone."""
        # A handler there must be for the wakeup descriptor to be written to; all is done when it is read.
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
        self._selector.register(self._to_parent, selectors.EVENT_READ)
        self._selector.register(self._wakeup_read, selectors.EVENT_READ)
        try:
            while True:
                ready = [key.fileobj for key, _ in self._selector.select()]
                if self._wakeup_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wakeup_read, 4096)
                    self._reap()
                if self._to_parent in ready:
                    data = self._to_parent.recv(_RECEIVE_BYTES)
                    if not data:
                        return
                    for body in self._frames.feed(data):
                        self._handle(body)
        except (BrokenPipeError, ConnectionResetError):
            return  # the parent is gone
        finally:
            self._kill_all()

    def _handle(self, body: bytes) -> None:
        request = decode_request(body)
        if isinstance(request, Prepare):
            self._prepare(request)
        elif isinstance(request, Spawn):
            self._spawn(request)
        else:
            self._signal(request)

    def _prepare(self, request: Prepare) -> None:
        try:
            for module in request.modules:
                importlib.import_module(module)
        except BaseException as error:
            traceback.print_exc()
            self._send(Failed(f"cannot import {module}: {type(error).__name__}: {error}"))
            raise SystemExit(1) from error
        # What is here stays: a collection in a child would otherwise write to, and so copy, every page of it.
        gc.collect()
        gc.freeze()
        self._send(Prepared(_num_threads()))

    def _spawn(self, request: Spawn) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        # Until the child has its own handlers, a signal to it must not be written to the pipe that it shares with us.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._send(SpawnRefused(request.call_id, f"fork: {error.strerror}"))
            return
        if pid == 0:
            self._become(request)  # never returns
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._children[pid] = None
        # Not reaped before this function returns, so the pid cannot be another's.
        pidfd = open_pidfd(pid)
        self._send(Spawned(request.call_id, pid, pidfd >= 0), pidfd)
        if pidfd >= 0:
            os.close(pidfd)  # the parent has its own now

    def _become(self, request: Spawn) -> None:
        """Go on as the child. Nothing of the nursery's may run in it: every way out is `os._exit`."""
        code = 1
        try:
            die_with_parent(self._pid)
            self._let_go()
            os.environ.clear()
            os.environ.update(request.env)
            set_title(request.title)
            faulthandler.enable()
            module, _, function = request.target.partition(":")
            result = getattr(importlib.import_module(module), function)(request.arguments)
            code = 0 if result is None else int(result)
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            _tell_of_failure(request.title)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 0xFF)

    def _let_go(self) -> None:
        """Give up everything of the nursery's: its handlers and its descriptors."""
        signal.set_wakeup_fd(-1)
        for signum in signal.valid_signals():
            if signal.getsignal(signum) not in (signal.SIG_DFL, signal.SIG_IGN, None):
                signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        self._selector.close()
        self._to_parent.close()
        os.close(self._wakeup_read)
        os.close(self._wakeup_write)

    def _signal(self, request: Signal) -> None:
        if request.pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(request.pid, request.signum)

    def _reap(self) -> None:
        while self._children:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in self._children:
                del self._children[pid]
                self._send(Reaped(pid, os.waitstatus_to_exitcode(wait_status)))

    def _kill_all(self) -> None:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _send(self, report: Report, pidfd: int = -1) -> None:
        frame = memoryview(to_frame(report))
        if pidfd >= 0:
            frame = frame[socket.send_fds(self._to_parent, [frame], [pidfd]) :]
        self._to_parent.sendall(frame)


def _num_threads() -> int:
    """Threads of this process, of which Python need not know."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 1


def _tell_of_failure(title: str) -> None:
    if structlog.is_configured():  # by the target: otherwise structlog would write to standard output
        with contextlib.suppress(Exception):
            structlog.get_logger().error("process.failed", title=title, exc_info=True)
            return
    traceback.print_exc()


def main() -> None:
    """Serve the parent at the other end of a socket.

    The command line holds the socket's descriptor and the parent's pid.
    """
    fd, parent_pid = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    set_title("nursery")
    os.environ.update(_NO_POOL)
    to_parent = socket.socket(fileno=fd)
    to_parent.set_inheritable(False)
    NurseryProcess(to_parent).serve()
    # Whatever was imported may want to say goodbye to threads and devices that were never started.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
