from __future__ import annotations

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.sampling import SamplingParams
from octavo.sim.faults.scenario import Client, Fault, Scenario, draw_scenario
from octavo.sim.faults.shrink import describe_scenario, shrink


def make(num_clients: int, num_faults: int) -> Scenario:
    clients = tuple(
        Client(at_ns=i, prompt=tuple(range(9)), params=SamplingParams(max_tokens=16, stop=("ab",)), priority=i)
        for i in range(num_clients)
    )
    faults = tuple(Fault("crash", 1000 * i) for i in range(num_faults))
    config = SchedulerConfig(num_blocks=20, block_size=2, max_model_len=30)
    return Scenario(seed=1, scheduler=config, topology="edge+engine", clients=clients, faults=faults, link_ns=5)


def test_only_what_is_needed_is_left() -> None:
    def fails(scenario: Scenario) -> bool:
        return any(client.priority == 5 and len(client.prompt) >= 4 for client in scenario.clients) and any(
            fault.at_ns >= 2000 for fault in scenario.faults
        )

    small = shrink(make(12, 6), fails)
    assert fails(small)
    assert len(small.clients) == len(small.faults) == 1
    assert len(small.clients[0].prompt) == 4
    assert small.clients[0].params.stop == ()
    assert (small.topology, small.link_ns) == ("one", 0)
    assert "fault: kind='crash'" in "\n".join(describe_scenario(small))


def test_shrinking_is_bounded() -> None:
    num_runs = 0

    def fails(scenario: Scenario) -> bool:
        nonlocal num_runs
        num_runs += 1
        return True

    shrink(make(12, 6), fails, max_runs=7)
    assert num_runs == 7


def test_a_seed_always_draws_the_same_scenario() -> None:
    assert draw_scenario(11) == draw_scenario(11)
    assert draw_scenario(11) != draw_scenario(12)
