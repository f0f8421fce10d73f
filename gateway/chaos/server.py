"""A server that `octavo chaos` starts itself, and starts again once its edge was killed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ...messages.errors import OctavoError
from ..server_start import until_ready
from .processes import ProcessNotFoundError, ServerProcesses

STOP_WITHIN_S = 60.0


class Restarter:
    """Starts a server by its command line, in a session of its own: a Ctrl-C meant for `octavo chaos` is not for it.

    Args:
        command: with its arguments.
        log_path: file that what it writes is appended to. Not a pipe: it may outlive who started it.
    """

    def __init__(self, command: Sequence[str], log_path: Path) -> None:
        self.command = tuple(command)
        self.log_path = log_path
        self._started: list[asyncio.subprocess.Process] = []

    async def start(self) -> asyncio.subprocess.Process:
        with self.log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self.command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        return process

    async def end_all(self) -> None:
        """End whatever was started and still runs: politely, and by force if that takes too long."""
        for process in self._started:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in self._started:
            try:
                await asyncio.wait_for(process.wait(), STOP_WITHIN_S)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()  # its children die with it
                await process.wait()

    def last_words(self) -> str:
        """The end of what it wrote, for whoever wonders why it does not serve."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:300] if lines else ""


def serve_command(url: str, flags: Sequence[str], *, journal: str = "") -> list[str]:
    """`octavo serve` with these flags, at the address of a URL.

    Args:
        journal: folder for open streams, unless the flags name one.
    """
    address = urlsplit(url)
    command = [sys.executable, "-m", "octavo", "serve", *flags]
    command += ["--host", address.hostname or "127.0.0.1", "--port", str(address.port or 80)]
    if journal and not any(flag.split("=")[0] == "--journal" for flag in flags):
        command += ["--journal", journal]
    return command


@asynccontextmanager
async def served(url: str, flags: Sequence[str], *, needs_journal: bool) -> AsyncIterator[Restarter]:
    """Have a server at a URL while the block runs; ended politely afterwards, whichever of its starts was the last.

    Raises:
        OctavoError: somebody listens there already, or the server does not start.
    """
    try:
        ServerProcesses.behind(url)
    except ProcessNotFoundError:
        pass
    else:
        raise OctavoError(f"somebody listens at {url} already: leave out --serve, or give another --url")
    with tempfile.TemporaryDirectory(prefix="octavo-chaos-") as folder:
        journal = str(Path(folder) / "journal") if needs_journal else ""
        restarter = Restarter(serve_command(url, flags, journal=journal), Path(folder) / "serve.log")
        process = await restarter.start()
        try:
            await until_ready(url, process, restarter.last_words)
            yield restarter
        finally:
            await restarter.end_all()
