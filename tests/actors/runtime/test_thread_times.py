from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.runtime.thread_times import Spent, ThreadTimes, read_threads, spent_between

MS = 1_000_000
ELAPSED_NS = 100 * MS


def thread(state: str, ran_ms: int = 0, delayed_ms: int = 0) -> ThreadTimes:
    return ThreadTimes(state, ran_ms * MS, delayed_ms * MS)


@pytest.mark.parametrize(
    ("before", "after", "ran_ms", "hindered_ms"),
    [
        (thread("S", 5, 7), thread("S", 5, 7), 0, 0),
        (thread("S"), thread("S", 30, 20), 30, 20),
        (thread("R"), thread("R", 100, 0), 100, 0),
        (thread("R"), thread("R", 10, 0), 10, 90),  # it waits, and that is added to its account when it runs
        (thread("R"), thread("R", 0, 700), 0, 100),  # now it was
        (thread("D"), thread("D"), 0, 100),
        (thread("D", 3), thread("D", 43), 40, 60),
        (thread("D"), thread("S"), 0, 0),  # for how much of the time, nobody knows
        (thread("T"), thread("T"), 0, 0),
        (thread("R"), thread("R", 104, 0), 100, 0),
    ],
)
def test_a_thread_is_hindered_while_it_could_run_and_is_not_let(
    before: ThreadTimes, after: ThreadTimes, ran_ms: int, hindered_ms: int
) -> None:
    assert spent_between({1: before}, {1: after}, ELAPSED_NS) == Spent(ran_ms * MS, hindered_ms * MS)


def test_the_busiest_and_the_most_hindered_thread_speak_for_a_process() -> None:
    before = {1: thread("S"), 2: thread("R"), 3: thread("S")}
    after = {1: thread("S", 60, 1), 2: thread("R", 10), 4: thread("R", 900, 900)}
    assert spent_between(before, after, ELAPSED_NS) == Spent(60 * MS, 90 * MS)
    assert spent_between({}, after, ELAPSED_NS) == spent_between(before, {}, ELAPSED_NS) == Spent(0, 0)


threads = st.dictionaries(
    st.integers(1, 4),
    st.builds(ThreadTimes, st.sampled_from("RSDTZ"), st.integers(0, 1 << 40), st.integers(0, 1 << 40)),
)


@given(threads, threads, st.integers(0, 1 << 36))
def test_no_time_is_more_than_went_by(
    before: dict[int, ThreadTimes], after: dict[int, ThreadTimes], elapsed_ns: int
) -> None:
    spent = spent_between(before, after, elapsed_ns)
    assert 0 <= spent.ran_ns <= elapsed_ns and 0 <= spent.hindered_ns <= elapsed_ns


def test_a_process_that_is_gone_has_no_threads() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:  # ourselves
        process.wait()
    assert read_threads(process.pid) == {}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say")
def test_threads_of_a_process_are_told_by_what_they_are_at() -> None:
    stop = threading.Event()
    sleeper = threading.Thread(target=stop.wait)
    sleeper.start()
    try:
        me, other = threading.get_native_id(), sleeper.native_id
        assert other is not None
        first = before = after = read_threads(os.getpid())
        while after[me].ran_ns < first[me].ran_ns + 20 * MS or after[other].state != "S":
            before, after = after, read_threads(os.getpid())
        assert after[me].state == before[me].state == "R"
        assert after[me].delayed_ns >= before[me].delayed_ns
        assert after[other].ran_ns < after[me].ran_ns, "it has begun to wait, and that is all"
    finally:
        stop.set()
        sleeper.join()
