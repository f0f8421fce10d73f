from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import aiohttp
import process_family
import psutil
import pytest

from octavo.actors.runtime.process_title import restore_title, set_title
from octavo.gateway.chaos.faults import FaultNotDeliveredError, ProcessInjector
from octavo.gateway.chaos.processes import ProcessNotFoundError, ServerProcesses, title_of

until = partial(process_family.until, timeout_s=120)

# A family as `octavo serve` has it: whoever listens, a nursery below, and children of the nursery.
FAMILY = """
import os, socket, subprocess, sys, time
from setproctitle import setproctitle

def child(code):
    return subprocess.Popen([sys.executable, "-c", code])

LEAF = "import setproctitle, time; setproctitle.setproctitle({title!r}); time.sleep(600)"
NURSERY = '''
import setproctitle, subprocess, sys, time
setproctitle.setproctitle("octavo: nursery")
def start(title):
    code = "import setproctitle, time; setproctitle.setproctitle(" + repr(title) + "); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.path[:0] = " + repr(sys.path) + "; " + code])
wanted = {"octavo: engine": None, "octavo: executor 0": None, "octavo: executor 1": None}
while True:
    for title, process in wanted.items():
        if process is None or process.poll() is not None:
            wanted[title] = start(title)
    time.sleep(0.01)
'''
listener = socket.create_server(("127.0.0.1", 0))
nursery = child(NURSERY)
setproctitle("octavo: edge 0")
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
nursery.kill()
"""


@pytest.fixture
def family() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    relatives: list[psutil.Process] = []
    try:
        yield url
    finally:
        root = psutil.Process(process.pid)
        relatives = [*root.children(recursive=True), root]
        for relative in relatives:
            relative.kill()
        psutil.wait_procs(relatives, 120)
        process.wait()
        process.stdout.close()
        process.stdin.close()


def titles(processes: ServerProcesses, actor: str) -> list[str]:
    return [title_of(process) for process in processes.doing(actor)]


def test_processes_are_found_by_title_among_the_listeners_relatives_alone(family: str) -> None:
    # Another server's executor, which must never be hit.
    stranger = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import setproctitle, time; setproctitle.setproctitle('octavo: executor 7'); time.sleep(600)",
        ]
    )
    try:
        processes = ServerProcesses.behind(family)

        async def run() -> None:
            await until(lambda: title_of(psutil.Process(stranger.pid)) == "octavo: executor 7")
            await until(lambda: titles(processes, "executor") == ["octavo: executor 0", "octavo: executor 1"])
            await until(lambda: titles(processes, "engine") == ["octavo: engine"])

        asyncio.run(run())
        assert titles(processes, "edge") == ["octavo: edge 0"]
        assert titles(processes, "tokenizer") == []
    finally:
        stranger.kill()
        stranger.wait()


def test_kill_and_stop_hit_one_process_and_are_over_once_it_is_replaced(family: str) -> None:
    async def run() -> None:
        processes = ServerProcesses.behind(family)
        problems: list[str] = []
        await until(lambda: len(processes.doing("executor")) == 2 and processes.doing("engine"))
        async with aiohttp.ClientSession(family) as session:
            injector = ProcessInjector(
                lambda: ServerProcesses.behind(family),
                session,
                random.Random(1),
                restarter=None,
                on_problem=problems.append,
            )
            before = processes.doing("executor")
            hit = await injector.inject("executor", "KILL")
            victim = next(process for process in before if f"(pid {process.pid})" in hit)
            await until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
            async with asyncio.timeout(120):
                while not await injector.has_recovered():
                    await asyncio.sleep(0.01)
            assert victim.pid not in [process.pid for process in processes.doing("executor")]
            (engine,) = processes.doing("engine")
            await injector.inject("engine", "STOP")
            await until(lambda: engine.status() == psutil.STATUS_STOPPED)
            assert not await injector.has_recovered()  # nobody of this family notices
            await injector.close()
            await until(lambda: engine.status() != psutil.STATUS_STOPPED)
            with pytest.raises(FaultNotDeliveredError, match="--restart"):
                await injector.inject("edge", "KILL")
        assert problems == []

    asyncio.run(run())


def test_servers_elsewhere_and_ports_where_nobody_listens_are_refused_in_words() -> None:
    with pytest.raises(ProcessNotFoundError, match="not this host"):
        ServerProcesses.behind("http://192.0.2.1:8000")
    with pytest.raises(ProcessNotFoundError, match="port 9 "):
        ServerProcesses.behind("http://127.0.0.1:9")


def test_whoever_looks_for_a_server_that_it_started_is_none_of_its_processes(family: str) -> None:
    before = set_title("edge 0")  # as a program is shown that runs an engine over several processes
    try:
        (edge,) = ServerProcesses.behind(family).doing("edge")
    finally:
        restore_title(before)
    assert edge.pid != os.getpid()
