"""Processes of their own: what a nursery forks, and who dies with whom."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from supervised_children import PARENT, await_death, is_running

from octavo.actors.runtime.processes import ChildProcess, Nursery, ProcessExit, ProcessSpec, ProcessStartError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DEADLINE_S = 300


def with_nursery(test: Callable[[Nursery], Awaitable[None]], *modules: str) -> None:
    """Run a coroutine with a nursery, which is closed afterwards."""

    async def run() -> None:
        nursery = Nursery(modules)
        try:
            async with asyncio.timeout(DEADLINE_S):
                await test(nursery)
        finally:
            await nursery.close()

    asyncio.run(run())


def spec(target: str, arguments: bytes = b"", **fields: object) -> ProcessSpec:
    return ProcessSpec(**{"title": target, **fields}, target=f"supervised_children:{target}", arguments=arguments)


def descriptors(pid: int | str = "self") -> list[str]:
    return [path.name for path in Path(f"/proc/{pid}/fd").iterdir()]


def num_threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def children_of(pid: int) -> list[int]:
    """Children, zombies included."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_nursery_that_imported_torch_and_our_executor_has_one_thread_and_its_children_compute_with_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)

    async def test(nursery: Nursery) -> None:
        await nursery.start()
        assert num_threads(nursery.pid) == 1
        child = await nursery.spawn(spec("compute"))
        assert (await child.wait()).status == 0
        assert num_threads(nursery.pid) == 1

    with_nursery(test, "octavo.actors.executor.process", "octavo.actors.engine.process", "transformers", "numpy")


def test_a_child_has_its_title_and_environment_and_nothing_of_the_nurserys(tmp_path: Path) -> None:
    async def test(nursery: Nursery) -> None:
        file = tmp_path / "found"
        env = {"OCTAVO_TEST_GREETING": "bonjour"}
        child = await nursery.spawn(spec("describe_itself", os.fsencode(file), title="executor 7", env=env))
        assert await child.wait() == ProcessExit(0, "exited with code 0")
        found = msgspec.json.decode(file.read_bytes())
        assert found == {
            "title": "octavo: executor 7",
            "descriptors": [0, 1, 2],
            "handled_signals": [signal.SIGINT],  # KeyboardInterrupt, as in any Python program
            "blocked_signals": [],
            "num_threads": 1,
            "openblas": os.environ.get("OPENBLAS_NUM_THREADS"),
            "pythonpath": os.environ.get("PYTHONPATH"),
            "greeting": "bonjour",
        }
        assert Path(f"/proc/{nursery.pid}/cmdline").read_bytes().rstrip(b"\0") == b"octavo: nursery"

    with_nursery(test)


