from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.supervisor.config import ChildConfig
from octavo.actors.supervisor.core import SupervisorConfig, SupervisorCore
from octavo.messages.base import Message
from octavo.messages.ids import Epoch
from octavo.messages.processes import LoadFailed
from octavo.messages.system import (
    Beat,
    EngineLost,
    EngineReady,
    ExecutorFailed,
    ExecutorLost,
    ExecutorReady,
    KillProcess,
    ProcessExited,
    ProcessHalted,
    ProcessObserved,
    ProcessStarted,
    StartExecutor,
    StartProcess,
    StopAll,
    StopProcess,
    SupervisorGaveUp,
    Tick,
)


def test_a_failed_executor_is_started_again_under_a_new_epoch() -> None:
    core = SupervisorCore(SupervisorConfig())
    core.handle(ExecutorReady(Epoch(0)), 0)
    assert core.is_executor_ready
    answers = core.handle(ExecutorFailed(Epoch(0), "boom"), 1)
    assert answers == [StartExecutor(Epoch(1)), ExecutorLost(Epoch(1), "boom")]
    assert not core.is_executor_ready
    core.handle(ExecutorReady(Epoch(1)), 2)
    assert core.is_executor_ready
    assert core.num_restarts == 1


def test_news_of_an_older_epoch_change_nothing() -> None:
    core = SupervisorCore(SupervisorConfig())
    core.handle(ExecutorFailed(Epoch(0), "boom"), 1)
    assert core.handle(ExecutorFailed(Epoch(0), "boom again"), 2) == []
    core.handle(ExecutorReady(Epoch(0)), 3)
    assert not core.is_executor_ready


def test_it_gives_up_when_restarts_are_no_repair_and_not_before() -> None:
    core = SupervisorCore(SupervisorConfig(max_restarts=2, period_ns=100))
    assert core.handle(ExecutorFailed(Epoch(0), "boom"), 0)
    assert core.handle(ExecutorFailed(Epoch(1), "boom"), 10)
    assert core.handle(ExecutorFailed(Epoch(2), "boom"), 105), "the first restart is out of the window"
    assert core.handle(ExecutorFailed(Epoch(3), "the end"), 106) == []
    assert core.gave_up_because == "the end"


# ---- with processes ----

MS = 1_000_000
EXECUTOR, ENGINE = ChildConfig("executor 0", "executor"), ChildConfig("engine", "engine")
SECOND_RANK, EDGE = ChildConfig("executor 1", "executor"), ChildConfig("edge 1", "edge")
NURSERY = ChildConfig("nursery", "nursery")


def core_of(*children: ChildConfig, is_ready: bool = True, **config: Any) -> SupervisorCore:
    """A core whose children are started, and ready if asked for, at time 0."""
    core = SupervisorCore(SupervisorConfig(children=children, **config))
    core.handle(Tick(), 0)
    if is_ready:
        core.handle(EngineReady(1), 0)
        core.handle(ExecutorReady(Epoch(0)), 0)
        for child in children:
            core.handle(ProcessStarted(child.name, 1, 100), 0)
            core.handle(Beat(child.name, 1), 0)
    return core


def run_until(core: SupervisorCore, begin_ms: int, end_ms: int, *beating: Beat) -> list[Message]:
    """Ticks, and before each tick these beats."""
    said = []
    for now_ms in range(begin_ms, end_ms, 100):
        for beat in beating:
            said += core.handle(beat, now_ms * MS)
        said += core.handle(Tick(), now_ms * MS)
    return said


def test_children_start_in_order_and_the_executors_know_the_engine() -> None:
    core = SupervisorCore(SupervisorConfig(children=(EDGE, EXECUTOR, SECOND_RANK, ENGINE, NURSERY)))
    assert core.handle(Tick(), 0) == [
        StartProcess("nursery", 1, Epoch(0), 0),
        StartProcess("engine", 1, Epoch(0), 1),
        StartProcess("executor 0", 1, Epoch(0), 1),
        StartProcess("executor 1", 1, Epoch(0), 1),
        StartProcess("edge 1", 1, Epoch(0), 1),
    ]
    assert not core.is_ready
    assert core.handle(EngineReady(1), 1) == [], "the first engine has nothing to be told again"
    assert core.handle(ExecutorReady(Epoch(0)), 1) == []
    assert core.is_ready


def test_an_executor_that_exits_is_replaced_at_once_under_a_new_epoch() -> None:
    core = core_of(ENGINE, EXECUTOR)
    assert core.handle(ProcessExited("executor 0", 1, "was killed by SIGKILL"), 5) == [
        ExecutorLost(Epoch(1), "executor 0 was killed by SIGKILL"),
        StartProcess("executor 0", 2, Epoch(1), 1),
    ]
    assert not core.is_ready
    core.handle(ExecutorReady(Epoch(1)), 6)
    assert core.is_ready
    assert core.restarts_by_kind == {"nursery": 0, "engine": 0, "executor": 1, "edge": 0}


def loss_of(core: SupervisorCore, incarnation: int) -> ExecutorLost:
    """What is said when this incarnation of the executor is killed, as soon as it has been started."""
    now_ns = max(core.wake_at_ns, 1)
    core.handle(Tick(), now_ns)
    said = core.handle(ProcessExited("executor 0", incarnation, "was killed by SIGKILL"), now_ns + 1)
    (lost,) = (message for message in said if isinstance(message, ExecutorLost))
    return lost


