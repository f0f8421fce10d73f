"""Small engines with clients, on which a fault is tried at a moment of one's choice."""

from __future__ import annotations

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.sampling import SamplingParams
from octavo.sim.faults.scenario import MS, Client, Fault, FaultKind, Scenario, Topology
from octavo.sim.faults.world import World

CONFIG = SchedulerConfig(
    num_blocks=256, block_size=4, max_model_len=64, max_num_seqs=16, max_num_batched_tokens=24, vocab_size=8
)
TOPOLOGIES: tuple[Topology, ...] = ("one", "edge+engine", "edge+scheduler+allocator")
PROCESSES = TOPOLOGIES[1:]


def client(number: int, **fields) -> Client:
    fields = {"at_ns": number * MS // 4, "prompt": tuple((number + i * i) % 8 for i in range(9 + number)), **fields}
    params = SamplingParams(
        max_tokens=12,
        seed=number,
        temperature=0.0,
        ignore_eos=True,
        n=1 + number % 2,
        stop=("bad",) if number == 3 else (),
    )
    return Client(**{"params": params, **fields})


def scenario(*faults: Fault, num_clients: int = 8, **fields) -> Scenario:
    fields = {
        "scheduler": CONFIG,
        "topology": "edge+engine",
        "link_ns": 50_000,
        "step_ns": MS,
        "load_ns": 2 * MS,
        "notice_ns": 2 * MS,
        "checks_each_message": True,
        "clients": tuple(client(number) for number in range(num_clients)),
        **fields,
    }
    return Scenario(seed=7, faults=faults, **fields)


def run(what: Scenario) -> World:
    world = World(what)
    result = world.run()
    assert not result.kind, f"{result.kind}: {result.detail}\n" + "\n".join(result.waits)
    return world


def reasons(world: World) -> list[str]:
    return [stream.ended.reason for stream in world._front_end.streams.values() if stream.ended is not None]


def assert_all_finish(world: World) -> None:
    assert set(reasons(world)) <= {"length", "stop"}
    assert len(reasons(world)) == len(world._front_end.streams)


def at(kind: FaultKind, ms: float, duration_ms: float = 1, choice: float = 0.0) -> Fault:
    return Fault(kind, int(ms * MS), int(duration_ms * MS), choice)


MOMENTS = [0.1, 1.3, 2.6, 4.1, 5.5, 7.2, 8.6, 9.9]
"""Milliseconds; the prompts are computed until about 5, and the last answer ends at about 12."""
