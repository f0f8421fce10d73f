"""The faults of an actor graph, one by one: as far as they can be simulated; see also `test_fault_times`.

Every run compares each client's tokens, text and account with those of the undisturbed answer (I1, I2), and at its end
nothing may be held or be under way (I3).
"""

from __future__ import annotations

import random
from array import array

import pytest
from fault_scenarios import (
    CONFIG,
    MOMENTS,
    PROCESSES,
    TOPOLOGIES,
    assert_all_finish,
    at,
    client,
    reasons,
    run,
    scenario,
)
from msgspec.structs import replace

from octavo.actors.runtime.routes import Address
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.sampling import SamplingParams
from octavo.sim.faults.device import HANG_WAYS, HangWay
from octavo.sim.faults.garble import NUM_WAYS
from octavo.sim.faults.network import ADDRESSES
from octavo.sim.faults.places import PLACES
from octavo.sim.faults.scenario import MS, Client, FaultKind, Scenario, Topology
from octavo.sim.faults.world import World

# -- an executor dies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_f_01_an_idle_executor_is_replaced_and_nobody_sees_it(topology: Topology) -> None:
    late = tuple(replace(client(number), at_ns=60 * MS) for number in range(3))
    world = run(scenario(at("crash", 20), clients=late, topology=topology))
    assert_all_finish(world)
    assert world._losses.ring.num_losses == 1


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_f_02_f_03_f_04_an_executor_killed_at_any_moment_repeats_and_loses_no_token(
    topology: Topology, moment: float
) -> None:
    world = run(scenario(at("crash", moment), topology=topology))
    assert_all_finish(world)
    assert world._losses.ring.num_losses == 1


def test_f_04_results_under_way_when_the_executor_dies_are_taken_or_lost_but_never_half() -> None:
    # A slow link: when the executor is killed, results of several steps are under way, of which some arrive.
    num_late = 0
    for moment in range(4, 60, 3):
        world = run(scenario(at("crash", moment / 2), link_ns=3 * MS, notice_ns=0))
        assert_all_finish(world)
        num_late += world._losses.ring.scheduler.stats().num_dropped_messages
    assert num_late > 0, "some arrive when the scheduler has heard of the loss"


def test_f_05_an_executor_that_dies_in_its_recovery_is_started_again() -> None:
    faults = [at("crash", 5 + i * 0.7) for i in range(4)]
    world = run(scenario(*faults))
    assert_all_finish(world)
    assert 1 < world._losses.ring.num_losses <= 4


def test_f_05_one_that_dies_more_often_than_its_budget_ends_every_request_with_an_error() -> None:
    world = World(scenario(*[at("crash", 5 + 6 * i) for i in range(4)], max_restarts=2))
    assert not world.run().kind
    assert world._is_broken
    assert "error" in reasons(world)
    assert len(reasons(world)) == len(world._front_end.streams), "everybody is told"


LONG = {"step_ns": 100 * MS}
"""Answers take about a second, so that the supervisor has heard how long steps take."""


@pytest.mark.parametrize("topology", PROCESSES)
@pytest.mark.parametrize("way", HANG_WAYS)
def test_f_07_an_executor_that_hangs_is_found_within_three_seconds_and_replaced(
    topology: Topology, way: HangWay
) -> None:
    choice = (HANG_WAYS.index(way) + 0.5) / len(HANG_WAYS)
    world = run(scenario(at("hang", 600, 60_000, choice), topology=topology, **LONG))
    assert_all_finish(world)
    (found_ns,) = world._supervisor.restarts_ns
    # A stopped one is seen by the system, a silent one lacks its beats, one that computes is given longer, and one at a
    # step has ten times as long as steps take, and a second.
    limit_ms = {"stopped": 500, "silent": 1_900, "computing": 3_400, "at its step": 2_500}[way]
    assert 600 * MS < found_ns <= (600 + limit_ms) * MS
    assert world._losses.ring.num_losses == 1


def test_f_07_a_hang_that_ends_in_time_costs_nothing() -> None:
    for way in range(len(HANG_WAYS)):
        choice = (way + 0.5) / len(HANG_WAYS)
        world = run(scenario(at("hang", 600, 200, choice), **LONG))
        assert_all_finish(world)
        assert not world._supervisor.restarts_ns


def test_f_07_a_thread_that_hangs_is_waited_for() -> None:
    world = run(scenario(at("hang", 6, 3000), topology="one"))
    assert_all_finish(world)
    assert world._losses.ring.num_losses == 0


