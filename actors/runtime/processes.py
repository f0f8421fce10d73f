"""Child processes, seen from their parent: forked by a nursery, watched through pidfds.

The parent never forks itself: it has threads (torch's, the tokenizer's, aiohttp's), and a fork would copy their locks.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import structlog

from ...messages.errors import OctavoError
from .awake_time import SLICE_S, wait_awake
from .nursery_frames import (
    Failed,
    FrameReader,
    FrameTooLongError,
    Prepare,
    Prepared,
    Reaped,
    Report,
    Request,
    Signal,
    Spawn,
    Spawned,
    SpawnRefused,
    decode_report,
    to_frame,
)
from .pidfd import open_pidfd, signal_pidfd

log = structlog.get_logger()

_STATUS_GRACE_S = 2.0
"""How long an exit waits for its status: the pidfd tells of the exit, the nursery a little later of its status; as with
`wait_awake`, without the time for which this process stood still."""
_BURIAL_S = 5.0
"""How long a process that was sent SIGKILL is waited for; one that takes longer hangs in the kernel, or a driver."""
_RECEIVE_BYTES = 1 << 16
_MAX_FDS = 16


class ProcessStartError(OctavoError):
    """A process could not be started."""

    code = "process_start"


class ProcessRefusedError(ProcessStartError):
    """The system has no room for another process at the moment; nothing is wrong with what was to be started."""


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What a child process is to be.

    Attributes:
        title: its name in `ps`, without the prefix `octavo: `.
        target: `module:function`, called with `arguments`; returns an exit code or None. An exception is exit code 1.
        arguments: for `target`, in a form of its own.
        env: added to this process's environment.
        incarnation: which start of this child it is; given by the supervisor, never used twice.
    """

    title: str
    target: str
    arguments: bytes = b""
    env: Mapping[str, str] = {}
    incarnation: int = 0


class ProcessExit(msgspec.Struct, frozen=True):
    """How a process ended.

    Attributes:
        status: exit code, or minus the number of the signal that killed it; None if nobody could tell.
        why: for logs and for those who wait for it.
        is_innocent: it only went with its nursery, or with its host.
    """

    status: int | None
    why: str
    is_innocent: bool = False