def test_no_request_is_held_to_be_the_cause_of_an_exit_with_nursery_or_host_or_before_it_could_be_computed() -> None:
    core = core_of(EXECUTOR)
    went_along = ProcessExited("executor 0", 1, "is lost with its node", is_innocent=True)
    assert core.handle(went_along, 5)[0] == ExecutorLost(Epoch(1), "executor 0 is lost with its node", is_innocent=True)
    core = core_of(EXECUTOR, max_restarts=99)
    assert loss_of(core, 1).is_innocent is False, "it was ready"
    assert [loss_of(core, number).is_innocent for number in (2, 3, 4, 5)] == [True, True, True, False], (
        "it may have begun a step before anybody heard that it had loaded"
    )
    now_ns = core.wake_at_ns
    core.handle(Tick(), now_ns)
    late = LoadFailed("executor 0", 5, "executor_lost", "no memory")
    assert core.handle(late, now_ns) == []
    assert loss_of(core, 6).is_innocent is False, "another one had said so"
    core.handle(Tick(), core.wake_at_ns)
    assert core.handle(LoadFailed("executor 0", 7, "executor_lost", "no memory"), 20_000 * MS) == []
    assert loss_of(core, 7).is_innocent is True
    core.handle(Tick(), core.wake_at_ns)
    core.handle(ExecutorReady(core.epoch), 30_000 * MS)
    assert [loss_of(core, number).is_innocent for number in (8, 9)] == [False, True], "a new streak"


def test_one_rank_takes_the_group_with_it_and_each_starts_when_its_predecessor_is_gone() -> None:
    core = core_of(EXECUTOR, SECOND_RANK)
    why = "executor 1 exited with code 3"
    assert core.handle(ProcessExited("executor 1", 1, "exited with code 3"), 5) == [
        KillProcess("executor 0", 1, why),
        ExecutorLost(Epoch(1), why),
        StartProcess("executor 1", 2, Epoch(1)),
    ]
    assert core.handle(ProcessExited("executor 0", 1, "was killed by SIGKILL"), 6) == [
        StartProcess("executor 0", 2, Epoch(1))
    ], "no second epoch for the same loss"


def test_a_step_that_raised_costs_a_single_rank_its_batch_and_a_group_its_processes() -> None:
    core = core_of(EXECUTOR)
    assert core.handle(ExecutorFailed(Epoch(0), "boom"), 5) == [
        StartExecutor(Epoch(1)),
        ExecutorLost(Epoch(1), "boom"),
    ]
    assert core.handle(ExecutorFailed(Epoch(1), "cannot even begin"), 6) == [
        KillProcess("executor 0", 1, "cannot even begin"),
        ExecutorLost(Epoch(2), "cannot even begin"),
    ]
    group = core_of(EXECUTOR, SECOND_RANK)
    assert [type(said) for said in group.handle(ExecutorFailed(Epoch(0), "boom"), 5)] == [
        KillProcess,
        KillProcess,
        ExecutorLost,
    ], "the peer waits in a collective"


def test_an_engine_that_exits_is_replaced_and_the_ledger_hears_of_it_once_the_new_one_listens() -> None:
    core = core_of(ENGINE, EXECUTOR)
    assert core.handle(ProcessExited("engine", 1, "was killed by SIGKILL"), 5) == [
        StartProcess("engine", 2, Epoch(1), 2),
        StartExecutor(Epoch(1), 2),
    ]
    core.handle(ExecutorReady(Epoch(1)), 6)
    assert not core.is_ready
    assert core.handle(EngineReady(1), 7) == []
    assert core.handle(EngineReady(2), 8) == [EngineLost(Epoch(1), "engine was killed by SIGKILL", 2)]
    assert core.is_ready
    assert core.num_late_messages == 1


def test_an_engine_hears_of_an_executor_that_was_lost_while_it_started() -> None:
    core = core_of(ENGINE, EXECUTOR)
    core.handle(ProcessExited("engine", 1, "died"), 5)
    core.handle(ProcessExited("executor 0", 1, "died"), 6)
    said = core.handle(EngineReady(2), 7)
    assert said == [
        ExecutorLost(Epoch(2), "it was lost while the engine started"),
        EngineLost(Epoch(2), "engine died", 2),
    ]


def test_an_executor_that_missed_its_new_epoch_is_told_again_but_not_at_each_beat() -> None:
    core = core_of(ENGINE, EXECUTOR)
    core.handle(ProcessExited("engine", 1, "died"), 0)
    said = run_until(core, 100, 1100, Beat("executor 0", 1, epoch=Epoch(0)))
    assert said == [StartExecutor(Epoch(1), 2)] * 2
    assert run_until(core, 1100, 2100, Beat("executor 0", 1, epoch=Epoch(1))) == []


