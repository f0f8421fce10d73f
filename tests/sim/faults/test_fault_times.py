"""Faults of which it matters when things happen: recovery that is disturbed, delays, slow clients and overload."""

from __future__ import annotations

import pytest
from fault_scenarios import CONFIG, PROCESSES, TOPOLOGIES, assert_all_finish, at, client, reasons, run, scenario
from msgspec.structs import replace

from octavo.messages.sampling import SamplingParams
from octavo.sim.faults.scenario import MS, Client, Topology
from octavo.sim.faults.world import World

# -- an executor that dies again and again ----------------------------------------------------------------------------


RECOVERY = {
    "scheduler": replace(CONFIG, max_executor_losses=9),  # nobody is to be taken for the cause
    "load_ns": 100 * MS,
    "notice_ns": 0,
    "link_ns": 0,
}


@pytest.mark.parametrize("topology", PROCESSES)
def test_f_05_an_executor_killed_three_times_before_its_replacement_is_ready_is_started_a_fourth_time(
    topology: Topology,
) -> None:
    # The first replacement starts at once, the next ones 100, 500 and 2000 ms later: each is killed as it loads.
    faults = [at("crash", ms) for ms in (5, 5.5, 106, 607)]
    world = run(scenario(*faults, topology=topology, **RECOVERY))
    assert_all_finish(world)
    times_ms = [restart_ns // MS for restart_ns in world._supervisor.restarts_ns]
    assert times_ms == [5, 5, 106, 607], "each of them hit one that was being started"
    assert world._agenda.now_ns > 2607 * MS, "and the last one was waited for"


@pytest.mark.parametrize("topology", PROCESSES)
def test_f_05_beyond_the_budget_everybody_is_told_with_a_code_and_nothing_is_started_any_more(
    topology: Topology,
) -> None:
    faults = [at("crash", ms) for ms in (5, 5.5, 106, 607)]
    world = World(scenario(*faults, topology=topology, **RECOVERY, max_restarts=3))
    assert not world.run().kind
    assert world._supervisor.has_given_up
    assert not world._supervisor.is_ready
    ends = [stream.ended for stream in world._front_end.streams.values()]
    assert {ended.error_code for ended in ends if ended is not None and ended.reason == "error"} == {"executor_lost"}
    assert None not in ends
    assert len(world._supervisor.restarts_ns) == 3


# -- order and delay --------------------------------------------------------------------------------------------------


def test_f_28_steps_that_overtake_the_news_of_their_epoch_wait_for_it() -> None:
    # The new epoch goes to the executor from the edge, its steps from the engine: two ways of different length.
    num_overtaken = num_late = 0
    for hop_ns in (0, 10_000, 300_000, 2 * MS):
        for moment in (3, 5, 6, 8):
            for kind in ("garble", "crash", "engine_lost"):
                world = run(scenario(at(kind, moment), hop_ns=hop_ns, link_ns=3 * MS))
                assert_all_finish(world)
                num_overtaken += world._device.num_overtaken
                num_late += world._losses.ring.scheduler.stats().num_dropped_messages
    assert num_overtaken > 0, "something was reordered"
    assert num_late > 0, "and results of the old epoch came behind the news of the new one"


@pytest.mark.parametrize("link", range(6))
def test_f_29_clients_with_deadlines_are_answered_in_time_or_told_although_a_link_stands_still_for_a_minute(
    link: int,
) -> None:
    clients = tuple(client(number, timeout_ns=(5 + 10 * number) * 1_000 * MS) for number in range(8))
    world = run(scenario(at("clog", 6, 60_000, choice=link / 6), clients=clients))
    streams = world._front_end.streams.values()
    assert set(reasons(world)) <= {"length", "stop", "abort"}
    for stream in streams:
        assert stream.ended is not None
        if stream.ended.reason == "abort":
            assert stream.deadline_ns <= stream.ended_ns <= max(stream.deadline_ns, 60_006 * MS) + 1_000 * MS
    # What was said before the minute and heard behind it has changed nothing: every answer is its own (I2), nothing is
    # held (I3), and nobody was taken for dead for longer than a link that bears beats stood still.
    assert world._losses.num_engine_losses + len(world._supervisor.restarts_ns) <= 1


# -- clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_f_38_a_client_that_reads_slowly_costs_the_others_not_a_nanosecond(topology: Topology) -> None:
    def ended_ns(read_every_ns: int) -> tuple[dict[int, int], int, int]:
        # The last one: nobody comes behind it, who could take its place when it is cut off.
        slow = client(8, read_every_ns=read_every_ns, read_buffer=3, at_ns=0)
        clients = (*(client(number, at_ns=0) for number in range(8)), slow)
        world = run(scenario(topology=topology, clients=clients, link_ns=0, hop_ns=0, step_ns=MS))
        others = {
            stream.request_id: stream.ended_ns
            for stream in world._front_end.streams.values()
            if stream.client is not slow and stream.ended is not None
        }
        num_cut = sum(stream.is_given_up for stream in world._front_end.streams.values())
        return others, num_cut, world._losses.ring.scheduler.stats().num_steps

    quick, num_cut, num_steps = ended_ns(0)
    assert num_cut == 0
    beside_slow, num_cut, num_steps_beside = ended_ns(1_000 * MS)
    assert num_cut == 1, "it is cut off at its bound"
    assert beside_slow == quick, "each of the others ends at the very same moment"
    assert num_steps_beside <= num_steps


# -- overload ---------------------------------------------------------------------------------------------------------


def load(num_clients: int, gap_ns: int, first_ns: int = 0) -> tuple[Client, ...]:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, seed=0)
    return tuple(
        Client(at_ns=first_ns + number * gap_ns, prompt=(number % 8, 1 + number // 8 % 7, 3), params=params)
        for number in range(num_clients)
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_f_58_five_times_too_much_costs_no_goodput_drains_and_leaves_nothing_behind(topology: Topology) -> None:
    config = replace(CONFIG, num_blocks=32, max_num_seqs=4, max_num_queued_requests=8, enable_prefix_caching=False)

    def served(clients: tuple[Client, ...]) -> World:
        return run(
            scenario(topology=topology, scheduler=config, clients=clients, step_ns=MS, checks_each_message=False)
        )

    def done_between(world: World, begin_ns: int, end_ns: int) -> int:
        streams = world._front_end.streams.values()
        return sum(
            s.ended is not None and s.ended.reason == "length" and begin_ns < s.ended_ns <= end_ns for s in streams
        )

    alone = served(load(1, 0))
    (one,) = alone._front_end.streams.values()
    alone_ns = one.ended_ns
    # Four at a time, each about as long as one alone: so many are the peak, offered just as quickly as they are served.
    gap_ns = alone_ns // 4
    phase_ns = 400 * MS
    at_peak = served(load(phase_ns // gap_ns, gap_ns))
    peak = done_between(at_peak, 100 * MS, phase_ns)
    overload = load(5 * phase_ns // gap_ns, gap_ns // 5)
    quiet_ns = overload[-1].at_ns + 500 * MS
    world = served((*overload, *load(4, 50 * MS, quiet_ns)))
    ends = [stream.ended for stream in world._front_end.streams.values() if stream.ended is not None]
    refused = [ended for ended in ends if ended.reason == "refused"]
    assert len(refused) > len(overload) // 2
    assert {ended.error_code for ended in refused} == {"queue_full"}
    assert done_between(world, 100 * MS, phase_ns) >= 0.9 * peak, "goodput"
    drained_ns = max(s.ended_ns for s in world._front_end.streams.values() if s.client.at_ns < quiet_ns)
    assert drained_ns <= overload[-1].at_ns + 6 * alone_ns, "the queue of eight is worked off at once"
    late = [stream for stream in world._front_end.streams.values() if stream.client.at_ns >= quiet_ns]
    assert [stream.ended.reason for stream in late if stream.ended is not None] == 4 * ["length"]
    assert all(stream.ended_ns - stream.client.at_ns <= 2 * alone_ns for stream in late), "as if nothing had been"
