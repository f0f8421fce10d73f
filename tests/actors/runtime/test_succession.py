from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.actors.runtime.succession import Succession

HOLDER = """
import os, sys, time
from pathlib import Path
from octavo.actors.runtime.process_title import set_title
from octavo.actors.runtime.succession import Succession
set_title("edge 0")
Succession(Path(sys.argv[1])).take()
os.write(1, b"held\\n")
time.sleep(1000)
"""

WAITER = """
import asyncio, os, sys
from pathlib import Path
from octavo.actors.runtime.succession import Succession

async def main():
    turn = asyncio.Event()
    succession = Succession(Path(sys.argv[1]))
    succession.await_turn(asyncio.get_running_loop(), turn.set)
    os.write(1, b"waiting\\n")
    await turn.wait()
    os.write(1, b"%d %d\\n" % (os.getpid(), succession.generation))
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_each_death_is_the_turn_of_one_of_those_who_wait(tmp_path: Path) -> None:
    said, say = os.pipe()

    def start(program: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=say)

    with os.fdopen(said) as heard:
        holder = start(HOLDER)
        assert heard.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            Succession(tmp_path).take()
        waiters = {waiter.pid: waiter for waiter in (start(WAITER), start(WAITER))}
        assert [heard.readline() for _ in waiters] == ["waiting\n", "waiting\n"]
        dying, generations = holder, []
        while waiters:
            dying.kill()
            dying.wait()
            pid, generation = map(int, heard.readline().split())
            dying = waiters.pop(pid)
            generations.append(generation)
        assert generations == [1, 2]
        dying.kill()
        dying.wait()
        os.close(say)
        assert heard.read() == "", "nobody has had two turns"


def test_a_lock_that_is_released_is_the_next_ones(tmp_path: Path) -> None:
    async def run() -> None:
        first, second = Succession(tmp_path), Succession(tmp_path)
        first.take()
        assert (first.generation, second.generation) == (0, -1)
        turn = asyncio.Event()
        second.await_turn(asyncio.get_running_loop(), turn.set)
        first.release()
        async with asyncio.timeout(120):
            await turn.wait()
        second.release()

    asyncio.run(run())


def test_only_a_holder_that_is_stopped_is_ended_and_then_the_next_one_has_its_turn(tmp_path: Path) -> None:
    async def run() -> None:
        next_one = Succession(tmp_path)
        assert next_one.holder == 0 and not next_one.end_holder()
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            assert next_one.holder == holder.pid
            turn = asyncio.Event()
            next_one.await_turn(asyncio.get_running_loop(), turn.set)
            assert not next_one.is_holder_stopped() and not next_one.end_holder(), "it is alive and well"
            holder.send_signal(signal.SIGSTOP)
            while not next_one.is_holder_stopped():
                await asyncio.sleep(0)
            assert next_one.end_holder()
            async with asyncio.timeout(120):
                await turn.wait()
            assert next_one.holder == os.getpid()
            assert not next_one.end_holder(), "nobody ends himself"
            assert holder.wait() == -signal.SIGKILL
        finally:
            holder.kill()
            holder.wait()
            assert holder.stdout is not None
            holder.stdout.close()
        next_one.release()

    asyncio.run(run())


def test_a_stopped_process_that_was_given_the_pid_of_a_dead_holder_is_nobodys_to_end(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    heir = Succession(tmp_path)
    try:
        (tmp_path / "supervisor").write_text(str(stranger.pid))
        stranger.send_signal(signal.SIGSTOP)
        while not heir.is_holder_stopped():
            pass
        assert not heir.end_holder()
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        heir.release()
