"""One simulation asked for by a planner, and what it keeps of the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import msgspec

from ...messages.errors import OctavoError
from ..results import Distribution, Load, RunResult
from ..slo import Slo
from ..step_time.interface import StepTimeModel
from .candidate import Candidate
from .relax import Relaxation

REFUSED = "refused"


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate amounts to, as the engine's own code resolved it.

    Attributes:
        num_blocks, block_size: of the KV cache.
        max_sequence_len: longest prompt plus output that it takes.
        num_gpus: of one replica.
        cost_per_hour: of one replica.
    """

    num_blocks: int
    block_size: int
    max_sequence_len: int
    num_gpus: int
    cost_per_hour: float


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """A simulation's figures, as far as planning needs them.

    Attributes:
        load_multiple: the trace's load times this was offered.
        meets: every limit held, no more requests were turned away than allowed, and the cluster kept up.
        missed: names of the limits that did not hold; `refused`, if too many were turned away; `load`.
        is_complete: whether it ran to the end; the figures of one that was stopped early cover its beginning alone.
    """

    num_replicas: int
    load_multiple: float
    meets: bool
    missed: tuple[str, ...]
    is_complete: bool
    load: Load
    ttft_s: Distribution
    tpot_s: Distribution
    e2e_s: Distribution
    queue_s: Distribution
    slo_attainment: float
    goodput_rps: float
    refused_share: float
    kv_use_peak: float
    busy_share: float
    mean_batch: float
    num_preemptions: int
    prefix_hit_rate: float
    extrapolated_share: float
    cost_per_hour: float
    event_log_sha256: str


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One simulation to make.

    Attributes:
        load_multiple: of the trace's load.
        stop_early: end it once it cannot meet the limits any more.
        relaxation: more of one thing.
    """

    candidate: Candidate
    num_replicas: int
    load_multiple: float = 1.0
    stop_early: bool = False
    relaxation: Relaxation | None = None


class CannotBootError(OctavoError):
    """This candidate would not start; the planner goes on with the others."""

    code = "cannot_boot"


class Prober(Protocol):
    """Simulates candidates on one workload."""

    def replica(self, candidate: Candidate) -> Replica:
        """What the candidate amounts to.

        Raises:
            CannotBootError: the engine would refuse to start so.
        """
        ...

    def model(self, candidate: Candidate) -> StepTimeModel:
        """How long its steps take."""
        ...

    def demands(self) -> Sequence[tuple[int, int, int]]:
        """`(arrival_ns, num_prompt_tokens, num_output_tokens)` of the requests known beforehand, by arrival."""
        ...

    @property
    def may_share_prefixes(self) -> bool:
        """Whether prompts may begin alike."""
        ...

    @property
    def has_all_demands(self) -> bool:
        """Whether every request is known beforehand, so that `demands` is the whole load."""
        ...

    def probe(self, ask: Ask) -> Probe:
        """Simulate; the same question gets the same answer."""
        ...


def judge(result: RunResult, slo: Slo, *, max_refused: float, load_multiple: float, is_complete: bool) -> Probe:
    """What a planner keeps of a simulation.

    Args:
        max_refused: share of requests that may be turned away or fail.
        is_complete: whether it ran to the end.
    """
    missed = [term.name for term in slo.terms if not _holds(result, term.metric, term.statistic, term.limit_s)]
    lost = result.num_refused + result.num_timeout
    if is_complete:  # what is open when a run is stopped counts as failed
        lost += result.num_failed
    refused_share = lost / result.num_requests if result.num_requests else 0.0
    if refused_share > max_refused:
        missed.append(REFUSED)
    if result.load == "OVERLOADED":
        missed.append("load")
    if not result.slo_met and not missed and is_complete:
        missed.append(REFUSED)  # the figures are of those that are done; those that are not have waited for ever
    busy = [replica for replica in result.replicas if replica.num_steps]
    return Probe(
        num_replicas=len(result.replicas),
        load_multiple=load_multiple,
        meets=is_complete and result.slo_met and not missed,
        missed=tuple(missed),
        is_complete=is_complete,
        load=result.load,
        ttft_s=result.ttft_s,
        tpot_s=result.tpot_s,
        e2e_s=result.e2e_s,
        queue_s=result.queue_s,
        slo_attainment=result.slo_attainment,
        goodput_rps=result.goodput_rps,
        refused_share=refused_share,
        kv_use_peak=result.kv_use_peak,
        busy_share=result.busy_share,
        mean_batch=sum(replica.mean_batch for replica in busy) / len(busy) if busy else 0.0,
        num_preemptions=result.num_preemptions,
        prefix_hit_rate=result.prefix_hit_rate,
        extrapolated_share=result.extrapolated_share,
        cost_per_hour=result.cost_per_hour,
        event_log_sha256=result.event_log_sha256,
    )


def _holds(result: RunResult, metric: str, statistic: str, limit_s: float) -> bool:
    value: float = getattr(getattr(result, f"{metric}_s"), statistic)
    return math.isnan(value) or value <= limit_s  # no request has this figure: nothing that could miss