@pytest.mark.parametrize(
    ("target", "arguments", "exit_"),
    [
        ("return_code", b"0", ProcessExit(0, "exited with code 0")),
        ("return_code", b"7", ProcessExit(7, "exited with code 7")),
        ("leave", b"a reason", ProcessExit(1, "exited with code 1")),
        ("fail", b"", ProcessExit(1, "exited with code 1")),
        ("is_not_there", b"", ProcessExit(1, "exited with code 1")),
    ],
)
def test_how_a_child_ended_is_told(
    target: str, arguments: bytes, exit_: ProcessExit, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test(nursery: Nursery) -> None:
        child = await nursery.spawn(spec(target, arguments))
        assert await child.wait() == exit_
        assert not child.is_alive
        child.kill()  # nothing happens, to anybody

    with_nursery(test)
    if target == "fail":
        assert "the child failed on purpose" in capfd.readouterr().err


def test_a_killed_child_is_noticed_and_a_callback_that_comes_late_is_called_too() -> None:
    async def test(nursery: Nursery) -> None:
        child = await nursery.spawn(spec("wait_for_ever", incarnation=3))
        told: list[ChildProcess] = []
        child.add_exit_callback(told.append)
        assert (child.incarnation, child.is_alive) == (3, True)
        os.kill(child.pid, signal.SIGKILL)
        assert await child.wait() == ProcessExit(-9, "was killed by SIGKILL")
        child.add_exit_callback(told.append)
        ended = asyncio.Event()
        child.add_exit_callback(lambda _: ended.set())
        await ended.wait()
        assert told == [child, child]

    with_nursery(test)


def test_stopping_a_child_is_polite_first(tmp_path: Path) -> None:
    async def test(nursery: Nursery) -> None:
        polite = await nursery.spawn(spec("wait_for_ever"))
        assert (await polite.stop(grace_s=DEADLINE_S)).why == "was killed by SIGTERM"
        is_there = tmp_path / "ready"
        stubborn = await nursery.spawn(spec("ignore_sigterm", os.fsencode(is_there)))
        while not is_there.exists():
            await asyncio.sleep(0.01)
        assert (await stubborn.stop(grace_s=0.05)).why == "was killed by SIGKILL"

    with_nursery(test)


def test_arguments_larger_than_any_socket_buffer_arrive_whole_and_children_may_be_asked_for_at_once() -> None:
    async def test(nursery: Nursery) -> None:
        arguments = [b"%0*d" % (1_000_000, code) for code in range(4)]
        children = await asyncio.gather(*(nursery.spawn(spec("return_code", text)) for text in arguments))
        assert [(await child.wait()).status for child in children] == [0, 1, 2, 3]

    with_nursery(test)


def test_arguments_too_large_for_a_frame_are_refused() -> None:
    async def test(nursery: Nursery) -> None:
        with pytest.raises(ProcessStartError, match="at most"):
            await nursery.spawn(spec("return_code", bytes(65 << 20)))
        assert (await (await nursery.spawn(spec("return_code", b"3"))).wait()).status == 3

    with_nursery(test)


def test_without_pidfds_the_nurserys_reports_do(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(nursery: Nursery) -> None:
        child = await nursery.spawn(spec("wait_for_ever"))
        assert child.pidfd == -1
        child.kill()
        assert await child.wait() == ProcessExit(-9, "was killed by SIGKILL")
        child = await nursery.spawn(spec("wait_for_ever"))
        os.kill(nursery.pid, signal.SIGKILL)
        ended = await child.wait()
        assert "its nursery is gone" in ended.why and ended.is_innocent

    monkeypatch.delattr(os, "pidfd_open", raising=False)
    with_nursery(test, "without_pidfd")


def test_a_nursery_that_dies_takes_its_children_with_it_and_the_next_child_has_another() -> None:
    async def test(nursery: Nursery) -> None:
        waiting = await nursery.spawn(spec("wait_for_ever"))
        stopped = await nursery.spawn(spec("stop_itself"))
        pid = nursery.pid
        os.kill(pid, signal.SIGKILL)
        for child in (waiting, stopped):
            ended = await child.wait()
            assert "its nursery is gone" in ended.why and ended.is_innocent
        child = await nursery.spawn(spec("return_code", b"5"))
        assert (await child.wait()).status == 5
        assert nursery.pid not in (0, pid)

    with_nursery(test)


def test_a_nursery_that_does_not_fork_in_time_is_replaced() -> None:
    async def test(nursery: Nursery) -> None:
        await nursery.start()
        os.kill(nursery.pid, signal.SIGSTOP)
        with pytest.raises(ProcessStartError, match=r"did not fork within 0.05 s"):
            await nursery.spawn(spec("wait_for_ever"), fork_timeout_s=0.05)
        child = await nursery.spawn(spec("return_code", b"5"))
        assert (await child.wait()).status == 5

    with_nursery(test)


def test_a_standstill_of_the_host_costs_no_nursery_and_no_exit_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_s = 1.5
    monkeypatch.setattr("octavo.actors.runtime.processes._STATUS_GRACE_S", limit_s)

    async def test(nursery: Nursery) -> None:
        await nursery.start()
        pid = nursery.pid

        async def stand_still() -> None:
            """This process first goes on, then the nursery: what it has to say is not there yet."""
            time.sleep(1.2 * limit_s)
            for _ in range(20):
                await asyncio.sleep(0)
            os.kill(pid, signal.SIGCONT)

        os.kill(pid, signal.SIGSTOP)
        spawning = asyncio.create_task(nursery.spawn(spec("wait_for_ever"), fork_timeout_s=limit_s))
        while not nursery._link._calls:  # type: ignore[union-attr]  # it is asked for
            await asyncio.sleep(0)
        await stand_still()
        child = await spawning
        assert nursery.pid == pid
        os.kill(pid, signal.SIGSTOP)
        child.kill()
        ended = asyncio.ensure_future(child.wait())
        while not child._is_dying:
            await asyncio.sleep(0)
        await stand_still()
        assert await ended == ProcessExit(-9, "was killed by SIGKILL")

    with_nursery(test)


def test_nobody_who_was_killed_outright_leaves_a_nursery_or_a_child_not_even_a_stopped_one() -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(pidfds) == 3
        parent.kill()
    await_death(pidfds)


def test_closing_leaves_no_process_and_no_descriptor() -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            before = len(descriptors())
            nursery = Nursery()
            children = [await nursery.spawn(spec("wait_for_ever")) for _ in range(3)]
            pids = [nursery.pid, *(child.pid for child in children)]
            await nursery.close()
            assert [child.is_alive for child in children] == [False] * 3
            assert not any(is_running(pid) for pid in pids)
            assert len(descriptors()) == before
            with pytest.raises(ProcessStartError, match="was closed"):
                await nursery.spawn(spec("wait_for_ever"))

    asyncio.run(run())


def test_fifty_restarts_leave_no_zombie_and_no_descriptor() -> None:
    async def test(nursery: Nursery) -> None:
        await nursery.start()
        ours, theirs = len(descriptors()), len(descriptors(nursery.pid))
        for _ in range(50):
            child = await nursery.spawn(spec("wait_for_ever"))
            child.kill()
            assert (await child.wait()).status == -9
        assert len(descriptors()) == ours
        assert len(descriptors(nursery.pid)) == theirs
        assert children_of(nursery.pid) == []

    with_nursery(test)


def test_what_cannot_be_imported_is_said_and_nothing_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    async def test(nursery: Nursery) -> None:
        before = len(descriptors())
        with pytest.raises(ProcessStartError, match="cannot import octavo_is_not_called_this"):
            await nursery.start()
        assert nursery.pid == 0
        assert len(descriptors()) == before

    with_nursery(test, "octavo_is_not_called_this")


def test_a_child_that_nobody_waits_for_any_more_is_killed() -> None:
    async def test(nursery: Nursery) -> None:
        await nursery.start()
        os.kill(nursery.pid, signal.SIGSTOP)
        spawning = asyncio.create_task(nursery.spawn(spec("wait_for_ever")))
        while not nursery._link._calls:  # type: ignore[union-attr]  # it is asked for
            await asyncio.sleep(0)
        spawning.cancel()
        os.kill(nursery.pid, signal.SIGCONT)
        await asyncio.wait([spawning])
        after = await nursery.spawn(spec("wait_for_ever"))
        while nursery._link.children.keys() != {after.pid}:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)

    with_nursery(test)
