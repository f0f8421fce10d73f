"""`octavo serve` as a process of its own, with clients that know which of its processes serves them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

PATIENCE_S = 120.0


class Served:
    """A running server. Use it as a context manager; whatever is left of it at the end is killed.

    Attributes:
        url: of its API.
    """

    def __init__(self, model: Path, *flags: str) -> None:
        self._log = (model / "serve.log").open("w+", encoding="utf-8")
        command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", "--log-format", "json"]
        command += ["--served-model-name", "tiny"]
        common = ["--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "2048", "--block-size", "4"]
        self.popen = subprocess.Popen(  # ours
            [*command, *common, *flags], cwd=model, stdout=self._log, stderr=subprocess.STDOUT
        )
        self.process = psutil.Process(self.popen.pid)
        self._family: list[psutil.Process] = []
        self.url = ""

    def __enter__(self) -> Served:
        wait_until(lambda: "server.ready" in self.log or self.popen.poll() is not None)
        found = re.search(r'"url": ?"(http://[^"]+)"', self.log)
        if not found:
            self.__exit__()
        assert found, self.log
        self.url = found[1]
        return self

    def __exit__(self, *_: object) -> None:
        family = self.family()
        self.popen.kill()
        self.popen.wait()
        psutil.wait_procs(family, timeout=PATIENCE_S)
        self._log.close()

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def family(self) -> list[psutil.Process]:
        """All of its processes but the first."""
        return self.process.children(recursive=True) if self.process.is_running() else []

    def child(self, name: str) -> psutil.Process:
        """The process with that name; waits until there is one."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [process for process in self.family() if title(process) == f"octavo: {name}"]
            return bool(found)

        wait_until(is_there)
        return found[0]

    def serving_edge(self, name: str, other_than: int = 0) -> psutil.Process:
        """A further edge that accepts connections."""
        wait_until(lambda: self.child(name).pid != other_than and listens(self.child(name)))
        return self.child(name)

    def end(self) -> int:
        """Wait for its exit code."""
        return self.popen.wait(timeout=PATIENCE_S)


def title(process: psutil.Process) -> str:
    try:
        return process.cmdline()[0] if process.status() != psutil.STATUS_ZOMBIE else ""
    except (psutil.NoSuchProcess, IndexError):
        return ""


def listens(process: psutil.Process) -> bool:
    try:
        return any(one.status == psutil.CONN_LISTEN for one in process.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class Client:
    """A stream of its own connection.

    Attributes:
        local_port: of the connection.
        text: so far.
        finish_reason: once it has ended well; `error` once it has ended otherwise: the error's code, or `reset`.
    """

    def __init__(self, index: int, max_tokens: int) -> None:
        self.index = index
        self.max_tokens = max_tokens
        self.local_port = 0
        self.text = ""
        self.finish_reason = self.error = ""

    async def run(self, url: str) -> Client:
        body = {
            "model": "tiny",
            "prompt": list(range(10 + self.index, 30 + self.index)),
            "max_tokens": self.max_tokens,
            "temperature": 0.0 if self.index % 2 else 0.8,
            "seed": self.index,
            "ignore_eos": True,
            "stream": True,
        }
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        try:
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=timeout) as session,
                session.post(f"{url}/v1/completions", json=body) as response,
            ):
                if response.status != 200:
                    self.error = f"{response.status} {await response.text()}"
                    return self
                # Without a connection all of it is here already: this process was slow. `streams` says so.
                if (connection := response.connection) is not None and connection.transport is not None:
                    self.local_port = connection.transport.get_extra_info("sockname")[1]
                async for line in response.content:
                    self._take(line.decode().strip())
        except aiohttp.ClientError:
            self.error = "reset"
        return self

    def _take(self, line: str) -> None:
        if not line.startswith("data: {"):
            return
        event: dict[str, Any] = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = event["error"]["code"]
            return
        for choice in event["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason

    def is_served_by(self, process: psutil.Process) -> bool:
        return any(one.raddr and one.raddr.port == self.local_port for one in process.net_connections("tcp"))


async def streams(
    url: str, num_streams: int, max_tokens: int, then: Callable[[list[Client]], None] = lambda clients: None
) -> list[Client]:
    """Run streams beside each other, and do something once each of them has begun."""
    clients = [Client(index, max_tokens) for index in range(num_streams)]
    tasks = [asyncio.create_task(client.run(url)) for client in clients]
    async with asyncio.timeout(PATIENCE_S):
        while not all(client.text or client.error for client in clients):
            for task in tasks:
                if task.done():
                    task.result()  # raises what went wrong, which nobody would hear of otherwise
            await asyncio.sleep(0.005)
        ends = [(client.finish_reason, client.error) for client in clients]
        assert not any(map(any, ends)), f"some were over before all had begun: {ends}"
        then(clients)
        await asyncio.gather(*tasks)
    return clients
