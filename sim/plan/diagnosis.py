"""What keeps a cluster from meeting its limits, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from .candidate import Candidate
from .probe import REFUSED, Ask, Probe
from .relax import RELAXATIONS, Relaxation

_LITTLE = 0.002  # attainment that more of a thing must add before it is said to bind
_NEARLY_FULL = 0.98
_STEP, _MAX_STEPS = 1.5, 18  # up to 1500 times the load


class WhatIf(msgspec.Struct, frozen=True, kw_only=True):
    """The failing cluster with more of one thing.

    Attributes:
        gain: by how much the share of requests within every limit rises.
        meets: whether that alone is enough.
    """

    relaxation: Relaxation
    text: str
    gain: float
    meets: bool
    probe: Probe


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Why a cluster fails.

    Attributes:
        binding: what helps most; `queueing`, if nothing but more replicas does.
        failing: the cluster that was looked at: one replica fewer than needed, or the load at which one fails.
        what_ifs: most helpful first.
    """

    binding: str
    failing: Probe
    what_ifs: tuple[WhatIf, ...]


ProbeAll = Callable[[Sequence[Ask]], Sequence[Probe]]
"""Makes simulations, perhaps several at once; answers in the order of the questions."""


def diagnose(candidate: Candidate, num_replicas: int, max_replicas: int, probe_all: ProbeAll) -> Diagnosis | None:
    """Relax one thing after another on the nearest cluster that fails.

    Args:
        num_replicas: fewest that meet the limits; 0: none do.

    Returns:
        None if one replica keeps the limits whatever the load (nothing binds that could be shown).
    """
    if num_replicas != 1:
        return diagnose_at(candidate, num_replicas - 1 if num_replicas else max_replicas, 1.0, probe_all)
    multiple = 1.0
    for _ in range(_MAX_STEPS):
        multiple *= _STEP
        asks = [Ask(candidate=candidate, num_replicas=1, load_multiple=multiple, stop_early=True)]
        if not probe_all(asks)[0].meets:
            return diagnose_at(candidate, 1, multiple, probe_all)
    return None


def diagnose_at(candidate: Candidate, num_replicas: int, load_multiple: float, probe_all: ProbeAll) -> Diagnosis | None:
    """Relax one thing after another on one cluster and load; None if it does not fail."""
    plain = Ask(candidate=candidate, num_replicas=num_replicas, load_multiple=load_multiple)
    names = list(RELAXATIONS)
    failing, *probes = probe_all([plain, *(msgspec.structs.replace(plain, relaxation=name) for name in names)])
    if failing.meets:
        return None
    what_ifs = [
        WhatIf(
            relaxation=name,
            text=RELAXATIONS[name],
            gain=probe.slo_attainment - failing.slo_attainment,
            meets=probe.meets,
            probe=probe,
        )
        for name, probe in zip(names, probes, strict=True)
        if name != "admission" or failing.refused_share
    ]
    what_ifs.sort(key=lambda one: (not one.meets, _rest(one.probe, failing), -one.gain))
    helpful = [one for one in what_ifs if one.meets or one.gain > _LITTLE]
    return Diagnosis(
        binding=helpful[0].relaxation if helpful else "queueing", failing=failing, what_ifs=tuple(what_ifs)
    )


def _rest(probe: Probe, failing: Probe) -> float:
    """What is left of the figures that missed their limits, as a share of them; the largest."""
    rest = []
    for name in failing.missed:
        metric, _, statistic = name.partition("_")
        before = getattr(getattr(failing, f"{metric}_s", None), statistic, 0.0)
        if before > 0:
            rest.append(getattr(getattr(probe, f"{metric}_s"), statistic) / before)
    return max(rest, default=1.0 - (probe.slo_attainment - failing.slo_attainment))


def binding_of(failing: Probe, candidate: Candidate) -> str:
    """What probably binds, told from one failing simulation alone (it may have been stopped early)."""
    if REFUSED in failing.missed:
        return "admission"
    is_full = failing.kv_use_peak > _NEARLY_FULL
    if failing.num_preemptions and is_full:
        return "KV memory"
    missed = {name.split("_")[0] for name in failing.missed}
    if missed <= {"tpot", "itl"} and missed:
        return "decode bandwidth"
    if is_full:
        return "KV memory"
    if failing.mean_batch > 0.9 * candidate.max_num_seqs:
        return "seats"
    if failing.ttft_s.p99 > 0 and failing.queue_s.p99 > 0.5 * failing.ttft_s.p99:
        return "queueing"
    return "prefill compute"