@pytest.mark.parametrize("child", [ENGINE, EXECUTOR])
def test_a_child_without_a_beat_for_a_second_and_a_half_is_killed_and_its_epoch_ends_before_it_does(
    child: ChildConfig,
) -> None:
    core = core_of(ENGINE, EXECUTOR)
    other = Beat("executor 0" if child is ENGINE else "engine", 1)
    assert run_until(core, 100, 1600, other) == []
    said = run_until(core, 1600, 1700, other)
    assert said[0] == KillProcess(child.name, 1, f"{child.name} hangs: no beat for 1.6 s")
    assert core.epoch == 1
    assert not core.is_ready
    assert not any(isinstance(message, StartProcess) for message in said), "it still lives"
    answers = core.handle(ProcessExited(child.name, 1, "was killed by SIGKILL"), 1650 * MS)
    assert answers[0] == StartProcess(child.name, 2, Epoch(1), 2 if child is ENGINE else 1)


def test_children_who_fall_silent_together_are_given_longer_for_it_is_rather_the_host_that_has_no_time() -> None:
    core = core_of(ENGINE, EXECUTOR)
    assert run_until(core, 100, 4300, Tick()) == []
    assert core.handle(Beat("engine", 1), 4350 * MS) == []
    said = run_until(core, 4400, 4500, Beat("engine", 1))
    assert said[0] == KillProcess("executor 0", 1, "executor 0 hangs: no beat for 4.4 s"), "one of them is heard again"
    core = core_of(ENGINE, EXECUTOR)
    said = run_until(core, 100, 4700, Tick())
    assert {message.child for message in said if isinstance(message, KillProcess)} == {"engine", "executor 0"}
    (lost,) = (message for message in said if isinstance(message, ExecutorLost))
    assert lost.is_innocent, "a request is computed by one of them"


def run_observed(core: SupervisorCore, begin_ms: int, end_ms: int, *, ran_ms: int, hindered_ms: int) -> list[Message]:
    """Ticks of an executor that is silent beside an engine that is not; before each, what it was at."""
    said = []
    for now_ms in range(begin_ms, end_ms, 100):
        said += core.handle(Beat("engine", 1), now_ms * MS)
        if core.is_suspect("executor 0", now_ms * MS):
            said += core.handle(ProcessObserved("executor 0", 1, ran_ms * MS, hindered_ms * MS), now_ms * MS)
        said += core.handle(Tick(), now_ms * MS)
    return said


@pytest.mark.parametrize(
    ("ran_ms", "hindered_ms", "killed_ms", "is_innocent"),
    [
        (0, 0, 1600, False),
        (10, 5, 1600, False),  # what polls now and then is stuck none the less
        (100, 0, 3100, False),
        (90, 10, 3300, False),
        (30, 70, 8900, True),  # 3 s of its own, the rest are others'
        (0, 100, 10_100, True),
        (100, 100, 11_600, True),
    ],
    ids=["waits", "polls", "computes", "computes-in-turns", "is-let-run-now-and-then", "is-not-let-run", "both"],
)
def test_how_long_a_child_may_be_silent_depends_on_what_it_is_at(
    ran_ms: int, hindered_ms: int, killed_ms: int, is_innocent: bool
) -> None:
    core = core_of(ENGINE, EXECUTOR)
    assert run_observed(core, 100, killed_ms, ran_ms=ran_ms, hindered_ms=hindered_ms) == []
    why = f"executor 0 hangs: no beat for {killed_ms / 1000:.1f} s"
    said = run_observed(core, killed_ms, killed_ms + 100, ran_ms=ran_ms, hindered_ms=hindered_ms)
    assert said == [KillProcess("executor 0", 1, why), ExecutorLost(Epoch(1), why, is_innocent)]


def test_a_child_is_looked_at_once_its_beats_are_missed_and_what_it_was_at_counts_until_it_beats() -> None:
    core = core_of(NURSERY, ENGINE, EXECUTOR)
    assert not core.is_suspect("executor 0", 500 * MS)
    assert core.is_suspect("executor 0", 501 * MS)
    assert not core.is_suspect("nursery", 501 * MS), "it has no beats"
    core.handle(ProcessObserved("executor 0", 1, 0, 9000 * MS), 600 * MS)  # as of a look long ago
    core.handle(ProcessObserved("executor 0", 9, 0, 9000 * MS), 600 * MS)  # of another one
    assert core.num_late_messages == 1
    assert run_until(core, 700, 2200, Beat("engine", 1)) == []
    assert run_until(core, 2200, 2300, Beat("engine", 1)) != [], "of the silence 0.6 s are excused, no more"
    core = core_of(ENGINE, EXECUTOR)
    run_observed(core, 100, 1000, ran_ms=0, hindered_ms=100)
    assert run_until(core, 1000, 1100, Beat("executor 0", 1), Beat("engine", 1)) == []
    assert run_until(core, 1100, 2600, Beat("engine", 1)) == []
    assert run_until(core, 2600, 2700, Beat("engine", 1)) != [], "that was another silence"


def test_a_step_that_is_not_let_run_is_given_longer_and_its_request_is_not_the_cause() -> None:
    core = core_of(EXECUTOR)
    for progress in range(20, 40):
        core.handle(Beat("executor 0", 1, progress, longest_ns=100 * MS, longest_tokens=8), progress)
    said: list[Message] = []
    busy_ms = 0
    while not said:
        busy_ms += 100
        now_ns = busy_ms * MS
        assert core.is_suspect("executor 0", now_ns) == (busy_ms > 1100), "half of what it usually takes at most"
        if core.is_suspect("executor 0", now_ns):
            core.handle(ProcessObserved("executor 0", 1, 20 * MS, 80 * MS), now_ns)
        said = core.handle(Beat("executor 0", 1, 40, busy_ns=now_ns, busy_tokens=8), now_ns)
    why = "executor 0 hangs: a step has been running for 5.7 s"
    assert said == [KillProcess("executor 0", 1, why), ExecutorLost(Epoch(1), why, is_innocent=True)]


