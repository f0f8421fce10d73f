from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import psutil
import pytest
from supervised_children import is_running

from octavo.actors.runtime import independent
from octavo.actors.runtime.independent import IndependentProcesses
from octavo.actors.runtime.processes import ProcessRefusedError, ProcessSpec, ProcessStartError

FOLDER = Path(__file__).parents[2]


def spec(function: str, arguments: bytes = b"", **fields: Any) -> ProcessSpec:
    return ProcessSpec(title="edge 7", target=f"supervised_children:{function}", arguments=arguments, **fields)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def run(coroutine: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300):
            await coroutine

    asyncio.run(bounded())


def test_a_child_has_its_title_arguments_and_environment_and_tells_how_it_ended(tmp_path: Path) -> None:
    async def scenario() -> None:
        arguments = os.fsencode(tmp_path / "said") + b"\n" + bytes(200_000)  # more than a pipe holds
        process = await IndependentProcesses().spawn(spec("say_who_it_is", arguments, env={"COLOUR": "green"}))
        ended = await process.wait()
        assert (ended.status, ended.why) == (3, "exited with code 3")
        assert (tmp_path / "said").read_text() == "octavo: edge 7 green 200000"
        process.kill()  # of one that has ended

    run(scenario())


def test_stopping_is_polite_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        polite = await IndependentProcesses().spawn(spec("wait_for_ever"))
        assert (await polite.stop(60)).why == "was killed by SIGTERM"
        begun = tmp_path / "begun"
        deaf = await IndependentProcesses().spawn(spec("ignore_sigterm", os.fsencode(begun)))
        while not begun.exists():
            await asyncio.sleep(0)
        assert (await deaf.stop(0.01)).why == "was killed by SIGKILL"

    run(scenario())


def test_a_child_lives_on_when_its_parent_is_killed() -> None:
    program = """
import asyncio, os, signal, sys
from octavo.actors.runtime.independent import IndependentProcesses
from octavo.actors.runtime.processes import ProcessSpec

async def main():
    spec = ProcessSpec(title="edge 7", target="supervised_children:wait_for_ever")
    print((await IndependentProcesses().spawn(spec)).pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.wait() == -signal.SIGKILL
        assert is_running(child.pid)
        child.kill()


def test_a_system_without_room_for_a_process_is_told_from_other_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(independent.sys, "executable", "/nowhere/python")
        with pytest.raises(ProcessStartError, match="edge 7 cannot be started") as refused:
            await IndependentProcesses().spawn(spec("wait_for_ever"))
        assert not isinstance(refused.value, ProcessRefusedError)

        async def no_room(*_: object, **__: object) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(independent.asyncio, "create_subprocess_exec", no_room)
        with pytest.raises(ProcessRefusedError):
            await IndependentProcesses().spawn(spec("wait_for_ever"))

    run(scenario())
