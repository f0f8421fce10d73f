"""What no number of replicas can do, and how many there are at least, without simulating.

Impossibilities are proofs, given that a row more never makes a step shorter. The number of replicas is only where a
search begins: it is always confirmed by simulation, so an error of it costs time and changes no answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..slo import Slo, SloTerm
from ..step_time.interface import StepShape, StepTimeModel
from .candidate import Candidate
from .probe import Prober

_NS = 1_000_000_000
_MEAN = -1.0


def impossibility(candidate: Candidate, prober: Prober, slo: Slo, max_refused: float) -> tuple[str, str] | None:
    """Why no number of replicas is enough: `(what binds, in words)`; None if nothing forbids it.

    Only requests that are known beforehand are looked at.
    """
    demands = prober.demands()
    if not demands or not prober.has_all_demands:
        return None
    replica, model = prober.replica(candidate), prober.model(candidate)
    too_long = sum(1 for _, prompt, output in demands if prompt + output > replica.max_sequence_len)
    if too_long > max_refused * len(demands):
        longest = max(prompt + output for _, prompt, output in demands)
        return (
            "context",
            f"{too_long} of {len(demands)} requests are longer than the {replica.max_sequence_len} tokens that one "
            f"replica holds ({replica.num_blocks} KV blocks of {replica.block_size}); the longest needs {longest}",
        )
    fitting = [demand for demand in demands if demand[1] + demand[2] <= replica.max_sequence_len]
    for term in slo.terms:
        found = _alone(term, candidate, fitting, model, shares_prefixes=_shares(candidate, prober))
        if found:
            return found
    return None


def fewest_replicas(candidate: Candidate, prober: Prober, slo: Slo) -> int:
    """About how many replicas the work needs at least, from what the limits leave for it; 1 if they leave it open.

    Prompts of the requests that arrive within a window must be computed by its end plus the limit of TTFT. If tokens
    have a limit too, all work must be done by the last request's deadline.
    """
    demands = prober.demands()
    limits = slo.request_limits()
    if not demands or "ttft" not in limits or _shares(candidate, prober):
        return 1
    model = prober.model(candidate)
    chunk = candidate.max_num_batched_tokens
    prefill_ns = min(
        model.step_ns(StepShape(0, 0, 0, ((size, 0),), 1)) / size for size in sorted({chunk, max(1, chunk // 2), 1})
    )
    spared = _allowed_misses(slo, len(demands))
    slack_ns = limits["ttft"] * _NS
    needed = 1
    span_ns = demands[-1][0] - demands[0][0]
    for window_ns in (10 * _NS, 30 * _NS, 60 * _NS, 300 * _NS, span_ns + 1):
        work_ns = _busiest(demands, window_ns, spared) * prefill_ns
        needed = max(needed, int(work_ns / (window_ns + slack_ns)))
    return needed


def _shares(candidate: Candidate, prober: Prober) -> bool:
    return candidate.enable_prefix_caching and prober.may_share_prefixes


def _allowed_misses(slo: Slo, count: int) -> int:
    """Requests that may miss the limit of TTFT, by its loosest reading."""
    shares = [
        (100.0 - term.percentile) / 100 if term.percentile > 0 else 1.0 for term in slo.terms if term.metric == "ttft"
    ]
    return int(max(shares, default=0.0) * count)


def _busiest(demands: Sequence[tuple[int, int, int]], window_ns: int, spared: int) -> int:
    """Most prompt tokens that arrive within a window, less the longest `spared` prompts of it."""
    most = tokens = begin = 0
    best = (0, 0)
    for end, (arrival_ns, prompt, _) in enumerate(demands):
        tokens += prompt
        while demands[begin][0] < arrival_ns - window_ns:
            tokens -= demands[begin][1]
            begin += 1
        if tokens > most:
            most, best = tokens, (begin, end + 1)
    prompts = sorted((prompt for _, prompt, _ in demands[best[0] : best[1]]), reverse=True)
    return sum(prompts[spared:])


def _alone(
    term: SloTerm,
    candidate: Candidate,
    demands: Sequence[tuple[int, int, int]],
    model: StepTimeModel,
    *,
    shares_prefixes: bool,
) -> tuple[str, str] | None:
    """Whether the limit is missed even by requests that have a replica to themselves."""
    if term.percentile == _MEAN or term.metric not in ("ttft", "tpot", "e2e"):
        return None
    limit_ns = term.limit_s * _NS
    chunk = candidate.max_num_batched_tokens
    prefill: dict[int, int] = {}  # prompt length -> least time
    decode: dict[int, int] = {}

    def prefill_ns(prompt: int) -> int:
        if prompt not in prefill:
            if shares_prefixes:  # all but the last token may come from the cache
                prefill[prompt] = model.step_ns(StepShape(0, 0, 0, ((1, prompt - 1),), 1))
            else:
                prefill[prompt] = sum(
                    model.step_ns(StepShape(0, 0, 0, ((min(chunk, prompt - done), done),), int(done + chunk >= prompt)))
                    for done in range(0, prompt, chunk)
                )
        return prefill[prompt]

    def decode_ns(context: int) -> int:
        if context not in decode:
            decode[context] = model.step_ns(StepShape(1, context, context, (), 1))
        return decode[context]

    missed = counted = 0
    for _, prompt, output in demands:
        if term.metric == "ttft":
            least = prefill_ns(prompt)
        elif output < 2:
            if term.metric == "tpot":
                continue
            least = prefill_ns(prompt)
        else:
            least = decode_ns(prompt + 1)
            if term.metric == "e2e":
                least = prefill_ns(prompt) + (output - 1) * least
        counted += 1
        missed += least > limit_ns
    # by nearest rank, the statistic holds if at least `percentile` of 100 are within the limit
    if counted and (counted - missed) * 100 < term.percentile * counted:
        what = {"ttft": "one prefill", "tpot": "one decode step", "e2e": "one request"}[term.metric]
        return (
            {"ttft": "prefill compute", "tpot": "decode bandwidth", "e2e": "decode bandwidth"}[term.metric],
            f"{missed} of {counted} requests miss {term.name} even alone on a replica: {what} takes longer than "
            f"{term.limit_s:g} s on {candidate.tensor_parallel_size} x {candidate.gpu}",
        )
    return None
