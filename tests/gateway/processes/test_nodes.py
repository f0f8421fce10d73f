"""Executors on other hosts, made of network namespaces: killed, cut off, and let in by their keys alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import FIRST_SEED, save_servable
from netns_hosts import Network, network, why_no_network
from process_family import living, named, title, until

from octavo import Engine
from octavo.actors.runtime.curve import CurveKeys, make_keys, write_keys
from octavo.gateway.config import NodesConfig, make_config
from octavo.gateway.processes.nodes import NodesMissingError
from octavo.gateway.processes.process_graph import ProcessGraph
from octavo.messages.sampling import SamplingParams

PATIENCE_S = 400.0  # of a whole test, on a busy machine; alone none takes 20
NUM_STREAMS = 6
PORTS = itertools.count(17001)  # one for each test: ZeroMQ closes the last one's listener when it comes to it


def run(coroutine: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE_S)

    return asyncio.run(bounded())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder)
    return folder


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    if why := why_no_network():
        pytest.skip(why)
    with network(2) as made:
        yield made


@pytest.fixture(autouse=True)
def healed(hosts: Network) -> Iterator[None]:
    """A test that fails while a host is cut off leaves the next ones a whole network."""
    yield
    for host in hosts.hosts:
        hosts.heal(host)


class Keys:
    """Key files of two hosts, each of which lets the other in."""

    def __init__(self, folder: Path) -> None:
        self.port = next(PORTS)
        self.server, self.node = make_keys(), make_keys()
        self.server_file, self.node_file, self.allow_list = folder / "server", folder / "node", folder / "allowed"
        write_keys(self.server, self.server_file)
        write_keys(self.node, self.node_file)
        self.allow(self.node)

    def allow(self, *keys: CurveKeys) -> None:
        self.allow_list.write_text("".join(f"{each.public}\n" for each in keys))

    def nodes(self, address: str, **fields: Any) -> NodesConfig:
        return NodesConfig(
            **{
                "listen": f"tcp://{address}:{self.port}",
                "keys": str(self.server_file),
                "allow_list": str(self.allow_list),
                "timeout_s": 120.0,
                **fields,
            }
        )

    def flags(self, address: str) -> list[str]:
        return [f"--join=tcp://{address}:{self.port}", f"--keys={self.node_file}", f"--server-key={self.server.public}"]


@contextlib.contextmanager
def node_on(hosts: Network, host: str, *flags: str, log: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A node on a host, killed in the end."""
    command = [*hosts.inside(host), sys.executable, "-m", "octavo", "node", f"--name={host}", *flags]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log is not None else None
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT if output else None)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def engine_of(model: Path, nodes: NodesConfig, **fields: Any) -> Engine:
    config = make_config(
        {
            "model": str(model),
            "dtype": "float32",
            "num_blocks": 256,
            "block_size": 4,
            "max_model_len": 128,
            "num_threads": 1,
            "in_process": False,
            **fields,
        }
    )
    return Engine(config=config, nodes=nodes)


async def answers(engine: Engine, on_token: Callable[[int], None] = lambda count: None) -> list[list[int]]:
    count = 0

    async def one(index: int) -> list[int]:
        nonlocal count
        temperature = 0.0 if index % 2 else 0.9
        params = SamplingParams(temperature=temperature, seed=FIRST_SEED + index, max_tokens=90, ignore_eos=True)
        tokens: list[int] = []
        async for delta in engine.stream(list(range(10 + index, 30 + index)), params):
            tokens += delta.token_ids
            count += len(delta.token_ids)
            on_token(count)
        return tokens

    return list(await asyncio.gather(*(one(index) for index in range(NUM_STREAMS))))


async def disturbed(engine: Engine, after: int, disturb: Callable[[], None]) -> list[list[int]]:
    """`answers`, with a disturbance once `after` tokens have come."""
    is_done = False

    def on_token(count: int) -> None:
        nonlocal is_done
        if count >= after and not is_done:
            is_done = True
            disturb()

    return await answers(engine, on_token)


async def executor_of(
    node: subprocess.Popen[bytes], name: str = "executor 0", *, other_than: int = 0
) -> psutil.Process:
    """A node's running executor, once it has one."""
    return await living(name, node.pid, other_than=other_than)


def has_executor(node: subprocess.Popen[bytes], name: str = "executor 0") -> bool:
    return bool(named(name, node.pid))


def counters(engine: Engine) -> dict[str, int]:
    return engine.stats().messages_dropped


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """What one engine in one process answers."""

    async def ask() -> list[list[int]]:
        fields: dict[str, Any] = {"dtype": "float32", "num_blocks": 256, "block_size": 4, "max_model_len": 128}
        async with Engine(str(model), num_threads=1, **fields) as engine:
            return await answers(engine)

    return list(run(ask()))