def test_what_a_step_before_was_hindered_by_excuses_no_later_one() -> None:
    core = core_of(EXECUTOR)
    for progress in range(20, 40):
        core.handle(Beat("executor 0", 1, progress, longest_ns=100 * MS, longest_tokens=8), progress)
    core.handle(ProcessObserved("executor 0", 1, 0, 8000 * MS), 100 * MS)
    said: list[Message] = []
    now_ms = 200
    while not said:
        said = core.handle(Beat("executor 0", 1, 41, busy_ns=(now_ms - 199) * MS, busy_tokens=8), now_ms * MS)
        now_ms += 100
    why = "executor 0 hangs: a step has been running for 2.0 s"
    assert said == [KillProcess("executor 0", 1, why), ExecutorLost(Epoch(1), why)]


def loop_of_silences(core: SupervisorCore, *, load_ms: int, serve_ms: int, most: int = 60) -> int:
    """An executor that loads, serves, and falls silent, again and again; how often it does until it is given up."""
    now_ms = incarnation = 0
    while not core.gave_up_because and incarnation < most:
        incarnation += 1
        while not core.is_starting("executor 0", incarnation):
            now_ms += 100
            core.handle(Tick(), now_ms * MS)
        for end_ms, is_ready in ((now_ms + load_ms, False), (now_ms + load_ms + serve_ms, True)):
            if is_ready:
                core.handle(ExecutorReady(core.epoch), now_ms * MS)
            while now_ms < end_ms:
                now_ms += 100
                core.handle(Beat("executor 0", incarnation, now_ms * is_ready, epoch=core.epoch), now_ms * MS)
                core.handle(Tick(), now_ms * MS)
        epoch = core.epoch
        while core.epoch == epoch and not core.gave_up_because:
            now_ms += 100
            core.handle(Tick(), now_ms * MS)
        core.handle(ProcessExited("executor 0", incarnation, "was killed by SIGKILL"), now_ms * MS)
    return incarnation


@pytest.mark.parametrize("load_ms", [100, 2000, 60_000])
def test_a_loop_of_silences_that_serves_for_less_than_it_loads_comes_to_an_end_however_long_it_loads(
    load_ms: int,
) -> None:
    core = core_of(EXECUTOR, is_ready=False, max_restarts=10)
    assert loop_of_silences(core, load_ms=load_ms, serve_ms=max(200, load_ms - 100)) == 11
    core = core_of(EXECUTOR, is_ready=False, max_restarts=10)
    loop_of_silences(core, load_ms=load_ms, serve_ms=max(400, load_ms))
    assert not core.gave_up_because, "it gets somewhere"


def test_nobody_has_served_for_a_while_because_the_supervisor_stood_still() -> None:
    core = core_of(EXECUTOR, max_restarts=3, period_ns=10**15)
    now_ms, num_starts = 0, 0
    while not core.gave_up_because and num_starts < 20:
        num_starts += 1
        core.handle(Beat("executor 0", num_starts, 1, epoch=core.epoch), now_ms * MS)
        now_ms += 60_000
        core.handle(Tick(), now_ms * MS)
        core.handle(ProcessExited("executor 0", num_starts, "exited with code 1"), now_ms * MS)
        for _ in range(30):
            now_ms += 100
            core.handle(Tick(), now_ms * MS)
        core.handle(ExecutorReady(core.epoch), now_ms * MS)
    assert num_starts == 4


def test_a_step_that_hangs_is_found_though_beats_go_on_and_a_slow_one_is_not_taken_for_it() -> None:
    core = core_of(EXECUTOR)
    for progress in range(20, 40):
        core.handle(Beat("executor 0", 1, progress, longest_ns=100 * MS, longest_tokens=8), progress)
    run_until(core, 0, 2000, Beat("executor 0", 1, 40))
    slow = Beat("executor 0", 1, 40, busy_ns=1999 * MS, busy_tokens=8)
    assert core.handle(slow, 2000 * MS) == []
    large = Beat("executor 0", 1, 41, busy_ns=30_000 * MS, busy_tokens=512)
    assert core.handle(large, 2100 * MS) == [], "64 times the tokens, 30 s of at least 65"
    hung = Beat("executor 0", 1, 42, busy_ns=2001 * MS, busy_tokens=8)
    assert core.handle(hung, 2200 * MS)[0] == KillProcess(
        "executor 0", 1, "executor 0 hangs: a step has been running for 2.0 s"
    )


def test_nobody_is_killed_for_the_silence_of_a_time_in_which_the_supervisor_itself_stood_still() -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    assert core.handle(Beat("executor 0", 1, 20, busy_ns=30_100 * MS, busy_tokens=1), 31_000 * MS) == []
    assert core.handle(Tick(), 31_000 * MS) == []
    assert core.num_stalls == 1
    assert run_until(core, 31_100, 32_500, Beat("engine", 1)) == [], "a whole grace period"
    said = run_until(core, 32_500, 32_700, Beat("engine", 1))
    assert any(isinstance(message, KillProcess) for message in said)


