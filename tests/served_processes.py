"""`octavo serve` as a process of its own, with clients that know which of its processes serves them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from c_library import HAS_C
from process_family import title

PATIENCE_S = 300.0  # of each wait, on a busy machine; alone none takes 10


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
        common += ["--drain-timeout", f"{PATIENCE_S:g}"]  # a busy machine's streams take their time
        common += ["--deterministic"] * HAS_C  # of so many drawn tokens some lie where the rest of the batch decides
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

    def child(self, name: str, other_than: int = 0) -> psutil.Process:
        """The process with that name; waits until there is one."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            family = [process for process in self.family() if process.pid != other_than]
            found[:] = [process for process in family if title(process) == f"octavo: {name}"]
            return bool(found)

        wait_until(is_there)
        return found[0]

    def serving_edge(self, name: str, other_than: int = 0) -> psutil.Process:
        """A further edge that accepts connections."""
        found: list[psutil.Process] = []

        def is_there() -> bool:
            found[:] = [self.child(name, other_than)]
            return listens(found[0])

        wait_until(is_there)
        return found[0]

    def end(self) -> int:
        """Wait for its exit code."""
        return self.popen.wait(timeout=PATIENCE_S)


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
    """A stream of its own connection. What it receives is looked at when somebody asks: on a busy machine a client that
    did more would be slower than the server, and everything long on its way when a test takes it for begun.

    Attributes:
        local_port: of the connection.
        error: once it has ended otherwise than well: the error's code, or `reset`.
    """

    def __init__(self, index: int, max_tokens: int) -> None:
        self.index = index
        self.max_tokens = max_tokens
        self.local_port = 0
        self.error = ""
        self._received: list[bytes] = []

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
                async for piece in response.content.iter_any():
                    self._received.append(piece)
        except aiohttp.ClientError:
            self.error = "reset"
        for event in self._events():
            if "error" in event:
                self.error = event["error"]["code"]
        return self

    @property
    def has_begun(self) -> bool:
        """Whether anything has come; the headers leave with the first event."""
        return bool(self._received or self.error)

    @property
    def text(self) -> str:
        """So far."""
        return "".join(choice["text"] for event in self._events() for choice in event.get("choices", []))

    @property
    def finish_reason(self) -> str:
        """Once it has ended well."""
        reasons = [choice["finish_reason"] for event in self._events() for choice in event.get("choices", [])]
        return next((str(reason) for reason in reasons if reason), "")

    def _events(self) -> list[dict[str, Any]]:
        lines = b"".join(self._received).decode(errors="ignore").split("\n")[:-1]  # the last is not whole
        return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def of_edge(clients: list[Client], edge: psutil.Process) -> list[Client]:
    """Those whose connection is an edge's."""
    ports = {one.raddr.port for one in edge.net_connections("tcp") if one.raddr}
    return [client for client in clients if client.local_port in ports]


async def streams(
    url: str,
    num_streams: int,
    max_tokens: int,
    then: Callable[[list[Client]], None] = lambda clients: None,
    *,
    edges: Sequence[psutil.Process] = (),
) -> list[Client]:
    """Run streams beside each other, and do something once each of them has begun.

    With `edges`, each of those serves some of them then: the system deals connections out by chance, and now and then
    gives one edge none of them, so they are begun anew until it does; and if some were over before all had begun, which
    a machine that is busy enough brings about.
    """
    async with asyncio.timeout(PATIENCE_S):
        while True:
            clients = [Client(index, max_tokens) for index in range(num_streams)]
            tasks = [asyncio.create_task(client.run(url)) for client in clients]
            while not all(client.has_begun for client in clients):
                for task in tasks:
                    if task.done():
                        task.result()  # raises what went wrong, which nobody would hear of otherwise
                await asyncio.sleep(0.005)
            errors = {client.error for client in clients}
            assert errors == {""}, f"some ended with an error before all had begun: {errors}"
            are_dealt_out = all(of_edge(clients, edge) for edge in edges)
            if are_dealt_out and not any(task.done() for task in tasks):
                break
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        then(clients)
        await asyncio.gather(*tasks)
    return clients