@pytest.mark.parametrize("topology", PROCESSES)
def test_f_07_an_engine_that_stands_still_is_found_by_its_silence_and_replaced(topology: Topology) -> None:
    engine = PLACES[topology]["scheduler"]
    places = list(dict.fromkeys(PLACES[topology].values()))
    choice = (places.index(engine) + 0.5) / len(places)
    world = run(scenario(at("stall", 6, 60_000, choice), topology=topology))
    assert_all_finish(world)
    assert world._losses.num_engine_losses == 1
    assert world._ledger.num_resubmitted > 0


@pytest.mark.parametrize("topology", PROCESSES)
def test_f_08_what_a_given_up_executor_says_later_is_ignored(topology: Topology) -> None:
    world = run(scenario(at("partition", 6, 5000), topology=topology, link_ns=0))
    assert_all_finish(world)
    assert world._losses.ring.num_losses == 1
    assert world._supervisor.num_late_messages > 0, "it has gone on beating"


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("pause_ms", [1_020, 3_000, 60_000])
def test_f_48_when_everybody_stands_still_for_a_while_nobody_is_replaced(topology: Topology, pause_ms: int) -> None:
    # Around the beats of 500 ms, some of which are heard after the pause that they were sent before.
    for tick in range(12):
        pause = at("pause", 500 + tick / 4, pause_ms)
        world = run(scenario(pause, topology=topology, link_ns=3 * MS, **LONG))
        assert_all_finish(world)
        assert world._losses.ring.num_losses == world._losses.num_engine_losses == 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_f_09_an_executor_that_is_ten_times_as_slow_for_100_steps_is_left_alone(topology: Topology) -> None:
    clients = tuple(client(number % 12, at_ns=number * 300 * MS) for number in range(60))
    usual = run(scenario(topology=topology, step_ns=20 * MS, clients=clients))
    world = run(scenario(at("slow", 100), topology=topology, step_ns=20 * MS, clients=clients))
    assert_all_finish(world)
    assert not world._supervisor.restarts_ns
    assert world._losses.num_engine_losses == 0
    assert world._losses.ring.scheduler.stats().num_steps > 120, "it became quick again"
    assert world._agenda.now_ns > usual._agenda.now_ns - 1_000 * MS, "it was slow"


# -- it says what cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", range(NUM_WAYS))
def test_f_16_results_that_cannot_be_cost_a_step_and_no_token(way: int) -> None:
    world = run(scenario(at("garble", 6, choice=(way + 0.5) / NUM_WAYS)))
    assert_all_finish(world)
    assert world._losses.ring.num_losses == 1
    assert world._losses.ring.scheduler.stats().num_faulty_results == 1


def test_f_24_a_row_that_fails_ends_alone() -> None:
    world = run(scenario(at("fail_row", 6)))
    assert reasons(world).count("error") == 1
    assert world._losses.ring.num_losses == 0


# -- scheduler and allocator die --------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", PROCESSES)
@pytest.mark.parametrize("moment", MOMENTS)
def test_f_21_f_22_an_engine_killed_at_any_moment_is_rebuilt_from_recipes(topology: Topology, moment: float) -> None:
    world = run(scenario(at("engine_lost", moment), topology=topology))
    assert_all_finish(world)
    assert world._ledger.num_resubmitted > 0
    assert world._losses.ring.scheduler.stats().num_resumed == world._ledger.num_resubmitted
    assert world._losses.ring.epoch == 1


@pytest.mark.parametrize("actor", ["scheduler", "kv_allocator"])
@pytest.mark.parametrize("topology", PROCESSES)
def test_f_20_f_22_an_exception_of_scheduler_or_allocator_costs_its_process_and_no_stream(
    actor: Address, topology: Topology
) -> None:
    actors = [address for address in ADDRESSES if address != "executor"]
    world = run(scenario(at("defect", 6, choice=(actors.index(actor) + 0.5) / len(actors)), topology=topology))
    assert_all_finish(world)
    assert world._ledger.num_resubmitted > 0


def test_f_21_what_reached_the_edge_comes_back_as_output_and_not_as_prompt() -> None:
    world = run(scenario(at("engine_lost", 9)))
    recipes = world._losses.ring.submitted.values()
    assert any(recipe.output_token_ids for recipe in recipes)
    for recipe in recipes:
        oracle = world._oracles[recipe.request_id]
        known = array("i", recipe.output_token_ids).tolist()
        assert known == oracle.outputs()[: len(known)]
        assert recipe.prompt_token_ids == oracle.submit.prompt_token_ids