@pytest.mark.parametrize("progress", [20, 21])
def test_f_48_a_step_in_which_the_supervisor_stood_still_is_excused_for_it_though_no_beat_told_of_it_before(
    progress: int,
) -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    at_step = Beat("executor 0", 1, progress, busy_ns=4050 * MS, busy_tokens=1)
    assert core.handle(at_step, 5000 * MS) == []
    assert core.num_stalls == 1
    run_until(core, 5100, 6150, Beat("engine", 1))
    said = core.handle(msgspec.structs.replace(at_step, busy_ns=5200 * MS), 6150 * MS)
    assert any(isinstance(message, KillProcess) for message in said), "the time after it counts"


@pytest.mark.parametrize("busy_ms", [0, 3])
def test_f_48_a_beat_from_before_a_stall_that_is_heard_after_it_takes_no_excuse_from_the_step_that_came_next(
    busy_ms: int,
) -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    core.handle(Tick(), 31_000 * MS)
    assert core.handle(Beat("executor 0", 1, 21, busy_ns=busy_ms * MS, busy_tokens=1), 31_005 * MS) == []
    begun_then = Beat("executor 0", 1, 22, busy_ns=29_900 * MS, busy_tokens=1)
    assert core.handle(begun_then, 31_010 * MS) == [], "all of it but a moment lies within the stall"


def test_a_stall_that_is_no_longer_than_a_step_may_be_is_not_held_against_the_step() -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    assert core.handle(Beat("executor 0", 1, 21, busy_ns=1075 * MS, busy_tokens=1), 1980 * MS) == []
    assert core.num_stalls == 0
    run_until(core, 2000, 3000, Beat("engine", 1))
    said = core.handle(Beat("executor 0", 1, 21, busy_ns=2100 * MS, busy_tokens=1), 3005 * MS)
    assert any(isinstance(message, KillProcess) for message in said), "the time after it counts"


def test_a_step_that_took_as_long_as_a_stall_does_not_make_later_ones_take_as_long() -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    core.handle(Tick(), 31_000 * MS)
    core.handle(Beat("executor 0", 1, 21, longest_ns=30_050 * MS, longest_tokens=1), 31_100 * MS)
    run_until(core, 31_200, 33_000, Beat("engine", 1), Beat("executor 0", 1, 21))
    said = core.handle(Beat("executor 0", 1, 21, busy_ns=1500 * MS, busy_tokens=1), 33_000 * MS)
    assert any(isinstance(message, KillProcess) for message in said), "ten times a millisecond, and a second"


def test_what_is_excused_as_a_stall_is_not_excused_again_as_time_without_a_processor() -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    core.handle(ProcessObserved("executor 0", 1, ran_ns=0, hindered_ns=30_000 * MS), 31_000 * MS)
    run_until(core, 31_100, 32_500, Beat("engine", 1))
    said = core.handle(Beat("executor 0", 1, 21, busy_ns=31_500 * MS, busy_tokens=1), 32_500 * MS)
    why = "executor 0 hangs: a step has been running for 1.5 s"
    assert ExecutorLost(Epoch(1), why) in said, "and it is not held to be innocent"


def test_a_step_that_began_before_a_stall_was_over_is_excused_for_no_more_than_its_own_part() -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    core.handle(Tick(), 5000 * MS)
    run_until(core, 5100, 5900, Beat("engine", 1))
    at_step = Beat("executor 0", 1, 21, busy_ns=1500 * MS, busy_tokens=1)
    assert core.handle(at_step, 5900 * MS) == []
    said = core.handle(msgspec.structs.replace(at_step, busy_ns=1900 * MS), 6300 * MS)
    assert any(isinstance(message, KillProcess) for message in said), "1.3 s after the stall"


def test_a_step_that_was_hindered_before_a_beat_told_of_it_has_longer() -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    for at_ms in range(1100, 3100, 100):
        core.handle(ProcessObserved("executor 0", 1, ran_ns=0, hindered_ns=100 * MS), at_ms * MS)
        core.handle(Beat("engine", 1), at_ms * MS)
    assert core.handle(Beat("executor 0", 1, 21, busy_ns=2000 * MS, busy_tokens=1), 3050 * MS) == []


def found_hung_after_ms(core: SupervisorCore, from_ms: int) -> int:
    """From when a step begins that never ends."""
    for now_ms in range(from_ms, from_ms + 60_000, 100):
        core.handle(Beat("engine", 1), now_ms * MS)
        if core.handle(Beat("executor 0", 1, 99, busy_ns=(now_ms - from_ms) * MS, busy_tokens=1), now_ms * MS):
            return now_ms - from_ms
    raise AssertionError("it may take for ever")


@pytest.mark.parametrize(
    ("hindered_ms", "found_ms"), [(0, 51_100), (50, 26_100), (95, 4000), (100, 1600)], ids=lambda value: f"{value} ms"
)
def test_of_a_step_that_was_not_let_run_only_the_rest_is_learned_as_usual(hindered_ms: int, found_ms: int) -> None:
    core = core_of(ENGINE, EXECUTOR)
    run_until(core, 100, 1000, Beat("engine", 1), Beat("executor 0", 1, 20, longest_ns=MS, longest_tokens=1))
    for at_ms in range(1100, 6100, 100):  # a step of 5 s: how it is looked at is another matter
        core.handle(Beat("engine", 1), at_ms * MS)
        core.handle(Beat("executor 0", 1, 20), at_ms * MS)
        core.handle(ProcessObserved("executor 0", 1, ran_ns=0, hindered_ns=hindered_ms * MS), at_ms * MS)
    core.handle(Beat("executor 0", 1, 21, longest_ns=5000 * MS, longest_tokens=1), 6050 * MS)
    assert found_hung_after_ms(core, 6100) == found_ms


