from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.sim.faults.fuzz import explain, fuzz, run_seed
from octavo.sim.faults.mutants import MUTANTS

HASH = "from octavo.sim.faults.fuzz import fuzz; print(fuzz(60, 7).hash)"

FAILING = """
import sys
from octavo.sim.faults.mutants import MUTANTS
from octavo.sim.faults.mutation import MutantFinder
sys.meta_path.insert(0, MutantFinder(next(m for m in MUTANTS if m.name == sys.argv[1])))
from octavo.sim.faults.fuzz import fuzz
report = fuzz(2000)
print(report.failure.seed, len(report.failure.shrunk.clients), len(report.failure.shrunk.faults))
print(report.text())
"""


def run_python(code: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return done.stdout


def test_no_fault_violates_an_invariant() -> None:
    """The first of the seeds of `make fuzz`."""
    report = fuzz(200, jobs=1)
    assert report.failure is None, report.text()
    assert report.num_seeds == 200
    assert report.num_events > 200 * 200


def test_the_same_seeds_have_the_same_hash_in_any_process_and_under_any_hash_seed() -> None:
    here = fuzz(60, 7).hash
    for hash_seed in ("0", "1", "random"):
        assert run_python(HASH, PYTHONHASHSEED=hash_seed).strip() == here
    assert fuzz(60, 8).hash != here


def test_the_number_of_processes_changes_nothing() -> None:
    done: list[int] = []
    assert fuzz(220, 3, jobs=2, progress=done.append) == fuzz(220, 3)
    assert done[-1] == 220


def test_a_failure_is_shrunk_and_tells_how_to_run_it_again() -> None:
    name = "a cancel takes the short way"
    assert any(mutant.name == name for mutant in MUTANTS)
    first, text = run_python(FAILING, name).split("\n", 1)
    seed, num_clients, num_faults = map(int, first.split())
    assert (num_clients, num_faults) == (1, 0)
    assert f"octavo sim fuzz --seeds 1 --seed {seed}" in text
    assert "a cancel overtakes the request that it cancels" in text
    assert "CancelRequest(request_id=0)" in text, "the last events are shown"


def test_a_report_of_what_never_ends_says_who_waits_for_whom() -> None:
    text = run_python(FAILING, "after a loss, old tokens are waited for")
    assert "who waits for whom:" in text
    assert "waits for the scheduler" in text


def test_events_are_recorded_only_when_asked_for() -> None:
    assert not run_seed(3).events
    recorded = run_seed(3, 20)
    assert len(recorded.events) == 20
    assert recorded.hash == run_seed(3).hash


def test_a_seed_that_does_not_fail_cannot_be_explained() -> None:
    with pytest.raises(AssertionError, match="does not fail"):
        explain(1)


@pytest.mark.parametrize(("num_seeds", "first", "jobs"), [(0, 0, 1), (1, -1, 1), (1, 0, 0)])
def test_numbers_out_of_range_are_refused(num_seeds: int, first: int, jobs: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        fuzz(num_seeds, first, jobs)


def test_the_package_is_where_the_mutants_look_for_it() -> None:
    from octavo.sim.faults.mutation import ROOT

    assert (Path(ROOT) / "actors" / "scheduler" / "core.py").is_file()


def test_kv_of_a_row_that_failed_after_its_request_had_stopped_is_not_found_by_the_next_one() -> None:
    # The stopped request's wasted row was in flight and failed; its blocks were published all the same.
    assert run_seed(63_292).kind == ""


def test_nobody_is_convicted_in_the_place_of_a_poison_whose_time_ran_out() -> None:
    # The poison's deadline passed while its last loss was on the way; an innocent request was alone in flight with it.
    assert run_seed(30_734).kind == ""


def test_an_engine_that_died_may_have_refused_a_request_before() -> None:
    assert run_seed(15_559).kind == ""
