from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from octavo.gateway.peers.adapter import LoadOptions, Request
from octavo.gateway.peers.process import PeerFailedError, PeerProcess

OPTIONS = LoadOptions(folder="model", dtype="float32", num_threads=2)
REQUESTS = [Request([5, 6], 3), Request([100], 1)]


@pytest.fixture(autouse=True)
def _fakes_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.fixture
def processes() -> Iterator[list[PeerProcess]]:
    started: list[PeerProcess] = []
    yield started
    for process in started:
        process.close()


def start(processes: list[PeerProcess], name: str, python: str | None = None) -> PeerProcess:
    processes.append(PeerProcess(f"fake_peers:{name}", timeout_s=120, python=python, num_threads=2))
    return processes[-1]


@pytest.mark.parametrize("python", [None, sys.executable], ids=["in octavo's environment", "as a plain file elsewhere"])
def test_a_peer_answers_through_whatever_it_prints(python: str | None, processes: list[PeerProcess]) -> None:
    process = start(processes, "Counting", python)
    assert process.probe(OPTIONS) == ""
    loaded = process.load(OPTIONS)
    assert loaded["facts"]["model"] == "float32 by 2"
    assert loaded["versions"] == {"counting": "1.0"} and loaded["load_s"] >= 0
    timed = process.run(REQUESTS)
    assert timed.outputs == [[6, 7, 8], [100]]
    assert timed.elapsed_s >= 0 and timed.cpu_s >= 0 and timed.foreign_cores >= 0


def test_a_paused_peer_is_stopped_and_goes_on_where_it_was(processes: list[PeerProcess]) -> None:
    process = start(processes, "Counting")
    pid = process.load(OPTIONS)["facts"]["pid"]
    process.pause()
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        pass
    process.resume()
    assert process.run(REQUESTS).outputs[1] == [100]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FailsToLoad", "load: OSError: no such model"),
        ("NoSuchClass", "AttributeError"),
    ],
)
def test_an_error_of_the_peer_is_told_in_its_words(name: str, words: str, processes: list[PeerProcess]) -> None:
    with pytest.raises(PeerFailedError, match=words):
        start(processes, name).load(OPTIONS)


def test_outputs_of_another_length_are_refused(processes: list[PeerProcess]) -> None:
    with pytest.raises(PeerFailedError, match="request 0 asked for 3 tokens and got 2"):
        start(processes, "Short").run(REQUESTS)


def test_a_crash_is_an_error_that_names_signal_and_last_words(processes: list[PeerProcess]) -> None:
    process = start(processes, "Crashing")
    process.run(REQUESTS)
    process.run(REQUESTS)
    with pytest.raises(PeerFailedError, match=r"run: its process ended by signal SIGABRT"):
        process.run(REQUESTS)
    with pytest.raises(PeerFailedError, match="its process"):
        process.run(REQUESTS)


def test_a_hang_ends_at_the_time_limit_and_leaves_no_process(processes: list[PeerProcess]) -> None:
    process = start(processes, "Hanging")
    pid = process.load(OPTIONS)["facts"]["pid"]
    process._timeout_s = 0.05
    with pytest.raises(PeerFailedError, match=r"run: no answer in 0\.05 s"):
        process.run(REQUESTS)
    process.close()
    process.close()
    assert not psutil.pid_exists(pid)


def test_whoever_measures_may_bound_all_answers_together(processes: list[PeerProcess]) -> None:
    process = start(processes, "Counting")
    process.load(OPTIONS)
    process.deadline = time.monotonic()
    with pytest.raises(PeerFailedError, match="run: no answer"):
        process.run([Request([1], 2000)])


def test_what_a_failed_peer_wrote_can_be_read_until_it_is_closed(processes: list[PeerProcess]) -> None:
    process = start(processes, "FailsToLoad")
    with pytest.raises(PeerFailedError, match="no such model"):
        process.load(OPTIONS)
    log = process.log()
    assert log.startswith("Traceback") and log.rstrip().endswith("OSError: no such model")


def test_an_interpreter_that_is_not_there_is_an_error_of_that_peer_alone() -> None:
    with pytest.raises(PeerFailedError, match="cannot start /no/such/python"):
        PeerProcess("vllm", timeout_s=1, python="/no/such/python")
