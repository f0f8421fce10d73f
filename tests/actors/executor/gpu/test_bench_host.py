"""The harness under a clock of its own: every look at it takes a microsecond, and the rest takes nothing."""

from __future__ import annotations

import pytest

from octavo.actors.executor.gpu.bench_host import HostLoop, Timeline, percentile, scenarios
from octavo.actors.executor.gpu.counted_forward import Launches


class TickingClock:
    def __init__(self) -> None:
        self.at_ns = 0

    def now_ns(self) -> int:
        self.at_ns += 1000
        return self.at_ns

    def wait_until(self, at_ns: int) -> None:
        self.at_ns = max(self.at_ns, at_ns)


class SetClock(TickingClock):
    def now_ns(self) -> int:
        return self.at_ns


def test_a_device_works_in_order_and_is_idle_between_what_comes_too_late() -> None:
    clock = SetClock()
    device = Timeline(clock, step_ns=100)
    first, second = device.submit(lambda: None), device.submit(lambda: None)
    assert (first.is_done(), second.is_done()) == (False, False)
    clock.at_ns = 100
    assert (first.is_done(), second.is_done()) == (True, False)
    second.wait()
    assert (clock.at_ns, device.waited_ns, device.idle_ns) == (200, 100, 0)
    clock.at_ns = 230
    device.submit(lambda: None).wait()
    assert (clock.at_ns, device.waited_ns, device.idle_ns, device.busy_ns) == (330, 200, 30, 300)
    device.restart()
    device.submit(lambda: None)
    assert (device.idle_ns, device.busy_ns) == (0, 100)


@pytest.mark.parametrize(("output_tokens", "come_and_go"), [((500, 500), False), ((5, 20), True)])
def test_a_device_that_is_slower_than_the_host_is_never_idle(output_tokens: tuple[int, int], come_and_go: bool) -> None:
    clock = TickingClock()
    loop = HostLoop(num_running=6, output_tokens=output_tokens, step_ns=10_000_000, clock=clock)
    loop.run(10)
    started_ns = clock.at_ns
    measured = loop.run(50)
    assert measured.idle_share == 0.0
    assert clock.at_ns - started_ns == pytest.approx(50 * 10_000_000, rel=0.03)
    steps = measured.of_steps()
    assert len(steps) == 50
    assert all(len(times) == 50 for times in measured.stages.values())
    assert min(steps) >= 6000  # looks at the clock, and no time that was spent waiting
    assert max(steps) < 1_000_000
    assert (measured.num_ended > 0) == come_and_go
    if not come_and_go:
        assert measured.num_sampled == 50 * 6


def test_a_device_that_is_quicker_is_idle_for_as_long_as_the_host_takes() -> None:
    clock = TickingClock()
    loop = HostLoop(num_running=3, output_tokens=(500, 500), step_ns=500, clock=clock)
    loop.run(10)
    started_ns = clock.at_ns
    measured = loop.run(40)
    assert measured.idle_share == pytest.approx(1 - 40 * 500 / (clock.at_ns - started_ns), abs=0.05)


def test_percentiles_are_values_that_were_measured() -> None:
    values = [50, 10, 40, 20, 30]
    assert [percentile(values, share) for share in (0.0, 0.2, 0.5, 0.8, 0.99, 1.0)] == [10, 10, 30, 40, 50, 50]
    assert percentile([7], 0.5) == 7


def test_a_step_is_done_no_sooner_than_it_is_launched_and_the_device_waits_meanwhile() -> None:
    clock, launches = SetClock(), Launches()
    device = Timeline(clock, step_ns=100, token_ns=2, launch_ns=5, launches=launches)

    def work(count: int, chunk_tokens: int) -> None:
        launches.count += count
        launches.chunk_tokens += chunk_tokens

    device.submit(lambda: work(4, 10)).wait()  # launched in 20, computed in 120
    assert (clock.at_ns, device.idle_ns, device.busy_ns, device.charged_ns) == (120, 0, 120, 20)
    device.submit(lambda: work(60, 10)).wait()  # launched in 300, computed in 120
    assert (clock.at_ns, device.idle_ns, device.busy_ns, device.charged_ns) == (420, 180, 240, 320)
    device.submit(lambda: work(2, 0))
    device.submit(lambda: work(16, 0)).wait()  # launched while the one before is computed
    assert (clock.at_ns, device.idle_ns) == (420 + 200, 180)
    assert device.num_launches == [4, 60, 2, 16]


def test_steps_with_chunks_cost_hundreds_of_launches_or_a_graph() -> None:
    found = {}
    for name, options in scenarios(40).items():
        loop = HostLoop(
            num_running=20,
            step_ns=200_000,
            clock=TickingClock(),
            launch_ns=5000,
            **options | {"output_tokens": (5, 20)},
        )
        loop.run(20)
        found[name] = loop.run(40)
    launched, graphs = found["in chunks, launched"], found["in chunks, graphs"]
    assert launched.launches > 300
    assert graphs.launches < 6
    assert launched.idle_share > 0.8 > 0.1 > graphs.idle_share
    assert sum(launched.launching) > len(launched.launching) * 300 * 5000
    assert sum(launched.with_launching()) == sum(launched.of_steps()) + sum(launched.launching)
    # Launching is in none of the stages.
    assert sum(launched.of_steps()) < 2 * sum(graphs.of_steps())
    assert launched.num_sampled == graphs.num_sampled