class ChildProcess:
    """A process that the nursery forked.

    Attributes:
        pid: its process id; whether it still means this process, `is_alive` tells.
        is_here: on this host.
        title, incarnation: of its `ProcessSpec`.
    """

    is_here = True

    def __init__(self, spec: ProcessSpec, pid: int, pidfd: int, nursery: _NurseryLink) -> None:
        self.pid = pid
        self.title = spec.title
        self.incarnation = spec.incarnation
        self._pidfd = pidfd
        self._nursery = nursery
        self._exit: ProcessExit | None = None
        self._status: int | None = None
        self._is_dying = False
        self._callbacks: list[Callable[[ChildProcess], None]] = []
        self._loop = asyncio.get_running_loop()
        if pidfd >= 0:
            self._loop.add_reader(pidfd, self._on_pidfd)

    def __repr__(self) -> str:
        return f"<ChildProcess {self.title!r} pid={self.pid} incarnation={self.incarnation} exit={self._exit}>"

    @property
    def pidfd(self) -> int:
        """Readable when the process dies; -1 where there are none and after the exit."""
        return self._pidfd

    @property
    def exit(self) -> ProcessExit | None:
        """How it ended; None while it is alive."""
        return self._exit

    @property
    def is_alive(self) -> bool:
        return self._exit is None

    def add_exit_callback(self, callback: Callable[[ChildProcess], None]) -> None:
        """Have `callback` called on the loop once the process has ended, soon if it has ended already."""
        if self._exit is not None:
            self._loop.call_soon(callback, self)
        else:
            self._callbacks.append(callback)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Signal the process; nothing if it has ended."""
        if self._exit is not None:
            return
        if self._pidfd >= 0:
            signal_pidfd(self._pidfd, signum)
        else:
            self._nursery.post(Signal(self.pid, signum))

    async def wait(self) -> ProcessExit:
        """How it ended, once it has."""
        if self._exit is None:
            ended: asyncio.Future[None] = self._loop.create_future()

            def tell(_: ChildProcess) -> None:
                if not ended.done():
                    ended.set_result(None)

            self.add_exit_callback(tell)
            await ended
        assert self._exit is not None
        return self._exit

    async def stop(self, grace_s: float = 5.0) -> ProcessExit:
        """Ask it to end (SIGTERM), and kill it if it has not after `grace_s` seconds."""
        self.kill(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            return await wait_awake(self.wait(), grace_s)
        self.kill()
        return await self.wait()

    def _on_pidfd(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._die(None)

    def _on_reaped(self, status: int) -> None:
        self._status = status
        self._finish()

    def _on_nursery_lost(self) -> None:
        """Nobody will tell of its status any more; the kernel kills it, if it has not yet."""
        if self._pidfd < 0 or self._is_dying:
            self._finish()

    def _die(self, _: object) -> None:
        self._is_dying = True
        if not self._nursery.is_alive:
            self._finish()
        else:
            self._await_status(round(_STATUS_GRACE_S / SLICE_S))

    def _await_status(self, num_slices: int) -> None:
        if not num_slices:
            self._finish()
        elif self._exit is None:
            self._loop.call_later(SLICE_S, self._await_status, num_slices - 1)

    def _finish(self) -> None:
        if self._exit is not None:
            return
        if not self._nursery.is_alive:
            self._status = _reap_if_ours(self.pid, self._status)
        why = describe_status(self._status)
        is_innocent = not self._nursery.is_alive
        if is_innocent:
            why += ", and its nursery is gone"
        self._exit = ProcessExit(self._status, why, is_innocent)
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._nursery.children.pop(self.pid, None)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._loop.call_soon(callback, self)


def describe_status(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _reap_if_ours(pid: int, status: int | None) -> int | None:
    """Bury a child of a dead nursery, which is ours now if we are process 1 of a container."""
    with contextlib.suppress(ChildProcessError):
        reaped, wait_status = os.waitpid(pid, os.WNOHANG)
        if reaped == pid:
            return os.waitstatus_to_exitcode(wait_status)
    return status


class _NurseryLink:
    """One nursery process and the socket to it; a new one takes its place when it dies."""

    def __init__(self, on_lost: Callable[[_NurseryLink], None]) -> None:
        self.children: dict[int, ChildProcess] = {}
        self.is_alive = True
        self.prepared: asyncio.Future[Prepared] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._on_lost = on_lost
        self._frames = FrameReader()
        self._fds: collections.deque[int] = collections.deque()
        self._calls: dict[int, tuple[ProcessSpec, asyncio.Future[ChildProcess]]] = {}
        self._num_calls = 0
        self._unsent: collections.deque[memoryview] = collections.deque()
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        try:
            # From this thread, not a helper's: the nursery is killed when the thread that started it ends.
            self.process = subprocess.Popen(  # noqa: S603, ours
                [sys.executable, "-P", "-m", f"{__package__}.nursery", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
                # A terminal's Ctrl-C is for the parent, who tells the others when it is time.
                start_new_session=True,
            )
        except OSError as error:
            self._socket.close()
            kind = ProcessRefusedError if error.errno in (errno.EAGAIN, errno.ENOMEM) else ProcessStartError
            raise kind(f"the nursery cannot be started: {error}") from error
        finally:
            theirs.close()
        self._pidfd = open_pidfd(self.process.pid)
        if self._pidfd >= 0:
            self._loop.add_reader(self._pidfd, self.lose, "died")
        self._loop.add_reader(self._socket, self._read)

    def spawn(self, spec: ProcessSpec) -> asyncio.Future[ChildProcess]:
        """Ask for a child; the future holds it, or a `ProcessStartError`."""
        answer: asyncio.Future[ChildProcess] = self._loop.create_future()
        if not self.is_alive:
            answer.set_exception(ProcessStartError(f"{spec.title}: its nursery died"))
            return answer
        self._num_calls += 1
        request = Spawn(self._num_calls, spec.title, spec.target, spec.arguments, os.environ | dict(spec.env))
        try:
            frame = to_frame(request)
        except FrameTooLongError as error:
            answer.set_exception(ProcessStartError(f"{spec.title}: {error}"))
            return answer
        self._calls[self._num_calls] = (spec, answer)
        self._send(frame)
        return answer

    def post(self, request: Request) -> None:
        """Send a request, when there is room for it."""
        self._send(to_frame(request))

    def _send(self, frame: bytes) -> None:
        if self.is_alive:
            self._unsent.append(memoryview(frame))
            self._write()

    def _write(self) -> None:
        try:
            while self._unsent:
                num_sent = self._socket.send(self._unsent[0])
                self._unsent[0] = self._unsent[0][num_sent:]
                if not self._unsent[0]:
                    self._unsent.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._write)
            return
        except OSError as error:
            self.lose(f"does not listen: {error.strerror}")
            return
        self._loop.remove_writer(self._socket)

    def _read(self) -> None:
        while self.is_alive:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, _RECEIVE_BYTES, _MAX_FDS, _CLOSE_ON_EXEC)
            except BlockingIOError:
                return
            except OSError as error:
                self.lose(f"cannot be read from: {error.strerror}")
                return
            self._fds += fds
            if not data:
                self.lose("closed its socket")
                return
            try:
                for body in self._frames.feed(data):
                    self._handle(decode_report(body))
            except (FrameTooLongError, msgspec.DecodeError) as error:
                self.lose(f"sent nonsense: {error}")

    def _handle(self, report: Report) -> None:
        if isinstance(report, Reaped):
            if (child := self.children.get(report.pid)) is not None:
                child._on_reaped(report.status)
        elif isinstance(report, Spawned):
            pidfd = self._fds.popleft() if report.has_pidfd and self._fds else -1
            spec, answer = self._calls.pop(report.call_id)
            child = self.children[report.pid] = ChildProcess(spec, report.pid, pidfd, self)
            if answer.done():  # nobody waits for it any more
                child.kill()
            else:
                answer.set_result(child)
        elif isinstance(report, SpawnRefused):
            spec, answer = self._calls.pop(report.call_id)
            if not answer.done():
                answer.set_exception(ProcessRefusedError(f"{spec.title} cannot be started: {report.why}"))
        elif isinstance(report, Prepared):
            if not self.prepared.done():
                self.prepared.set_result(report)
        else:
            assert isinstance(report, Failed), report
            self.lose(report.why)

    def lose(self, why: str) -> None:
        """End the nursery, if it has not ended: its children end with it, and everything asked for is refused."""
        if not self.is_alive:
            return
        self.is_alive = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self.process.kill()
        self.process.wait()  # it was sent SIGKILL: microseconds, unless the kernel is in trouble
        for fd in self._fds:
            os.close(fd)
        error = ProcessStartError(f"the nursery {why}")
        if not self.prepared.done():
            self.prepared.set_exception(error)
            self.prepared.exception()  # whether or not anybody waits for it
        for _, answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)
        self._calls.clear()
        for child in list(self.children.values()):
            child._on_nursery_lost()
        self._on_lost(self)


_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Nursery:
    """Starts child processes without importing anything again.

    Args:
        modules: what the nursery imports, so that its children need not. None of them may start threads or compute.
        on_lost: called on the loop when the nursery process dies (not when it is closed); its children die with it.
    """

    def __init__(self, modules: Sequence[str] = (), on_lost: Callable[[], None] = lambda: None) -> None:
        self._modules = tuple(modules)
        self._on_lost = on_lost
        self._link: _NurseryLink | None = None
        self._starting = asyncio.Lock()
        self._is_closing = False

    @property
    def pid(self) -> int:
        """Of the nursery process; 0 if there is none."""
        return self._link.process.pid if self._link is not None and self._link.is_alive else 0

    async def start(self, timeout_s: float = 900.0) -> None:
        """Start the nursery, if there is none, and wait until it has imported everything.

        Raises:
            ProcessStartError: it died, an import failed, or it took longer than `timeout_s`.
        """
        await self._ready_link(timeout_s)

    async def spawn(self, spec: ProcessSpec, timeout_s: float = 900.0, fork_timeout_s: float = 5.0) -> ChildProcess:
        """Start a child; if the nursery has died, another nursery first.

        Args:
            spec: what it is to be.
            timeout_s: for a nursery to be ready.
            fork_timeout_s: for a ready nursery to fork; one that takes longer is stopped or swapped out, and replaced.

        Raises:
            ProcessStartError: there is no child; nothing is left behind.
        """
        link = await self._ready_link(timeout_s)
        try:
            return await wait_awake(link.spawn(spec), fork_timeout_s)
        except TimeoutError:
            link.lose(f"did not fork within {fork_timeout_s} s")
            raise ProcessStartError(f"{spec.title}: the nursery did not fork within {fork_timeout_s} s") from None

    async def close(self) -> None:
        """Kill what is left of the children, and end the nursery. Safe to call twice."""
        self._is_closing = True
        link, self._link = self._link, None
        if link is None:
            return
        children = list(link.children.values())
        for child in children:
            child.kill()
        if children:  # the nursery buries them; it ends after that
            await asyncio.wait([asyncio.ensure_future(child.wait()) for child in children], timeout=_BURIAL_S)
        link.lose("was closed")

    async def _ready_link(self, timeout_s: float) -> _NurseryLink:
        async with self._starting:
            if self._is_closing:
                raise ProcessStartError("the nursery was closed")
            link = self._link
            if link is None or not link.is_alive:
                link = self._link = _NurseryLink(self._handle_lost)
                link.post(Prepare(self._modules))
            try:
                prepared = await asyncio.wait_for(asyncio.shield(link.prepared), timeout_s)
            except TimeoutError:
                link.lose(f"had not imported {', '.join(self._modules)} within {timeout_s} s")
                raise ProcessStartError(f"the nursery was not ready within {timeout_s} s") from None
            if prepared.num_threads > 1:
                log.warning("nursery.has_threads", num_threads=prepared.num_threads, modules=self._modules)
            return link

    def _handle_lost(self, link: _NurseryLink) -> None:
        if link is self._link and not self._is_closing:
            self._on_lost()