def test_a_child_that_is_loading_has_longer_and_not_for_ever() -> None:
    core = core_of(EXECUTOR, is_ready=False, max_start_ns=60_000 * MS)
    assert run_until(core, 100, 25_000) == [], "it has not beaten yet: it imports"
    core.handle(Beat("executor 0", 1), 25_000 * MS)
    assert run_until(core, 25_100, 54_900) == []
    said = run_until(core, 55_000, 55_200)
    assert isinstance(said[0], KillProcess) and isinstance(said[1], ExecutorLost)
    assert said[1].is_innocent, "it has computed nothing"
    beating = core_of(EXECUTOR, is_ready=False, max_start_ns=60_000 * MS)
    said = run_until(beating, 100, 60_300, Beat("executor 0", 1))
    why = "executor 0 was not ready within 60 s"
    assert said == [KillProcess("executor 0", 1, why), ExecutorLost(Epoch(1), why, is_innocent=True)]


def test_an_engine_that_is_stopped_before_its_first_beat_is_not_waited_for() -> None:
    core = core_of(ENGINE, EXECUTOR, is_ready=False)
    said: list[Message] = []
    for now_ms in range(100, 3200, 100):
        core.handle(Beat(EXECUTOR.name, 1), now_ms * MS)
        said += core.handle(Tick(), now_ms * MS)
    assert said == [KillProcess(ENGINE.name, 1, "engine hangs: no beat for 3.1 s")]


def test_an_engine_that_falls_silent_after_its_first_beat_is_given_no_more_for_being_at_its_start() -> None:
    core = core_of(ENGINE, EXECUTOR, is_ready=False)
    core.handle(Beat(ENGINE.name, 1), 100 * MS)
    said = run_until(core, 200, 1800, Beat(EXECUTOR.name, 1))
    assert said == [KillProcess(ENGINE.name, 1, "engine hangs: no beat for 1.6 s")]


@pytest.mark.parametrize("is_ready", [True, False])
@pytest.mark.parametrize("child", [ENGINE, EXECUTOR, NURSERY])
def test_a_child_that_is_stopped_by_a_signal_is_replaced_soon_starting_or_not(
    child: ChildConfig, is_ready: bool
) -> None:
    core = core_of(NURSERY, ENGINE, EXECUTOR, is_ready=is_ready)
    said: list[Message] = []
    for now_ms in range(100, 1300, 100):
        for other in (ENGINE, EXECUTOR):
            if other is not child:
                core.handle(Beat(other.name, 1), now_ms * MS)
        said += core.handle(ProcessHalted(child.name, 1), now_ms * MS)
    assert said[0] == KillProcess(child.name, 1, f"{child.name} hangs: it has been stopped for 0.3 s")
    assert sum(isinstance(message, KillProcess) for message in said) == 1, "it is killed once, whatever is seen then"
    if child is EXECUTOR:
        (lost,) = (message for message in said if isinstance(message, ExecutorLost))
        assert lost.is_innocent, "no request can stop the process that computes it"


def test_a_child_that_is_stopped_again_and_again_for_a_moment_is_left_alone() -> None:
    core = core_of(ENGINE, EXECUTOR)
    said: list[Message] = []
    for now_ms in range(100, 10_000, 100):
        if now_ms % 800 < 300:  # the beats that it missed come as it goes on
            said += core.handle(ProcessHalted(ENGINE.name, 1), now_ms * MS)
        else:
            core.handle(Beat(ENGINE.name, 1), now_ms * MS)
        core.handle(Beat(EXECUTOR.name, 1, epoch=Epoch(0)), now_ms * MS)
        said += core.handle(Tick(), now_ms * MS)
    assert said == []


def test_an_executor_that_never_begins_its_epoch_is_replaced() -> None:
    core = core_of(EXECUTOR)
    core.handle(ExecutorFailed(Epoch(0), "boom"), 0)
    said = run_until(core, 100, 30_300, Beat("executor 0", 1, epoch=Epoch(1)))
    assert said[0] == KillProcess("executor 0", 1, "the executor did not begin epoch 1")


