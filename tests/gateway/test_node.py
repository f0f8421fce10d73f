"""What a node makes of what edge 0 wants from it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from process_family import living

from octavo.actors.executor.config import ExecutorConfig, ExecutorProcessSpec
from octavo.actors.executor.cpu_topology import read_cpus
from octavo.actors.runtime.addresses import EDGE, TcpSettings
from octavo.actors.runtime.asyncio_port import attach
from octavo.actors.runtime.port import Port
from octavo.actors.runtime.processes import ProcessExit, ProcessSpec, ProcessStartError
from octavo.gateway import node
from octavo.gateway.node_membership import Membership
from octavo.gateway.node_settings import NodeSettings
from octavo.messages.base import Message
from octavo.messages.ids import Epoch
from octavo.messages.nodes import NodeJoined, StartOnNode
from octavo.messages.system import Beat

PATIENCE_S = 60.0


class FakeProcess:
    """A child that ends when the test says so."""

    pid = 1

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = msgspec.msgpack.decode(spec.arguments, type=ExecutorProcessSpec)
        self.exit: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()

    def kill(self, signum: int = 9) -> None:
        if not self.exit.done():
            self.exit.set_result(ProcessExit(None, "was killed"))

    async def wait(self) -> ProcessExit:
        return await self.exit


class FakeNursery:
    """Starts nothing."""

    def __init__(self) -> None:
        self.started: list[FakeProcess] = []
        self.is_full = False

    async def spawn(self, spec: ProcessSpec) -> FakeProcess:
        if self.is_full:
            raise ProcessStartError("no room")
        self.started.append(FakeProcess(spec))
        return self.started[-1]


class Stage:
    """A node that has joined nobody yet, and what it starts."""

    def __init__(self, run_dir: Path, **settings: Any) -> None:
        self.nursery = FakeNursery()
        nursery: Any = self.nursery  # has what is used of it
        self.membership = Membership(
            NodeSettings(join="tcp://127.0.0.1:9", name="a", address="127.0.0.1", **settings),
            TcpSettings(host="127.0.0.1"),
            None,
            nursery,
            incarnation=1,
            run_dir=str(run_dir),
        )

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def start(self, number: int, incarnation: int = 1) -> FakeProcess | None:
        """Be told to start an executor."""
        before = len(self.nursery.started)
        self.membership._start(StartOnNode(f"executor {number}", incarnation, spec_of(number)))
        await self.settle()
        return self.nursery.started[-1] if len(self.nursery.started) > before else None

    async def close(self) -> None:
        stop = asyncio.Event()
        stop.set()
        await self.membership.last(stop)


def spec_of(number: int) -> bytes:
    return msgspec.msgpack.encode(
        ExecutorProcessSpec(
            child=f"executor {number}",
            incarnation=1,
            rank=0,
            epoch=Epoch(0),
            engine_name="engine",
            engine=0,
            run_dir="/elsewhere",
            config=ExecutorConfig(model_path="m", gpu=number),
            edge_incarnation=1,
        )
    )


def on_stage(test: Callable[[Stage], Any], run_dir: Path, **settings: Any) -> None:
    async def run() -> None:
        stage = Stage(run_dir, **settings)
        await test(stage)
        await stage.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


@pytest.mark.parametrize("first_gpu", [0, 3])
def test_executors_of_a_node_take_its_gpus_in_turn_whichever_replicas_they_are_of(
    tmp_path: Path, first_gpu: int
) -> None:
    async def test(stage: Stage) -> None:
        started = [await stage.start(number) for number in (0, 2, 4)]
        assert [child.spec.config.gpu for child in started if child] == [first_gpu, first_gpu + 1, first_gpu + 2]
        assert started[1] is not None
        started[1].kill()
        await stage.settle()
        stage.nursery.is_full = True
        assert await stage.start(7) is None
        stage.nursery.is_full = False
        again = await stage.start(6)  # another one: the engine places each where there is room
        assert again is not None and again.spec.config.gpu == first_gpu + 1, "what the dead one had is free"

    on_stage(test, tmp_path, first_gpu=first_gpu)


class Leader:
    """Edge 0's port, and what it hears of nodes."""

    def __init__(self) -> None:
        self.port = Port(
            EDGE, 1, allowed={"node": (NodeJoined, Beat)}, allow_plain_loopback=True, self_announced=("node",)
        )
        self.join = self.port.bind("tcp://127.0.0.1:0")
        self.joined: asyncio.Queue[NodeJoined] = asyncio.Queue()
        self.carrier = attach(asyncio.get_running_loop(), self.port, self._take)

    def _take(self, messages: list[tuple[str, Message]]) -> None:
        for _, message in messages:
            if isinstance(message, NodeJoined):
                self.joined.put_nowait(message)

    def membership(self, run_dir: Path, incarnation: int) -> Membership:
        nursery: Any = FakeNursery()
        settings = NodeSettings(join=self.join, name="a", address="127.0.0.1")
        return Membership(
            settings, TcpSettings(host="127.0.0.1"), None, nursery, incarnation=incarnation, run_dir=str(run_dir)
        )

    def close(self) -> None:
        self.carrier.close()
        self.port.close()


