from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from octavo.gateway.chaos.server import Restarter, serve_command, served
from octavo.messages.errors import OctavoError

WAITS = "import signal, sys; print('here', flush=True); signal.pause()"


def test_whatever_was_started_is_ended_though_it_never_listened(tmp_path: Path) -> None:
    async def run() -> None:
        restarter = Restarter([sys.executable, "-c", WAITS], tmp_path / "log")
        processes = [await restarter.start() for _ in range(2)]
        await restarter.end_all()
        assert [process.returncode for process in processes] == [-15, -15]

    asyncio.run(run())


def test_the_last_words_of_a_server_that_does_not_start_are_told(tmp_path: Path) -> None:
    async def run() -> None:
        restarter = Restarter([sys.executable, "-c", "print('first'); raise SystemExit('no model')"], tmp_path / "log")
        assert restarter.last_words() == ""
        process = await restarter.start()
        assert await process.wait() == 1
        assert restarter.last_words() in ("no model", "first")  # one is written to each of two streams

    asyncio.run(run())


def test_a_server_that_ends_at_once_is_told_of(tmp_path: Path) -> None:
    async def run() -> None:
        async with served("http://127.0.0.1:9", [str(tmp_path / "no model here")], needs_journal=False):
            raise AssertionError("it never serves")

    with pytest.raises(OctavoError, match="did not start"):
        asyncio.run(run())


def test_the_command_serves_at_the_url_and_keeps_a_journal_unless_one_is_named() -> None:
    command = serve_command("http://127.0.0.1:81", ["m", "--dtype", "float32"], journal="/j")
    assert command[-6:] == ["--host", "127.0.0.1", "--port", "81", "--journal", "/j"]
    assert command[1:7] == ["-m", "octavo", "serve", "m", "--dtype", "float32"]
    assert "/j" not in serve_command("http://127.0.0.1:81", ["--journal=/mine"], journal="/j")
    assert serve_command("http://127.0.0.1", [])[-2:] == ["--port", "80"]
