"""Faults that `octavo chaos` can do to a server: signals to its processes, and the route that crashes an actor."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol

import aiohttp
import psutil

from ...messages.errors import OctavoError
from .processes import ProcessNotFoundError, ServerProcesses, title_of
from .server import Restarter

FaultKind = Literal["KILL", "STOP", "DELAY"]

REPLACED_WITHIN_S = 30.0
"""A stopped process that nobody replaces for so long is let go on, and told of."""

DEAD_WITHIN_S = 5.0
LOOK_EVERY_S = 0.05


HOW_TO_RESTART = (
    "killing the edge ends this server, which somebody must start again with the journal of its streams: let this "
    "command start it and start it again (--serve, with its flags), or say how that is done (--restart 'octavo serve "
    "... --journal DIR')"
)


class FaultNotDeliveredError(OctavoError):
    """Nobody was hit; the message says why."""

    code = "fault_not_delivered"


class Injector(Protocol):
    """Does one fault to one actor."""

    async def inject(self, actor: str, kind: FaultKind) -> str:
        """Do it, and return whom it hit.

        Raises:
            FaultNotDeliveredError: nobody was hit.
        """

    async def has_recovered(self) -> bool:
        """Whether everything that was hit has been replaced."""

    async def close(self) -> None:
        """Let go on what is stopped still."""


class ProcessInjector:
    """Faults of a server on this host.

    Args:
        find: finds its processes; asked again whenever the server itself was started anew.
        session: to the server.
        chance: picks victims and delays.
        restarter: starts the server again after its edge was killed.
        on_problem: told of what did not go as it should.
    """

    def __init__(
        self,
        find: Callable[[], ServerProcesses],
        session: aiohttp.ClientSession,
        chance: random.Random,
        *,
        restarter: Restarter | None,
        on_problem: Callable[[str], None],
    ) -> None:
        self._find = find
        self._processes = find()
        self._session = session
        self._chance = chance
        self._restarter = restarter
        self._on_problem = on_problem
        self._hit: tuple[str, psutil.Process] | None = None
        self._expected: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped: list[psutil.Process] = []

    async def inject(self, actor: str, kind: FaultKind) -> str:
        victims = self._processes.doing(actor)
        if not victims:
            if actor in self._expected:
                raise FaultNotDeliveredError(f"no process titled 'octavo: {actor}' is alive at the moment")
            return await self._crash(actor)
        if actor == "edge":
            self._check_restart(victims)
        # A replacement that is starting must not be missed next time.
        self._expected.setdefault(actor, len(victims))
        victim = self._chance.choice(victims)
        title = title_of(victim) or actor
        try:
            if kind == "KILL":
                victim.send_signal(signal.SIGKILL)
            else:
                victim.send_signal(signal.SIGSTOP)
                self._stopped.append(victim)
        except psutil.Error as error:
            raise FaultNotDeliveredError(f"{title} (pid {victim.pid}) was gone already: {error}") from error
        self._hit = (actor, victim)
        if kind == "STOP":
            self._spawn(self._continue_when_replaced(actor, victim, title))
        elif kind == "DELAY":
            self._spawn(self._continue_after(victim, self._chance.uniform(0.05, 0.8)))
            self._hit = None
        elif actor == "edge":
            self._spawn(self._start_again())
        return f"{title} (pid {victim.pid})"

    async def has_recovered(self) -> bool:
        if self._hit is None:
            return True
        actor, victim = self._hit
        others = [process.pid for process in self._processes.doing(actor) if process != victim]
        return len(others) >= self._expected.get(actor, 1)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self._stopped:
            _let_go_on(process)

    async def _crash(self, actor: str) -> str:
        self._hit = None
        try:
            async with self._session.post("/debug/crash", json={"actor": actor}) as response:
                body = await response.text()
        except aiohttp.ClientError as error:
            raise FaultNotDeliveredError(f"the server could not be asked to fail its {actor}: {error}") from error
        if response.status == 404:
            raise FaultNotDeliveredError(
                f"there is no process titled 'octavo: {actor}', and the server makes no actor fail: start it with "
                "--enable-fault-injection"
            )
        if response.status != 200:
            raise FaultNotDeliveredError(f"the server did not fail its {actor} ({response.status}): {body[:200]}")
        return f"{actor} (by request)"

    def _check_restart(self, victims: list[psutil.Process]) -> None:
        if self._restarter is None and any(victim == self._processes.root for victim in victims):
            raise FaultNotDeliveredError(HOW_TO_RESTART)

    async def _start_again(self) -> None:
        if self._restarter is None:
            return
        if not await _has_ended(self._processes.root, DEAD_WITHIN_S):
            return  # one of several edges: its own server replaces it
        server = await self._restarter.start()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                self._processes = self._find()
                self._hit = None
                return
            except ProcessNotFoundError:
                if server.returncode is not None:
                    self._on_problem(
                        f"the server did not start again (code {server.returncode}): {self._restarter.last_words()}"
                    )
                    return

    async def _continue_when_replaced(self, actor: str, victim: psutil.Process, title: str) -> None:
        try:
            async with asyncio.timeout(REPLACED_WITHIN_S):
                while victim.is_running() and not await self.has_recovered():  # noqa: ASYNC110  # no event tells of it
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            self._on_problem(f"{title} (pid {victim.pid}) hung for {REPLACED_WITHIN_S:.0f} s and was not replaced")
            self._hit = None
        _let_go_on(victim)

    async def _continue_after(self, victim: psutil.Process, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        _let_go_on(victim)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _has_ended(process: psutil.Process, timeout_s: float) -> bool:
    """Whether a process ends in time; it is not reaped, as it may be a child that somebody else waits for."""
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        await asyncio.sleep(LOOK_EVERY_S)
    return False


def _let_go_on(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGCONT)  # psutil compares the time it was started: never another of the same id
    except psutil.Error:
        return