@pytest.mark.parametrize("child", [ENGINE, EXECUTOR])
def test_f_51_a_system_without_room_for_a_process_uses_up_no_restart_and_is_asked_again_now_and_then(
    child: ChildConfig,
) -> None:
    core = core_of(ENGINE, EXECUTOR, max_restarts=2, max_restarts_of_others=2)
    other = EXECUTOR if child is ENGINE else ENGINE
    core.handle(ProcessExited(child.name, 1, "was killed by SIGKILL"), 0)
    starts_ms, incarnation = [], 2
    for now_ms in range(0, 60_000, 100):
        if core.is_starting(child.name, incarnation):
            core.handle(ProcessExited(child.name, incarnation, "fork: no room", was_refused=True), now_ms * MS)
            starts_ms.append(now_ms)
            incarnation += 1
        core.handle(Beat(other.name, 1, epoch=core.epoch), now_ms * MS)
        core.handle(Tick(), now_ms * MS)
    assert not core.gave_up_because
    assert 25 < len(starts_ms) < 40, "no loop of starts"
    assert core.is_starting(child.name, incarnation) or core.wake_at_ns >= 0
    # There is room again: it counts as what it always was, and a defect is one at once.
    for dies in range(3):
        while not core.is_starting(child.name, incarnation):
            now_ms += 100
            core.handle(Beat(other.name, 1, epoch=core.epoch), now_ms * MS)
            core.handle(Tick(), now_ms * MS)
        assert not core.gave_up_because, dies
        core.handle(ProcessExited(child.name, incarnation, "exited with code 1"), now_ms * MS)
        incarnation += 1
        if core.gave_up_because:
            break
    assert core.gave_up_because == f"{child.name} exited with code 1"


def test_f_51_a_system_that_never_has_room_is_not_waited_for_for_ever() -> None:
    core = core_of(EXECUTOR, max_start_ns=10_000 * MS)
    core.handle(ProcessExited(EXECUTOR.name, 1, "was killed by SIGKILL"), 0)
    incarnation = 2
    for now_ms in range(0, 20_000, 100):
        if core.is_starting(EXECUTOR.name, incarnation):
            core.handle(ProcessExited(EXECUTOR.name, incarnation, "fork: no room", was_refused=True), now_ms * MS)
            incarnation += 1
        core.handle(Tick(), now_ms * MS)
    assert core.gave_up_because == "executor 0 fork: no room"


