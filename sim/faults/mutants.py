"""`python -m octavo.sim.faults.mutants`: plants one bug after another and counts the seeds until it is found.

Each mutant changes one line of a production module. It runs in a process of its own, where nothing of the package but
this was imported before.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec

from .mutant_table import MUTANTS
from .mutation import PACKAGE, ROOT, Mutant, MutantFinder

MAX_SEEDS = 10_000


class Verdict(msgspec.Struct, frozen=True):
    """What became of a mutant.

    Attributes:
        num_seeds: run until it was found, or all.
        kind: of the violation that found it; empty if nothing did.
    """

    name: str
    num_seeds: int
    kind: str


def hunt(mutant: Mutant, max_seeds: int, first_seed: int) -> Verdict:
    """Run seeds on a mutant, in this process, until one fails."""
    sys.meta_path.insert(0, MutantFinder(mutant))
    from .fuzz import CHUNK, run_seeds

    for begin in range(0, max_seeds, CHUNK):
        results = run_seeds(first_seed + begin, min(CHUNK, max_seeds - begin))
        if results[-1].kind:
            return Verdict(mutant.name, begin + len(results), results[-1].kind)
    return Verdict(mutant.name, max_seeds, "")


def _hunt_elsewhere(max_seeds: int, first_seed: int, mutant: Mutant) -> Verdict:
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--only", mutant.name]
    command += ["--seeds", str(max_seeds), "--seed", str(first_seed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.parent)  # noqa: S603  # ourselves
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"the hunt for {mutant.name!r} failed: {done.stderr[-2000:]}")
    return msgspec.json.decode(done.stdout, type=Verdict)


def run_gate(
    mutants: Sequence[Mutant],
    *,
    max_seeds: int = MAX_SEEDS,
    first_seed: int = 0,
    jobs: int = 1,
    progress: Callable[[Verdict], None] | None = None,
) -> list[Verdict]:
    """Hunt for each mutant in a process of its own, `jobs` at a time; verdicts in the order of the mutants.

    Raises:
        ValueError: a mutant's line is not in the code any more.
    """
    for mutant in mutants:
        mutant.read()
    verdicts = []
    with ThreadPoolExecutor(jobs) as pool:
        for verdict in pool.map(partial(_hunt_elsewhere, max_seeds, first_seed), mutants):
            verdicts.append(verdict)
            if progress is not None:
                progress(verdict)
    return verdicts


def main() -> int:
    """Exit code 0 if every mutant was found, 1 if one survived."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.sim.faults.mutants", description=__doc__)
    parser.add_argument("--seeds", type=int, default=MAX_SEEDS, help="most seeds for each mutant")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", default="", help="the name of one mutant, hunted for in this process")
    parser.add_argument("--json", action="store_true", help="print the verdict on one mutant as JSON")
    options = parser.parse_args()
    if options.only:
        mutant = next((mutant for mutant in MUTANTS if mutant.name == options.only), None)
        if mutant is None:
            parser.error(f"there is no mutant {options.only!r}")
        verdict = hunt(mutant, options.seeds, options.seed)
        print(msgspec.json.encode(verdict).decode() if options.json else _line(verdict))
        return 0 if verdict.kind else 1
    verdicts = run_gate(
        MUTANTS,
        max_seeds=options.seeds,
        first_seed=options.seed,
        jobs=options.jobs,
        progress=lambda verdict: print(_line(verdict), flush=True),
    )
    survivors = [verdict.name for verdict in verdicts if not verdict.kind]
    seeds = sorted(verdict.num_seeds for verdict in verdicts)
    num_found = len(verdicts) - len(survivors)
    print(f"{num_found} of {len(verdicts)} found; median {seeds[len(seeds) // 2]} seeds, most {seeds[-1]}")
    return 1 if survivors else 0


def _line(verdict: Verdict) -> str:
    return f"{verdict.num_seeds:6}  {verdict.name:60}  {verdict.kind or 'SURVIVED'}"


if __name__ == "__main__":
    raise SystemExit(main())
