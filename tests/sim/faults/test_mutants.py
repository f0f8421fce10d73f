"""The planted-bug gate: a harness that finds nothing proves nothing."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from octavo.sim.faults.mutants import MAX_SEEDS, MUTANTS, run_gate
from octavo.sim.faults.mutation import Mutant, MutantFinder


def test_there_are_mutants_of_every_part() -> None:
    parts = Counter("/".join(mutant.path.split("/")[:2]) for mutant in MUTANTS)
    assert sum(parts.values()) >= 34
    for part in ("scheduler", "kv_allocator", "runtime", "supervisor", "detokenizer"):
        assert parts[f"actors/{part}"] >= 4, parts
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert all(mutant.model for mutant in MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_line_of_the_code_as_it_is(mutant: Mutant) -> None:
    ast.parse(mutant.read())


def test_every_mutant_is_found() -> None:
    verdicts = run_gate(MUTANTS, jobs=2)
    survivors = [verdict.name for verdict in verdicts if not verdict.kind]
    assert not survivors
    seeds = sorted(verdict.num_seeds for verdict in verdicts)
    assert seeds[len(seeds) // 2] <= 200 < MAX_SEEDS


def test_a_line_that_is_gone_is_an_error() -> None:
    mutant = Mutant("no such line", "actors/scheduler/core.py", "no such line", "nor this", "-")
    with pytest.raises(ValueError, match="0 times, not once"):
        run_gate([mutant])


def test_a_module_that_is_imported_already_cannot_be_changed() -> None:
    import octavo.sim.faults.world  # noqa: F401

    with pytest.raises(RuntimeError, match="process of its own"):
        MutantFinder(next(mutant for mutant in MUTANTS if mutant.path.endswith("in_process.py")))
