"""The highest load that a configuration takes within its limits."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from .bounds import impossibility
from .candidate import Candidate
from .diagnosis import Diagnosis, binding_of, diagnose_at
from .planner import Question
from .probe import Ask, CannotBootError, Probe, Prober
from .search import largest

RESOLUTION = 1.01  # neighbouring loads differ by 1 %
_LOWEST, _HIGHEST = -700, 700  # powers of it: about 1/1000 and 1000 times the trace
_FIRST_STEP = 16


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration takes.

    Attributes:
        load_multiple: highest multiple of the trace's load within the limits; 0: none.
        best: the simulation of it.
        probes: every load that was simulated to the end, ascending.
        binding, reason: of a capacity of 0, why.
    """

    candidate: Candidate
    num_replicas: int
    load_multiple: float
    best: Probe | None
    binding: str
    reason: str
    probes: tuple[Probe, ...]
    num_probes: int
    diagnosis: Diagnosis | None = None


def multiple_of(power: int) -> float:
    """The load that stands at this place of the grid."""
    return round(RESOLUTION**power, 5)


def capacity(
    candidate: Candidate,
    num_replicas: int,
    prober: Prober,
    question: Question,
    *,
    with_diagnosis: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Capacity:
    """Find the highest load to 1 %, as stepping up in steps of 1 % until the first failure would.

    Raises:
        CannotBootError: the engine would refuse to start so.
    """
    nothing = Capacity(
        candidate=candidate,
        num_replicas=num_replicas,
        load_multiple=0.0,
        best=None,
        binding="",
        reason="",
        probes=(),
        num_probes=0,
    )
    try:
        prober.replica(candidate)
    except CannotBootError as error:
        return msgspec.structs.replace(nothing, binding="does not boot", reason=str(error))
    if question.prune:
        impossible = impossibility(candidate, prober, question.slo, question.max_refused)
        if impossible:
            return msgspec.structs.replace(nothing, binding=impossible[0], reason=impossible[1])
    probes: dict[int, Probe] = {}

    def meets(power: int) -> bool:
        probe = prober.probe(
            Ask(
                candidate=candidate,
                num_replicas=num_replicas,
                load_multiple=multiple_of(power),
                stop_early=question.stop_early,
            )
        )
        probes[power] = probe
        if progress:
            progress(f"{multiple_of(power):.3g} times the load: {'meets' if probe.meets else 'fails'}")
        return probe.meets

    power = largest(meets, at_least=_LOWEST, at_most=_HIGHEST, start=0, first_step=_FIRST_STEP)
    complete = tuple(probes[at] for at in sorted(probes) if probes[at].is_complete)
    if power is None:
        lowest = probes[min(probes)]
        return msgspec.structs.replace(
            nothing,
            binding=binding_of(lowest, candidate),
            reason=f"even {multiple_of(_LOWEST):.2g} times the trace's load misses {', '.join(lowest.missed)}",
            probes=complete,
            num_probes=len(probes),
        )
    beyond = probes.get(power + 1)
    diagnosis = None
    binding = "nothing that was tried"
    if beyond is not None:
        binding = binding_of(beyond, candidate)
        if with_diagnosis:
            load = multiple_of(power + 2)
            diagnosis = diagnose_at(candidate, num_replicas, load, lambda asks: [prober.probe(ask) for ask in asks])
            binding = diagnosis.binding if diagnosis is not None else binding
    return Capacity(
        candidate=candidate,
        num_replicas=num_replicas,
        load_multiple=multiple_of(power),
        best=probes[power],
        binding=binding,
        reason="",
        probes=complete,
        num_probes=len(probes),
        diagnosis=diagnosis,
    )