@pytest.mark.parametrize("topology", PROCESSES)
def test_f_21_an_engine_that_dies_between_the_last_token_and_the_news_of_the_end_ends_it_once(
    topology: Topology,
) -> None:
    num_cut = 0
    for quarter in range(16, 40):
        world = run(scenario(at("engine_lost", quarter / 4, choice=0.9), topology=topology))
        assert_all_finish(world)
        for recipe in world._losses.ring.submitted.values():
            num_cut += len(recipe.output_token_ids) // 4 == world._oracles[recipe.request_id].num_outputs
    assert num_cut > 0


def test_f_21_an_engine_that_dies_before_it_was_ready_for_the_first_time_is_replaced_like_any_other() -> None:
    world = run(scenario(at("engine_lost", 0), hop_ns=50_000))
    assert_all_finish(world)
    assert world._losses.num_engine_losses == 1


def test_f_21_engine_and_executor_die_again_and_again() -> None:
    faults = [at("engine_lost" if i % 2 else "crash", 3 + 2.3 * i) for i in range(9)]
    world = run(scenario(*faults))
    assert_all_finish(world)


def test_f_21_a_cancel_while_the_engine_is_down_is_not_forgotten() -> None:
    clients = (client(0, cancel_after_ns=8 * MS), client(1), client(2, cancel_after_tokens=2))
    world = run(scenario(at("engine_lost", 7), clients=clients, notice_ns=20 * MS))
    assert all(stream.is_given_up or stream.ended for stream in world._front_end.streams.values())


def test_f_21_f_52_an_engine_lost_while_draining_finishes_what_it_had_accepted_and_takes_no_more() -> None:
    clients = (*(client(number) for number in range(5)), client(6, at_ns=60 * MS))
    world = run(scenario(at("drain", 4), at("engine_lost", 6), clients=clients))
    assert reasons(world)[-1] == "refused"
    assert set(reasons(world)[:-1]) <= {"length", "stop"}


# -- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", MOMENTS)
def test_f_26_results_that_get_lost_are_noticed_and_computed_again(moment: float) -> None:
    world = run(scenario(at("lose_result", moment)))
    assert_all_finish(world)
    assert world._losses.ring.num_losses == 1


def test_f_26_results_that_get_lost_are_noticed_though_nobody_waits_for_them_any_more() -> None:
    clients = tuple(client(number, cancel_after_ns=20 * MS) for number in range(8))
    world = run(scenario(at("lose_results", 6, 200), clients=clients))
    assert world._front_end.num_live == 0
    assert world._losses.num_engine_losses == 1, "or its pipeline would be full for ever"


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_f_27_messages_that_come_twice_count_once(topology: Topology) -> None:
    faults = (at("crash", 5), at("engine_lost", 9), at("crash", 14))
    world = run(scenario(*faults, topology=topology, duplicate_rate=0.5))
    assert_all_finish(world)
    assert world._losses.ring.scheduler.stats().num_dropped_messages > 0


def test_f_28_actors_and_links_in_any_order_hold_the_order_that_matters() -> None:
    for hop_ns in (10_000, 300_000, 2 * MS):
        assert_all_finish(run(scenario(at("crash", 6), hop_ns=hop_ns, link_ns=MS)))


@pytest.mark.parametrize("delay_ms", [1, 50, 1000, 60_000])
@pytest.mark.parametrize("link", range(6))
def test_f_29_a_link_that_stands_still_for_a_while_delays_and_loses_nothing(delay_ms: int, link: int) -> None:
    world = run(scenario(at("clog", 6, delay_ms, choice=link / 6)))
    assert_all_finish(world)
    assert world._losses.ring.num_losses == 0


@pytest.mark.parametrize("moment", MOMENTS)
def test_f_35_two_sides_of_a_partition_both_alive_give_each_token_once(moment: float) -> None:
    world = run(scenario(at("partition", moment, 5000)))
    assert_all_finish(world)
    (found_ns,) = world._supervisor.restarts_ns
    assert found_ns < (moment + 2000) * MS
    assert world._losses.ring.num_losses == 1


def test_f_35_the_executor_that_was_fenced_off_has_spoken_in_vain() -> None:
    world = run(scenario(at("partition", 6, 5000), clients=tuple(client(number) for number in range(16))))
    assert_all_finish(world)
    assert world._losses.ring.scheduler.stats().num_dropped_messages > 0