def test_f_47_a_node_whose_clock_was_set_back_before_it_was_started_anew_joins_behind_the_one_it_was(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        leader, stop = Leader(), asyncio.Event()
        leader.port.expect("node a", 10**13)
        late = leader.membership(tmp_path, 5)
        assert await late.last(stop) == "again"
        assert late.least_next == 10**13 + 1
        again = leader.membership(tmp_path, late.least_next)
        assert (await leader.joined.get()).incarnation == 10**13 + 1
        stop.set()
        assert await again.last(stop) == "stopped"
        leader.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


def test_of_two_nodes_of_one_name_the_one_that_was_let_in_first_ends_and_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        leader, stop = Leader(), asyncio.Event()
        first = leader.membership(tmp_path, 5)
        joined = await leader.joined.get()
        leader.port.connect("node a", 5, joined.endpoint)
        leader.carrier.send("node a", Beat(EDGE, 1))
        while not first._edge_incarnation:
            await asyncio.sleep(0)
        second = leader.membership(tmp_path, 9)
        assert (await leader.joined.get()).incarnation == 9
        leader.port.connect("node a", 9, joined.endpoint)
        assert await first.last(stop) == "unfit"
        assert "--name of its own" in first.why and first.least_next == 0
        stop.set()
        await second.last(stop)
        leader.close()

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))


@pytest.mark.parametrize(("told", "num_here", "expected"), [("1", "2", None), ("1", "1", "1"), ("3", "2", "3")])
def test_what_torchrun_says_of_threads_is_nobody_s_wish(
    monkeypatch: pytest.MonkeyPatch, told: str, num_here: str, expected: str | None
) -> None:
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": num_here, "OMP_NUM_THREADS": told}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(node, "cpu_quota", lambda: float("inf"))
    node._forget_launcher()
    assert "LOCAL_RANK" not in os.environ
    num_cores = len({cpu.core for cpu in read_cpus(os.sched_getaffinity(0))})
    assert os.environ["OMP_NUM_THREADS"] == (expected or str(max(1, num_cores // 2)))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread looks, now and then")
def test_a_node_that_ray_has_started_dies_with_ray_s_worker() -> None:
    flags = ["--join=tcp://127.0.0.1:9", "--plain-loopback", "--address=127.0.0.1"]
    worker = f"from octavo.gateway.ray_nodes import NodeActor; NodeActor({flags!r}, 0).run()"

    async def run() -> None:
        ray = await asyncio.create_subprocess_exec(sys.executable, "-c", worker, stdout=subprocess.DEVNULL)
        child = await living("node ray.0", ray.pid)
        ray.kill()
        await ray.wait()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, [child], PATIENCE_S)
        assert gone and not alive

    asyncio.run(asyncio.wait_for(run(), PATIENCE_S))
