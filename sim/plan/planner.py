"""Fewest replicas of each candidate, the cheapest of them, and what binds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Literal

import msgspec

from ..slo import Slo
from .bounds import fewest_replicas, impossibility
from .candidate import Candidate
from .diagnosis import Diagnosis, binding_of, diagnose
from .probe import Ask, CannotBootError, Probe, Prober, Replica
from .search import smallest

_TELL_EVERY_S = 1.0

Verdict = Literal["feasible", "infeasible", "cannot boot"]


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of each candidate.

    Attributes:
        slo: limits to keep.
        max_replicas: most that may be had.
        max_refused: share of requests that may be turned away.
        stop_early: end a simulation once it cannot meet the limits any more; changes no answer.
        prune: begin searches at closed-form bounds and skip what they prove impossible; changes no answer.
    """

    slo: Slo
    max_replicas: int = 64
    max_refused: float = 0.0
    stop_early: bool = True
    prune: bool = True


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found out about one candidate.

    Attributes:
        num_replicas: fewest that meet the limits; 0 if none do.
        best: the simulation of that number; of an infeasible one, of the most replicas (None if none was needed).
        binding: what keeps it from fewer replicas, or from any.
        reason: the same in words, for what is infeasible.
        passing: complete simulations that met the limits, by number of replicas.
        num_probes: simulations made.
    """

    candidate: Candidate
    verdict: Verdict
    num_replicas: int = 0
    replica: Replica | None = None
    best: Probe | None = None
    binding: str = ""
    reason: str = ""
    passing: tuple[Probe, ...] = ()
    num_probes: int = 0

    @property
    def cost_per_hour(self) -> float:
        """Of the fewest replicas."""
        return self.best.cost_per_hour if self.best is not None else 0.0

    @property
    def num_gpus(self) -> int:
        """Of the fewest replicas."""
        return self.num_replicas * (self.replica.num_gpus if self.replica is not None else 0)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The planner's answer.

    Attributes:
        findings: of all candidates, in the order of the sweep.
        chosen: index of the cheapest that is feasible; -1: none is.
        front: `(index of the finding, number of replicas)` that nothing beats in cost, p99 TTFT and p99 TPOT.
        diagnosis: of the chosen one, or of the nearest miss.
        curve: the chosen one, simulated to the end with fewer and more replicas.
    """

    findings: tuple[Finding, ...]
    chosen: int
    front: tuple[tuple[int, int], ...]
    diagnosis: Diagnosis | None = None
    curve: tuple[Probe, ...] = ()


def investigate(candidate: Candidate, prober: Prober, question: Question) -> Finding:
    """Find the fewest replicas of one candidate that meet the limits."""
    try:
        replica = prober.replica(candidate)
    except CannotBootError as error:
        return Finding(candidate=candidate, verdict="cannot boot", binding="does not boot", reason=str(error))
    start = 1
    if question.prune:
        impossible = impossibility(candidate, prober, question.slo, question.max_refused)
        if impossible:
            binding, reason = impossible
            return Finding(candidate=candidate, verdict="infeasible", replica=replica, binding=binding, reason=reason)
        start = fewest_replicas(candidate, prober, question.slo)
    probes: dict[int, Probe] = {}

    def meets(num_replicas: int) -> bool:
        probes[num_replicas] = prober.probe(
            Ask(candidate=candidate, num_replicas=num_replicas, stop_early=question.stop_early)
        )
        return probes[num_replicas].meets

    answer = smallest(meets, at_least=1, at_most=question.max_replicas, start=start)
    passing = tuple(probes[number] for number in sorted(probes) if probes[number].meets)
    if answer is None:
        most = probes[max(probes)]
        return Finding(
            candidate=candidate,
            verdict="infeasible",
            replica=replica,
            best=most,
            binding=binding_of(most, candidate),
            reason=f"{_replicas(question.max_replicas)} miss {', '.join(most.missed) or 'the limits'}",
            num_probes=len(probes),
        )
    below = probes.get(answer - 1)
    return Finding(
        candidate=candidate,
        verdict="feasible",
        num_replicas=answer,
        replica=replica,
        best=probes[answer],
        binding=binding_of(below, candidate) if below is not None else "one replica suffices",
        passing=passing,
        num_probes=len(probes),
    )