def test_an_executor_on_another_host_may_die_or_hang_and_so_may_the_engine(
    model: Path, expected: list[list[int]], hosts: Network, tmp_path: Path
) -> None:
    keys = Keys(tmp_path)

    async def scenario() -> None:
        with node_on(hosts, next(iter(hosts.hosts)), *keys.flags(hosts.address)) as node:
            async with engine_of(model, keys.nodes(hosts.address)) as engine:
                assert await answers(engine) == expected
                for signum in (signal.SIGKILL, signal.SIGSTOP):
                    victim = await executor_of(node)
                    assert await disturbed(engine, 60, partial(victim.send_signal, signum)) == expected, signum
                    await executor_of(node, other_than=victim.pid)
                # The engine, too, is replaced under an executor that is reached by TCP.
                victim = await living("engine")
                assert await disturbed(engine, 60, victim.kill) == expected
                await living("engine", other_than=victim.pid)
                await until(lambda: engine.is_ready and engine.stats().kv_cache_usage == 0.0)
            await until(lambda: not has_executor(node))

    run(scenario())


@pytest.mark.parametrize("cut_s", [0.3, 4.0], ids=["short-enough-for-TCP", "given-up-and-begun-again"])
def test_a_host_that_is_cut_off_for_a_while_costs_no_stream(
    model: Path, expected: list[list[int]], hosts: Network, tmp_path: Path, cut_s: float
) -> None:
    first = next(iter(hosts.hosts))
    keys = Keys(tmp_path)

    def partition() -> None:
        hosts.cut(first)
        asyncio.get_running_loop().call_later(cut_s, hosts.heal, first)

    async def scenario() -> None:
        with node_on(hosts, first, *keys.flags(hosts.address)):
            async with engine_of(model, keys.nodes(hosts.address)) as engine:
                assert await answers(engine) == expected
                assert await disturbed(engine, 60, partition) == expected
                await until(lambda: engine.is_ready and engine.stats().kv_cache_usage == 0.0)

    run(scenario())


def test_another_host_takes_over_from_one_that_is_cut_off_and_hands_back_when_it_dies(
    model: Path, expected: list[list[int]], hosts: Network, tmp_path: Path
) -> None:
    """What the old executor still computes and says reaches nobody once its host is back."""
    first, second = hosts.hosts
    keys = Keys(tmp_path)
    (tmp_path / "second").mkdir()
    keys_of_second = Keys(tmp_path / "second")
    # Each key is for one node; in whose name its executors may speak is for edge 0 to say.
    keys.allow_list.write_text(
        f"{keys.node.public} node {first}\n{keys_of_second.node.public} node {second}  # the other\n"
    )
    flags = keys.flags(hosts.address)
    flags_of_second = [flags[0], f"--keys={keys_of_second.node_file}", flags[2]]

    async def scenario() -> None:
        with node_on(hosts, first, *flags) as node:
            async with engine_of(model, keys.nodes(hosts.address)) as engine:
                with node_on(hosts, second, *flags_of_second) as other:
                    graph = engine._graph
                    assert isinstance(graph, ProcessGraph) and graph.nodes is not None
                    await until(
                        lambda: len(graph.nodes._nodes) == 2 and all(n.is_prepared for n in graph.nodes._nodes.values())
                    )
                    await executor_of(node)
                    assert await disturbed(engine, 60, lambda: hosts.cut(first)) == expected
                    await executor_of(other)
                    hosts.heal(first)
                    assert await answers(engine) == expected
                    await until(lambda: not has_executor(node) and len(graph.nodes._nodes) == 2)
                    # The whole node dies: back to the first.
                    assert await disturbed(engine, 60, other.kill) == expected
                    await executor_of(node)
                await until(lambda: engine.is_ready and engine.stats().kv_cache_usage == 0.0)
                assert engine.stats().actor_restarts["executor"] >= 2

    run(scenario())


@pytest.mark.parametrize(
    ("num_nodes", "sizes"),
    [(1, {"tensor_parallel_size": 2}), (2, {"pipeline_parallel_size": 2})],
    ids=["first-rank-here", "both-elsewhere"],
)
def test_the_ranks_of_a_group_meet_across_hosts_and_are_replaced_as_one(
    model: Path, expected: list[list[int]], hosts: Network, tmp_path: Path, num_nodes: int, sizes: dict[str, int]
) -> None:
    keys = Keys(tmp_path)

    async def scenario() -> None:
        with contextlib.ExitStack() as stack:
            nodes = [
                stack.enter_context(node_on(hosts, host, *keys.flags(hosts.address), "--slots=1"))
                for host in list(hosts.hosts)[:num_nodes]
            ]
            async with engine_of(model, keys.nodes(hosts.address, num_nodes=num_nodes), **sizes) as engine:
                assert await answers(engine) == expected
                before = [await living(f"executor {rank}") for rank in range(2)]
                assert any(has_executor(node, "executor 1") for node in nodes)
                assert await disturbed(engine, 60, before[1].kill) == expected
                for rank in range(2):  # of a group that is replaced each may come to another node
                    await living(f"executor {rank}", other_than=before[rank].pid)
                await until(lambda: engine.is_ready)
                assert await answers(engine) == expected

    run(scenario())


