"""Which cores threads are bound to, and when they are left alone."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from c_library import HAS_C
from os_threads import CAN_LOOK, running_threads

from octavo.actors.executor.cpu_affinity import Choice, Claims, CpuAffinity, choose_cores
from octavo.actors.executor.cpu_topology import Cpu
from octavo.messages.errors import InvalidConfigError

# Two nodes of three cores with two hyperthreads each: 0-2 and 6-8, 3-5 and 9-11.
TWO_NODES = tuple(Cpu(cpu, (cpu % 6 // 3, cpu % 3), cpu % 6 // 3) for cpu in range(12))
ONE_NODE = tuple(Cpu(cpu, (0, cpu), 0) for cpu in range(4))


def choose(asked: str = "auto", available: tuple[Cpu, ...] = ONE_NODE, **given: Any) -> Choice:
    return choose_cores(
        asked, available, **{"taken": set(), "quota": math.inf, "busy": 0.0, "num_threads": None, **given}
    )


def test_each_thread_gets_a_physical_core_of_one_node() -> None:
    choice = choose(available=TWO_NODES)
    assert (choice.cpus, choice.num_threads) == ((0, 1, 2), 3)
    assert "NUMA node 0" in choice.reason


def test_the_node_with_most_free_cores_is_taken() -> None:
    assert choose(available=TWO_NODES, taken={1, 7}, num_threads=2).cpus == (3, 4)
    assert choose(available=tuple(cpu for cpu in TWO_NODES if cpu.cpu != 0)).cpus == (1, 2, 6)


def test_more_threads_than_a_node_has_cores_spread_to_the_next() -> None:
    choice = choose(available=TWO_NODES, num_threads=5)
    assert choice.cpus == (0, 1, 2, 3, 4)
    assert "NUMA nodes 0, 1" in choice.reason


@pytest.mark.parametrize(
    ("given", "num_threads", "reason"),
    [
        ({"num_threads": 1}, 1, "one thread"),
        ({"num_threads": 5}, 5, "5 threads for 4 cores"),
        ({"quota": 1.5}, 2, "a quota of 1.5 processors"),
        ({"busy": 0.7}, 4, "others keep 0.7 processors busy"),
        ({"taken": {0, 1, 2}, "num_threads": 2}, 2, "other engines"),
        ({"taken": {0, 1, 2, 3}}, 4, "other engines"),
        ({"asked": "off"}, 4, "off"),
        ({"asked": "off", "quota": 2.0}, 2, "off"),
    ],
)
def test_threads_are_left_alone_where_binding_them_would_do_harm(
    given: dict[str, Any], num_threads: int, reason: str
) -> None:
    choice = choose(**given)
    assert (choice.cpus, choice.num_threads) == ((), num_threads)
    assert reason in choice.reason


def test_ranks_on_one_machine_share_its_cores() -> None:
    assert choose(ranks=2).cpus == (0, 1)
    assert choose(ranks=2, taken={0, 1}).cpus == (2, 3)
    assert choose(ranks=2, quota=4.0).num_threads == 2
    assert choose(ranks=4) == Choice((), 1, "one thread")


def test_a_whole_quota_is_worth_its_threads() -> None:
    assert choose(quota=2.0).cpus == (0, 1)


def test_cores_that_were_asked_for_are_taken_as_they_are() -> None:
    assert choose("3,0-1", busy=3.0, quota=1.0) == Choice((3, 0, 1), 3, "asked for")


def test_executors_that_are_given_one_list_take_a_part_each() -> None:
    parts = [choose("0-3", place=(index, 2)) for index in range(2)]
    assert parts == [Choice((0, 1), 2, "asked for"), Choice((2, 3), 2, "asked for")]
    assert [choose("3,1,0", place=(index, 3), num_threads=1).cpus for index in range(3)] == [(3,), (1,), (0,)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads cannot be bound here")
def test_cores_that_were_asked_for_are_claimed_and_kept_though_others_have_them(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    first = CpuAffinity(str(core), None, Claims(tmp_path / "cores"))
    assert not Claims(tmp_path / "cores").claim(core)
    second = CpuAffinity(str(core), None, Claims(tmp_path / "cores"))
    assert second.choice == Choice((core,), 1, f"asked for, though other engines are bound to {core}")
    first.release()
    second.release()
    assert Claims(tmp_path / "cores").claim(core)


@pytest.mark.parametrize(
    ("asked", "given", "message"),
    [
        ("0-2", {"place": (0, 2)}, "names 3 cores for num_threads=1 in each of 2 executors that share them: name 2"),
        ("0", {"place": (0, 2)}, "names 1 cores for num_threads=1 in each of 2 executors that share them: name 2"),
        ("0-1", {"place": (1, 2), "num_threads": 2}, "num_threads=2 in each of 2 executors that share them: name 4"),
        ("first", {}, "or auto, or off"),
        ("0,9", {}, "may not use 9; it may use 0, 1, 2, 3"),
        ("0-1", {"num_threads": 3}, "names 2 cores for num_threads=3"),
    ],
)
def test_cores_that_cannot_be_had_are_refused(asked: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        choose(asked, **given)


def test_a_core_is_claimed_once_until_it_is_given_back(tmp_path: Path) -> None:
    first, second = Claims(tmp_path / "cores"), Claims(tmp_path / "cores")
    assert first.claim(0)
    assert not second.claim(0)
    assert second.taken(ONE_NODE) == {0}
    assert second.claim(1)
    assert first.taken(ONE_NODE) == {0, 1}  # its own too
    first.release()
    assert second.taken(ONE_NODE) == {1}
    del second
    assert first.taken(ONE_NODE) == set()


@pytest.mark.skipif(not HAS_C or not CAN_LOOK, reason="threads cannot be bound here")
def test_binding_moves_the_stepping_thread_and_its_workers_and_no_other(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("one core")
    found: dict[str, object] = {}
    before = torch.get_num_threads()

    def step() -> None:
        affinity = CpuAffinity(f"{allowed[1]},{allowed[0]}", None, Claims(tmp_path / "cores"))
        others = running_threads()
        affinity.apply()
        found["own"] = os.sched_getaffinity(0)
        allowed_to_new = [os.sched_getaffinity(thread) for thread in running_threads() - others]
        found["workers"] = [cpus for cpus in allowed_to_new if cpus != set(allowed)]
        found["threads"] = torch.get_num_threads()

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert found == {"own": {allowed[1]}, "workers": [{allowed[0]}], "threads": 2}
    assert os.sched_getaffinity(0) == set(allowed)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound here")
def test_a_thread_without_workers_may_run_on_any_of_its_cores(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    found: list[set[int]] = []
    before = torch.get_num_threads()

    def step() -> None:
        CpuAffinity(f"{allowed[0]},{allowed[-1]}", 2, Claims(tmp_path / "cores")).apply(computes=False)
        found.append(os.sched_getaffinity(0))

    if len(allowed) < 2:
        pytest.skip("one core")
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert found == [{allowed[0], allowed[-1]}]


def test_off_binds_nothing_and_one_thread_needs_no_core(tmp_path: Path) -> None:
    for asked, num_threads in (("off", 2), ("auto", 1)):
        claims = Claims(tmp_path / "cores")
        affinity = CpuAffinity(asked, num_threads, claims)
        assert affinity.choice.cpus == ()
        assert affinity.choice.num_threads == num_threads
        assert Claims(tmp_path / "cores").taken(ONE_NODE) == set()