def test_restarts_without_success_back_off_and_success_resets_that() -> None:
    core = core_of(EXECUTOR)
    now_ns, delays_ms = 0, []
    for incarnation in range(1, 6):
        said = core.handle(ProcessExited("executor 0", incarnation, "exited with code 1"), now_ns)
        delay_ns = core.wake_at_ns - now_ns if core.wake_at_ns >= 0 else 0
        delays_ms.append(delay_ns // MS)
        if delay_ns:
            now_ns += delay_ns
            assert core.handle(Tick(), now_ns - 1) == []
            said = core.handle(Tick(), now_ns)
        assert StartProcess("executor 0", incarnation + 1, core.epoch) in said
    assert delays_ms == [0, 100, 500, 2000, 2000]
    core.handle(ExecutorReady(core.epoch), now_ns)
    assert StartProcess("executor 0", 7, Epoch(6)) in core.handle(ProcessExited("executor 0", 6, "exited"), now_ns)


def test_giving_up_ends_the_others_and_tells_why_and_starts_nothing_any_more() -> None:
    core = core_of(ENGINE, EXECUTOR, EDGE, max_restarts=1)
    core.handle(ProcessExited("executor 0", 1, "died"), 0)
    assert core.handle(ProcessExited("executor 0", 2, "died again"), 1) == [
        KillProcess("engine", 1, "the supervisor gave up"),
        SupervisorGaveUp("executor", "executor 0 died again"),
    ], "the edge lives on: it has to tell its clients"
    assert core.gave_up_because == "executor 0 died again"
    core.handle(ProcessExited("engine", 1, "was killed by SIGKILL"), 2)
    assert run_until(core, 1, 10_000, Beat("edge 1", 1)) == []
    assert not core.is_ready


def test_an_edge_is_replaced_alone_and_given_up_alone() -> None:
    core = core_of(ENGINE, EXECUTOR, EDGE, max_restarts_of_others=1)
    assert core.handle(ProcessExited("edge 1", 1, "died"), 0) == [StartProcess("edge 1", 2, Epoch(0), 1)]
    assert core.handle(ProcessExited("edge 1", 2, "died"), 1) == [SupervisorGaveUp("edge", "edge 1 died")]
    assert core.is_ready
    assert core.gave_up_because == ""


def test_stopping_asks_in_reverse_order_and_nothing_is_started_again() -> None:
    core = core_of(ENGINE, EXECUTOR)
    assert core.handle(StopAll(7), 1) == [StopProcess("executor 0", 1, 7), StopProcess("engine", 1, 7)]
    assert core.handle(ProcessExited("executor 0", 1, "exited with code 0"), 2) == []
    assert not core.is_stopped
    assert core.handle(ProcessExited("engine", 1, "exited with code 0"), 3) == []
    assert core.is_stopped
    assert core.restarts_by_kind["executor"] == 0


@pytest.mark.parametrize(
    ("children", "said"),
    [((EDGE, EDGE), "unique"), ((ENGINE, ChildConfig("engine 2", "engine")), "one engine")],
)
def test_children_that_cannot_be_told_apart_are_refused(children: tuple[ChildConfig, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SupervisorConfig(children=children)


class World:
    """Processes that do what a script says, and whether the supervisor keeps its promises meanwhile."""

    def __init__(self, config: SupervisorConfig) -> None:
        self.core = SupervisorCore(config)
        self.now_ns = 0
        self.alive: dict[str, int] = {}
        self.latest: dict[str, int] = {}
        self.epoch = Epoch(0)
        self.has_given_up = False
        self.hear(Tick())

    def hear(self, message: Message) -> None:
        gave_up_before = bool(self.core.gave_up_because)
        epoch_before = self.core.epoch
        for said in self.core.handle(message, self.now_ns):
            if isinstance(said, StartProcess):
                assert not gave_up_before, "nothing starts after giving up"
                assert said.child not in self.alive, "two incarnations are never alive at once"
                assert said.incarnation > self.latest.get(said.child, 0)
                self.alive[said.child] = self.latest[said.child] = said.incarnation
                assert said.epoch == self.core.epoch
            elif isinstance(said, KillProcess):
                assert self.alive.get(said.child) == said.incarnation, "only what lives is killed"
            elif isinstance(said, ExecutorLost | StartExecutor | EngineLost):
                assert said.epoch >= self.epoch
                self.epoch = said.epoch
        assert epoch_before <= self.core.epoch <= epoch_before + 1

    def exit(self, child: str) -> None:
        if (incarnation := self.alive.pop(child, 0)) != 0:
            self.hear(ProcessExited(child, incarnation, "exited"))

    def settle(self) -> None:
        """Let whatever was killed die, and time go by: every exit has been answered."""
        for _ in range(30):
            for child, incarnation in list(self.alive.items()):
                if self.core._children[child].state == "killed":
                    self.exit(child)
                else:
                    self.hear(Beat(child, incarnation, epoch=self.core.epoch))
                    self.hear(ExecutorReady(self.core.epoch) if child != "engine" else EngineReady(incarnation))
            self.now_ns += 100 * MS
            self.hear(Tick())


names = st.sampled_from(["nursery", "engine", "executor 0", "executor 1", "edge 1"])
actions = st.one_of(
    st.tuples(st.just("exit"), names),
    st.tuples(st.just("late exit"), names, st.integers(1, 3)),
    st.tuples(st.just("beat"), names, st.integers(0, 2), st.integers(0, 200_000)),
    st.tuples(st.just("observed"), names, st.integers(0, 2), st.integers(0, 9000), st.integers(0, 9000)),
    st.tuples(st.just("load failed"), names, st.integers(0, 2)),
    st.tuples(st.just("executor ready"), st.integers(0, 2)),
    st.tuples(st.just("executor failed"), st.integers(0, 2)),
    st.tuples(st.just("engine ready"), st.integers(0, 2)),
    st.tuples(st.just("wait"), st.integers(1, 2500)),
)


@given(st.lists(actions, max_size=80), st.integers(0, 6), st.integers(0, 3))
def test_no_order_of_exits_beats_and_late_messages_breaks_the_supervisors_promises(
    script: list[tuple[Any, ...]], max_restarts: int, max_restarts_of_others: int
) -> None:
    world = World(
        SupervisorConfig(
            children=(NURSERY, ENGINE, EXECUTOR, SECOND_RANK, EDGE),
            max_restarts=max_restarts,
            max_restarts_of_others=max_restarts_of_others,
        )
    )
    for action in script:
        match action:
            case ("exit", name):
                world.exit(name)
            case ("late exit", name, age):
                before = world.core.epoch
                world.hear(ProcessExited(name, world.latest[name] - age, "exited"))
                assert world.core.epoch == before
            case ("beat", name, age, busy_ms):
                world.hear(Beat(name, world.latest[name] - age, busy_ns=busy_ms * MS))
            case ("observed", name, age, ran_ms, hindered_ms):
                world.hear(ProcessObserved(name, world.latest[name] - age, ran_ms * MS, hindered_ms * MS))
            case ("load failed", name, age):
                world.hear(LoadFailed(name, world.latest[name] - age, "executor_lost", "boom"))
            case ("executor ready", age):
                world.hear(ExecutorReady(Epoch(world.core.epoch - age)))
            case ("executor failed", age):
                world.hear(ExecutorFailed(Epoch(world.core.epoch - age), "boom"))
            case ("engine ready", age):
                world.hear(EngineReady(world.latest["engine"] - age))
            case ("wait", ms):
                world.now_ns += ms * MS
                world.hear(Tick())
    world.settle()
    if world.core.gave_up_because:
        assert set(world.alive) <= {"edge 1"}
    else:
        assert set(world.alive) >= {"nursery", "engine", "executor 0", "executor 1"}
        assert world.core.is_ready


def test_incarnations_and_epochs_begin_behind_those_of_a_supervisor_before() -> None:
    core = SupervisorCore(SupervisorConfig(children=(ENGINE, EXECUTOR), num_before=1000))
    assert core.handle(Tick(), 0) == [
        StartProcess("engine", 1001, Epoch(1000), 1001),
        StartProcess("executor 0", 1001, Epoch(1000), 1001),
    ]
    core.handle(ExecutorReady(Epoch(1000)), 1)
    lost = core.handle(EngineReady(1001), 1)
    assert lost == [EngineLost(Epoch(1000), "", 1001)], "what the engine before it had is given to this one"
    assert core.is_ready


def test_f_11_the_scheduler_hears_that_a_step_lacked_memory() -> None:
    core = SupervisorCore(SupervisorConfig())
    answers = core.handle(ExecutorFailed(Epoch(0), "no memory", is_out_of_memory=True), 1)
    assert answers == [StartExecutor(Epoch(1)), ExecutorLost(Epoch(1), "no memory", is_out_of_memory=True)]