def test_f_35_a_partition_that_ends_soon_costs_nothing_but_time() -> None:
    world = run(scenario(at("partition", 6, 300)))
    assert_all_finish(world)
    assert not world._supervisor.restarts_ns


@pytest.mark.parametrize("moment", MOMENTS)
def test_f_36_results_lost_while_commands_arrive_give_each_token_once(moment: float) -> None:
    world = run(scenario(at("lose_results", moment, 5)))
    assert_all_finish(world)
    # The next results show the gap; if there are none, it is the engine that is replaced.
    assert world._losses.ring.num_losses + world._losses.num_engine_losses >= 1


@pytest.mark.parametrize("topology", PROCESSES)
def test_f_37_links_that_stop_one_by_one_and_go_on_in_another_order_delay_and_lose_nothing(topology: Topology) -> None:
    for seed in range(30):
        chance = random.Random(seed)
        links = chance.sample(range(6), chance.randrange(2, 7))
        clogs = [
            at("clog", 1 + 2 * number + chance.random(), chance.choice((5, 20, 300)), choice=link / 6)
            for number, link in enumerate(links)
        ]
        world = run(scenario(*clogs, topology=topology))
        assert_all_finish(world)
        assert world._losses.ring.num_losses == 0
        crashes = [at("crash", chance.uniform(1, 40)), at("engine_lost", chance.uniform(1, 40))]
        assert_all_finish(run(scenario(*clogs, *crashes, topology=topology)))


# -- requests that kill executors -------------------------------------------------------------------------------------