def plan(
    candidates: Sequence[Candidate],
    make_prober: Callable[[], Prober],
    question: Question,
    *,
    jobs: int = 1,
    with_diagnosis: bool = True,
    with_curve: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Investigate all candidates and choose.

    Args:
        make_prober: called once in each process; it is pickled if `jobs` is more than 1.
        jobs: processes; the answer is the same for any number of them.
        progress: called with (candidates done, of how many, what is being done).
    """
    total = len(candidates)

    def tell(num_done: int, text: str) -> None:
        if progress:
            progress(num_done, total, text)

    with _crew(make_prober, question, jobs) as crew:
        findings = crew.investigate(candidates, tell)
        chosen = _cheapest(findings)
        found = Plan(findings=tuple(findings), chosen=chosen, front=_front(findings))
        subject = chosen if chosen >= 0 else _nearest_miss(findings)
        if with_diagnosis and subject >= 0:
            tell(total, "what binds")
            one = findings[subject]
            diagnosis = diagnose(one.candidate, one.num_replicas, question.max_replicas, crew.probe_all)
            if diagnosis is not None and diagnosis.failing.load_multiple == 1.0:
                # looked at closely, not told from a run that may have been stopped early
                findings[subject] = msgspec.structs.replace(one, binding=diagnosis.binding)
            found = msgspec.structs.replace(found, findings=tuple(findings), diagnosis=diagnosis)
        if with_curve and chosen >= 0:
            tell(total, "latency over replicas")
            curve = crew.probe_all(_curve(findings[chosen], question.max_replicas))
            found = msgspec.structs.replace(found, curve=tuple(curve))
    return found


class _Alone:
    """This process does the work."""

    def __init__(self, prober: Prober, question: Question) -> None:
        self._prober = prober
        self._question = question

    def investigate(self, candidates: Sequence[Candidate], tell: Callable[[int, str], None]) -> list[Finding]:
        findings: list[Finding] = []
        for candidate in candidates:
            tell(len(findings), candidate.gpu)
            findings.append(investigate(candidate, self._prober, self._question))
        return findings

    def probe_all(self, asks: Sequence[Ask]) -> Sequence[Probe]:
        return [self._prober.probe(ask) for ask in asks]


class _Pool:
    """Other processes do the work; answers are put in the order of the questions."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def investigate(self, candidates: Sequence[Candidate], tell: Callable[[int, str], None]) -> list[Finding]:
        futures = [self._executor.submit(_investigate_here, candidate) for candidate in candidates]
        waiting = set(futures)  # an order that matters nowhere
        while waiting:
            ended, waiting = wait(waiting, timeout=_TELL_EVERY_S, return_when=FIRST_COMPLETED)
            for future in ended:
                future.result()  # an error ends the plan at once
            tell(len(futures) - len(waiting), "")
        return [future.result() for future in futures]

    def probe_all(self, asks: Sequence[Ask]) -> Sequence[Probe]:
        return list(self._executor.map(_probe_here, asks))


@contextmanager
def _crew(make_prober: Callable[[], Prober], question: Question, jobs: int) -> Iterator[_Alone | _Pool]:
    if jobs == 1:
        yield _Alone(make_prober(), question)
        return
    # spawned, not forked: what this process holds (threads of numpy, open files) stays its own
    executor = ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (make_prober, question))
    try:
        yield _Pool(executor)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Prober, Question] | None = None  # of this process; set once, when it starts


def _start_worker(make_prober: Callable[[], Prober], question: Question) -> None:
    global _worker  # noqa: PLW0603  # a pool's initializer has no other place to leave what its tasks need
    _worker = (make_prober(), question)


def _investigate_here(candidate: Candidate) -> Finding:
    assert _worker is not None
    return investigate(candidate, *_worker)


def _probe_here(ask: Ask) -> Probe:
    assert _worker is not None
    return _worker[0].probe(ask)


def _cheapest(findings: Sequence[Finding]) -> int:
    feasible = [i for i, finding in enumerate(findings) if finding.verdict == "feasible"]
    return min(
        feasible, key=lambda i: (findings[i].cost_per_hour, findings[i].num_gpus, _latency(findings[i]), i), default=-1
    )


def _latency(finding: Finding) -> float:
    return finding.best.ttft_s.p99 if finding.best is not None else float("inf")


def _nearest_miss(findings: Sequence[Finding]) -> int:
    """Of those that were simulated and never met the limits, the one that most requests were content with."""
    missed = [i for i, finding in enumerate(findings) if finding.best is not None and finding.num_replicas == 0]

    def attained(i: int) -> float:
        best = findings[i].best
        assert best is not None
        return best.slo_attainment

    return max(missed, key=lambda i: (attained(i), -i), default=-1)


def _front(findings: Sequence[Finding]) -> tuple[tuple[int, int], ...]:
    points = [
        ((probe.cost_per_hour, probe.ttft_s.p99, probe.tpot_s.p99), (i, probe.num_replicas))
        for i, finding in enumerate(findings)
        for probe in finding.passing
    ]
    kept = []
    seen: dict[tuple[float, ...], None] = {}
    for figures, name in sorted(points):
        beaten = any(
            other != figures and all(a <= b for a, b in zip(other, figures, strict=True)) for other, _ in points
        )
        if not beaten and figures not in seen:
            seen[figures] = None
            kept.append(name)
    return tuple(kept)


def _curve(finding: Finding, max_replicas: int) -> list[Ask]:
    fewest = finding.num_replicas
    numbers = {max(1, fewest - 2), max(1, fewest - 1), fewest, fewest + 1, fewest + 2, -(-3 * fewest // 2), 2 * fewest}
    return [
        Ask(candidate=finding.candidate, num_replicas=number) for number in sorted(numbers) if number <= max_replicas
    ]


def _replicas(count: int) -> str:
    return "1 replica" if count == 1 else f"{count} replicas"