def test_only_hosts_whose_keys_are_on_the_list_are_heard(
    model: Path, expected: list[list[int]], hosts: Network, tmp_path: Path
) -> None:
    first = next(iter(hosts.hosts))
    keys = Keys(tmp_path)
    stranger = make_keys()
    stranger_file = tmp_path / "stranger"
    write_keys(stranger, stranger_file)

    async def scenario() -> None:
        join = f"--join=tcp://{hosts.address}:{keys.port}"
        with_server_key = f"--server-key={keys.server.public}"
        for wrong in (
            [join, f"--keys={stranger_file}", with_server_key],  # nobody knows this host
            [join, f"--keys={keys.node_file}", f"--server-key={stranger.public}"],  # it takes another for the engine
        ):
            with node_on(hosts, first, *wrong), pytest.raises(NodesMissingError, match="0 of 1 nodes"):
                async with engine_of(model, keys.nodes(hosts.address, timeout_s=4.0)):
                    pass

        with node_on(hosts, first, *keys.flags(hosts.address)) as node:
            async with engine_of(model, keys.nodes(hosts.address)) as engine:

                def revoke() -> None:
                    keys.allow(stranger)
                    asyncio.get_running_loop().call_later(4.0, keys.allow, keys.node)

                got = asyncio.create_task(disturbed(engine, 60, revoke))
                graph = engine._graph
                assert isinstance(graph, ProcessGraph) and graph.nodes is not None
                await until(lambda: "no node has room" in graph.why_not_ready)
                assert not engine.is_ready and counters(engine)["denied_key"] > 0
                await until(lambda: not has_executor(node))
                assert await got == expected
                await until(lambda: engine.is_ready)
                await executor_of(node)
                assert await answers(engine) == expected

    run(scenario())


def test_a_node_serves_the_next_run_of_an_engine_and_nothing_of_the_last(
    model: Path, expected: list[list[int]], hosts: Network, tmp_path: Path
) -> None:
    first = next(iter(hosts.hosts))
    keys = Keys(tmp_path)
    serve = [sys.executable, "-m", "octavo", "serve", str(model), "--port=0", "--num-gpu-blocks-override=64"]
    serve += [
        f"--listen=tcp://{hosts.address}:{keys.port}",
        f"--keys={keys.server_file}",
        f"--allow-list={keys.allow_list}",
    ]

    async def scenario() -> None:
        with node_on(hosts, first, *keys.flags(hosts.address)) as node:
            last_run = subprocess.Popen(serve)
            try:
                old = await executor_of(node)
            finally:
                last_run.kill()
                last_run.wait()
            async with engine_of(model, keys.nodes(hosts.address)) as engine:
                assert await answers(engine) == expected
                await executor_of(node, other_than=old.pid)
                assert not title(old), "the two must never run beside each other"
            node.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(node.wait) == 0

    run(scenario())


def test_a_node_with_another_checkpoint_is_turned_away_and_both_sides_say_why(
    model: Path, hosts: Network, tmp_path: Path
) -> None:
    first = next(iter(hosts.hosts))
    keys = Keys(tmp_path)
    other_model = tmp_path / "model"
    save_servable("llama", other_model, seed=1)  # the same configuration, other weights
    log = tmp_path / "log"

    async def scenario() -> None:
        with node_on(hosts, first, *keys.flags(hosts.address), f"--model={other_model}", log=log) as node:
            await until(lambda: "node.joins" in log.read_text())  # the slow part of a start is behind it
            with pytest.raises(NodesMissingError, match=r"unfit: .*is not the engine's"):
                async with engine_of(model, keys.nodes(hosts.address, timeout_s=12.0)):
                    pass
            assert await asyncio.to_thread(node.wait) == 2
        assert "Give the same one with --model" in log.read_text()

    run(scenario())


def test_of_two_nodes_of_one_name_the_first_ends_and_says_so(
    model: Path, expected: list[list[int]], hosts: Network, tmp_path: Path
) -> None:
    first, second = hosts.hosts
    keys = Keys(tmp_path)
    log = tmp_path / "log"

    async def scenario() -> None:
        flags = [*keys.flags(hosts.address), "--name=twin"]
        with node_on(hosts, first, *flags, log=log) as node:
            async with engine_of(model, keys.nodes(hosts.address)) as engine:
                with node_on(hosts, second, *flags) as twin:
                    assert await asyncio.to_thread(node.wait) == 2
                    await until(lambda: has_executor(twin) and engine.is_ready)
                    assert await answers(engine) == expected
        assert "another node joined as twin" in log.read_text()

    run(scenario())