def poisoned(numbers: dict[int, str], *, budget: int = 2048, depth: int = 2) -> Scenario:
    config = SchedulerConfig(
        num_blocks=1000,
        block_size=4,
        max_model_len=64,
        max_num_seqs=64,
        max_num_batched_tokens=budget,
        pipeline_depth=depth,
    )
    clients = []
    for number in range(64):
        params = SamplingParams(max_tokens=16, seed=0, temperature=0.0, ignore_eos=True)
        prompt = (1 + number % 6, 1 + number // 6 % 6, 2, number // 36 + 1)
        flags = {numbers[number]: True} if number in numbers else {}
        clients.append(Client(at_ns=0, prompt=prompt, params=params, **flags))
    return scenario(scheduler=config, clients=tuple(clients), checks_each_message=False, link_ns=0)


def convicts(world: World) -> list[int]:
    return [
        stream.request_id
        for stream in world._front_end.streams.values()
        if stream.ended is not None and stream.ended.error_code == "request_quarantined"
    ]


@pytest.mark.parametrize("budget", [2048, 64, 20])
@pytest.mark.parametrize("poison", [0, 1, 7, 30, 31, 32, 33, 47, 62, 63])
def test_f_31_a_poison_among_64_is_found_within_8_losses_and_63_are_identical(poison: int, budget: int) -> None:
    world = run(poisoned({poison: "is_poison"}, budget=budget))
    assert convicts(world) == [poison]
    assert sorted(reasons(world)) == ["error"] + 63 * ["length"]
    assert world._losses.ring.num_losses <= 8


def test_f_31_the_search_is_no_longer_when_others_end_meanwhile() -> None:
    for seed in range(13, 28):
        rng = random.Random(seed)
        poison = rng.randrange(64)
        what = poisoned({poison: "is_poison"}, budget=rng.choice([2048, 64, 20]))
        clients = list(what.clients)
        for number, one in enumerate(clients):
            if number != poison:
                clients[number] = replace(one, params=replace(one.params, max_tokens=rng.choice([1, 2, 3, 5, 9, 16])))
        world = run(replace(what, clients=tuple(clients)))
        assert convicts(world) == [poison]
        assert world._losses.ring.num_losses <= 8


def test_f_31_a_poison_that_comes_later_is_found_at_once() -> None:
    what = poisoned({63: "is_poison"})
    clients = (*what.clients[:63], replace(what.clients[63], at_ns=8 * MS))
    world = run(replace(what, clients=clients))
    assert convicts(world) == [63]
    assert world._losses.ring.num_losses == 3


def test_f_31_a_poison_that_comes_again_is_refused_and_kills_nobody() -> None:
    what = poisoned({5: "is_poison"})
    again = replace(what.clients[5], at_ns=500 * MS, params=replace(what.clients[5].params, seed=9, max_tokens=3))
    world = run(replace(what, clients=(*what.clients, again)))
    ended = world._front_end.streams[64].ended
    assert (ended.reason, ended.error_code) == ("refused", "request_quarantined")
    assert world._losses.ring.num_losses <= 8


@pytest.mark.parametrize("pair", [(0, 63), (10, 40), (62, 63), (31, 32), (3, 4)])
def test_f_32_two_independent_poisons_are_both_found(pair: tuple[int, int]) -> None:
    world = run(poisoned(dict.fromkeys(pair, "is_poison")))
    assert convicts(world) == sorted(pair)
    assert world._losses.ring.num_losses <= 16


@pytest.mark.parametrize("pair", [(0, 63), (10, 40), (62, 63), (31, 32), (3, 4)])
def test_f_33_two_that_kill_only_in_company_cost_a_bounded_number_of_losses(pair: tuple[int, int]) -> None:
    world = run(poisoned(dict.fromkeys(pair, "is_poison_in_company")))
    assert set(convicts(world)) <= set(pair)
    assert len(reasons(world)) == 64
    assert reasons(world).count("length") >= 62
    assert world._losses.ring.num_losses <= 8


# -- memory and clients -----------------------------------------------------------------------------------------------


def test_f_39_with_all_blocks_spent_the_oldest_goes_on_and_everybody_finishes() -> None:
    config = replace(CONFIG, num_blocks=9, max_model_len=36)
    clients = tuple(client(number, prompt=(1 + number, 2, 3), at_ns=number) for number in range(6))
    world = run(scenario(scheduler=config, clients=clients))
    assert_all_finish(world)
    assert world._losses.ring.scheduler.stats().num_preemptions > 3
    order = [stream.request_id for stream in world._front_end.streams.values()]
    assert world._front_end.streams[order[0]].ended.num_preemptions == 0


def test_f_39_a_loss_and_a_new_engine_while_blocks_are_short() -> None:
    config = replace(CONFIG, num_blocks=9, max_model_len=36)
    clients = tuple(client(number, prompt=(1 + number, 2, 3), at_ns=number) for number in range(6))
    for moment in MOMENTS:
        faults = (at("crash", moment), at("engine_lost", moment + 9), at("crash", moment + 15))
        assert_all_finish(run(scenario(*faults, scheduler=config, clients=clients)))


def test_f_41_a_burst_on_a_full_cache_and_queue_is_refused_beyond_its_bound_and_the_rest_is_served() -> None:
    config = replace(CONFIG, num_blocks=16, max_num_queued_requests=4, max_num_seqs=2)
    first = tuple(client(number, at_ns=0) for number in range(2))
    burst = tuple(client(number, at_ns=20 * MS, prompt=(number % 8, 3, number // 8)) for number in range(2, 14))
    world = run(scenario(scheduler=config, clients=first + burst))
    refused = [stream.ended for stream in world._front_end.streams.values() if stream.ended.reason == "refused"]
    assert refused
    assert {ended.error_code for ended in refused} == {"queue_full"}
    assert {*reasons(world)} <= {"refused", "length", "stop"}
    assert world._losses.ring.allocator.stats().num_evicted > 0


@pytest.mark.parametrize("kind", ["crash", "engine_lost"])
def test_f_56_a_cancel_that_races_with_completion_preemption_and_recovery_ends_once(kind: FaultKind) -> None:
    config = replace(CONFIG, num_blocks=12, max_model_len=48)
    for cancel_us in range(500, 15_000, 1100):
        clients = tuple(
            client(number, prompt=(1 + number, 2, 3), cancel_after_ns=cancel_us * 1000 + number) for number in range(5)
        )
        world = run(scenario(at(kind, 6), scheduler=config, clients=clients))
        assert not world._front_end.num_live


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_f_57_a_deadline_that_races_with_completion_preemption_and_recovery_has_one_winner(topology: Topology) -> None:
    config = replace(CONFIG, num_blocks=12, max_model_len=48)
    ends: set[str] = set()
    for timeout_us in range(500, 30_000, 700):
        clients = tuple(
            client(number, prompt=(1 + number, 2, 3), timeout_ns=timeout_us * 1000 + number) for number in range(5)
        )
        world = run(scenario(at("crash", 6), scheduler=config, clients=clients, topology=topology))
        assert not world._front_end.num_live
        assert len(reasons(world)) == len(world._front_end.streams)
        ends.update(reasons(world))
    assert {"abort", "length"} <= ends <= {"abort", "length", "stop"}
