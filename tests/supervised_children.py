"""What child processes do in tests of the nursery and the supervisor."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path

import msgspec

from octavo.messages.ids import Epoch
from octavo.messages.system import Beat, EngineReady, ExecutorReady, StartProcess

News = Beat | EngineReady | ExecutorReady


class Birth(msgspec.Struct):
    """Arguments of `beat_for_ever`: which child it is, and the datagram socket that hears its news."""

    path: str
    start: StartProcess


decode_news = msgspec.msgpack.Decoder(News).decode


def beat_for_ever(arguments: bytes) -> None:
    """Be ready at once and beat until killed."""
    birth = msgspec.msgpack.decode(arguments, type=Birth)
    child, incarnation, epoch = birth.start.child, birth.start.incarnation, birth.start.epoch
    news = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    news.connect(birth.path)
    ready = EngineReady(incarnation) if child == "engine" else ExecutorReady(epoch)
    news.send(msgspec.msgpack.encode(ready))
    progress = 0
    while True:
        news.send(msgspec.msgpack.encode(Beat(child, incarnation, progress, epoch=Epoch(epoch))))
        progress += 1
        threading.Event().wait(0.1)


def say_who_it_is(arguments: bytes) -> int:
    """Write title, a variable and the number of bytes behind the first line to the file that that line names."""
    path, _, rest = arguments.partition(b"\n")
    title = Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()
    Path(os.fsdecode(path)).write_text(f"{title} {os.environ['COLOUR']} {len(rest)}", encoding="utf-8")
    return 3


def wait_for_ever(_: bytes) -> None:
    """Wait for a signal."""
    while True:
        signal.pause()


def stop_itself(_: bytes) -> None:
    """Stop, as SIGSTOP does: only SIGKILL helps."""
    os.kill(os.getpid(), signal.SIGSTOP)


def ignore_sigterm(arguments: bytes) -> None:
    """Say so by creating the file named by `arguments`, then wait for SIGKILL."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(os.fsdecode(arguments)).touch()
    wait_for_ever(b"")


def return_code(arguments: bytes) -> int:
    """Return the number in `arguments`."""
    return int(arguments.lstrip(b"0") or b"0")


def leave(arguments: bytes) -> None:
    """`sys.exit` with the text in `arguments`."""
    sys.exit(arguments.decode())


def fail(_: bytes) -> None:
    """Raise."""
    raise RuntimeError("the child failed on purpose")


def describe_itself(arguments: bytes) -> None:
    """Write what this process is to the file named by `arguments`."""
    signals = {int(signum): signal.getsignal(signum) for signum in signal.valid_signals()}
    own = {signum for signum, handler in signals.items() if handler not in (signal.SIG_DFL, signal.SIG_IGN, None)}
    descriptors = [path.name for path in Path("/proc/self/fd").iterdir()]
    found = {
        "title": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode(),
        "descriptors": sorted(fd for fd in map(int, descriptors) if _is_open(fd)),
        "handled_signals": sorted(own),
        "blocked_signals": sorted(int(signum) for signum in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "num_threads": len(list(Path("/proc/self/task").iterdir())),
        "openblas": os.environ.get("OPENBLAS_NUM_THREADS"),
        "pythonpath": os.environ.get("PYTHONPATH"),
        "greeting": os.environ.get("OCTAVO_TEST_GREETING"),
    }
    Path(os.fsdecode(arguments)).write_bytes(msgspec.json.encode(found))


def compute(arguments: bytes) -> int:
    """Multiply matrices on two threads, which the parent of this process must not have started."""
    import torch

    torch.set_num_threads(2)
    product = torch.ones(300, 300) @ torch.ones(300, 300)
    return 0 if bool((product == 300).all()) else 9


def _is_open(fd: int) -> bool:
    """Whether it is more than the descriptor that listed it."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Whether a process lives; one that is dead and not yet buried by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def await_death(pidfds: list[int], timeout_s: float = 120.0) -> None:
    """Wait until every process is dead.

    Raises:
        TimeoutError: one still lives.
    """
    for pidfd in pidfds:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise TimeoutError("a process outlives what it was to die with")
        os.close(pidfd)


PARENT = """
import asyncio, signal, sys
from octavo.actors.runtime.processes import Nursery, ProcessSpec

async def main():
    nursery = Nursery()
    waiting = await nursery.spawn(ProcessSpec(title="waits", target="supervised_children:wait_for_ever"))
    stopped = await nursery.spawn(ProcessSpec(title="is stopped", target="supervised_children:stop_itself"))
    print(nursery.pid, waiting.pid, stopped.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
"""A program with a nursery and two children, whose pids it prints."""
