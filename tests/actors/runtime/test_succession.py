from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.actors.runtime.succession import Succession

HOLDER = """
import os, sys, time
from pathlib import Path
from octavo.actors.runtime.succession import Succession
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
    Succession(Path(sys.argv[1])).await_turn(asyncio.get_running_loop(), turn.set)
    os.write(1, b"waiting\\n")
    await turn.wait()
    os.write(1, b"%d\\n" % os.getpid())
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
        dying = holder
        while waiters:
            dying.kill()
            dying.wait()
            dying = waiters.pop(int(heard.readline()))
        dying.kill()
        dying.wait()
        os.close(say)
        assert heard.read() == "", "nobody has had two turns"


def test_a_lock_that_is_released_is_the_next_ones(tmp_path: Path) -> None:
    async def run() -> None:
        first, second = Succession(tmp_path), Succession(tmp_path)
        first.take()
        turn = asyncio.Event()
        second.await_turn(asyncio.get_running_loop(), turn.set)
        first.release()
        async with asyncio.timeout(30):
            await turn.wait()
        second.release()

    asyncio.run(run())
