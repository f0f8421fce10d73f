"""How near a simulation comes to a real server's run, request by request.

The run's requests go through the production scheduler under virtual time, with the server's settings and a step-time
model. What a step takes beyond its operators is fitted on the first requests; the others are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from ..messages.errors import InvalidConfigError, InvalidTraceError
from .config import SimConfig
from .deployment import DEFAULT_GPU, Deployment, ResolvedDeployment
from .results import RequestRecord
from .simulation import simulate
from .step_time.exposed_overhead import WithExposedOverhead
from .step_time.gpus import gpu_in
from .step_time.host_overhead import HostOverhead
from .step_time.interface import StepTimeModel
from .step_time.known_models import DEFAULT_MODEL
from .step_time.nnls import Floats, nnls
from .workload.request import Workload
from .workload.trace import read_trace
from .workload.trace_file import TraceFile

STATISTICS: tuple[str, ...] = ("mean", "p50", "p90", "p99")
DEFAULT_NUM_FITTED = 100
_FIT_SLOPES = 3  # times that slopes are taken
_FIT_STEPS = 3  # along each
_MOST_SIMULATIONS = 1 + _FIT_SLOPES * (3 + _FIT_STEPS)
_PROBE_SHARE = 0.03  # of a decode step: how much overhead is tried to find the slopes
_EXACT = 1e-4  # relative error that needs no more steps

Progress = Callable[[int, int], None]
"""Called with simulations done and the most there will be."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a server did with a request; ms. Times count from when its engine took the request.

    Attributes:
        ttft_ms, last_token_ms: first and last token.
        tpot_ms: between tokens after the first.
        queued_ms: when the engine took it, on the clock of the trace's `timestamp`; None: on arrival.
    """

    ttft_ms: float
    last_token_ms: float
    tpot_ms: float | None = None
    queued_ms: float | None = None


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    measured: Measured


class _EngineKwargs(msgspec.Struct, frozen=True):
    """vLLM's names."""

    model: str | None = None
    tensor_parallel_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    dtype: str | None = None


class _RunMeta(msgspec.Struct, frozen=True):
    model: str | None = None
    engine_kwargs: _EngineKwargs = _EngineKwargs()


class MetricError(msgspec.Struct, frozen=True, kw_only=True):
    """One metric over the scored requests; seconds, and simulated / measured - 1, by statistic."""

    measured: dict[str, float]
    simulated: dict[str, float]
    error: dict[str, float]


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """What came out; the field names are the JSON's.

    Attributes:
        settings: of the server, as simulated.
        num_fitted: leading requests that the overhead was fitted on; they are not scored.
        overhead: fitted, part of each step.
        ttft, tpot, e2e: from arrival at the server.
        extrapolated_share: steps outside the step-time model's coverage.
    """

    requests: str
    profile: str
    settings: dict[str, str | int | float | bool]
    num_requests: int
    num_fitted: int
    num_scored: int
    overhead: HostOverhead
    ttft: MetricError
    tpot: MetricError
    e2e: MetricError
    extrapolated_share: float
    event_log_sha256: str

    @property
    def worst(self) -> float:
        """Greatest error of TPOT and end-to-end time, mean to p99."""
        return max(abs(error) for metric in (self.tpot, self.e2e) for error in metric.error.values())


class _Figures(msgspec.Struct, frozen=True):
    """TTFT, TPOT, E2E of each request, seconds; NaN where there is none."""

    ttft: Floats
    tpot: Floats
    e2e: Floats


def deployment_of(profile: Path, changes: dict[str, object] | None = None) -> Deployment:
    """The measured server as a deployment: a profile's `run_meta.json` (vLLM's settings), the GPU of its name.

    Args:
        profile: a folder of tables, or a fitted profile's file.
        changes: fields of `Deployment` that override what is found.

    Raises:
        InvalidConfigError: the settings are malformed, or a field does not exist.
    """
    fields: dict[str, object] = {"profile": str(profile), "gpu": DEFAULT_GPU, "model": DEFAULT_MODEL}
    gpu = gpu_in(profile.name)
    if gpu is not None:
        fields["gpu"] = gpu.name
    if profile.is_dir():
        # What tables lack is all in the overhead that is fitted; a profile of our own engine knows its host's time.
        fields["host"] = HostOverhead(0, 0, 0)
    file = profile / "run_meta.json" if profile.is_dir() else profile.with_name("run_meta.json")
    if file.is_file():
        try:
            meta = msgspec.json.decode(file.read_bytes(), type=_RunMeta)
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            raise InvalidConfigError(f"{file} is no run's description: {error}", field="profile") from None
        kwargs = meta.engine_kwargs
        found = {
            "model": meta.model or kwargs.model,
            "tp": kwargs.tensor_parallel_size,
            "max_num_seqs": kwargs.max_num_seqs,
            "max_num_batched_tokens": kwargs.max_num_batched_tokens,
            "max_model_len": kwargs.max_model_len,
            "dtype": kwargs.dtype,
        }
        fields |= {name: value for name, value in found.items() if value is not None}
    fields |= changes or {}
    try:
        return msgspec.convert(fields, Deployment)
    except msgspec.ValidationError as error:
        raise InvalidConfigError(f"the measured server's settings: {error}", field="profile") from None


def validate(
    profile: Path,
    requests: Path,
    *,
    changes: dict[str, object] | None = None,
    num_fitted: int | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Simulate a measured run and compare.

    Args:
        profile: of the server's GPU and model.
        requests: Mooncake JSON lines with `measured` in each; see `Measured`.
        changes: fields of `Deployment` in place of the profile's.
        num_fitted: leading requests to fit the overhead on; 0: none, all are scored; None: 100 with tables, which hold
            operators, and 0 with a fitted profile, which holds whole steps.
        progress: told after each simulation.

    Raises:
        InvalidConfigError: see `Deployment.resolve`; more requests to fit on than there are.
        InvalidTraceError: the file is malformed.
    """
    workload = read_trace(requests)
    measured = _read_measured(requests)
    deployment = deployment_of(profile, changes)
    resolved = deployment.resolve()
    if num_fitted is None:
        num_fitted = DEFAULT_NUM_FITTED if profile.is_dir() else 0
    if not 0 <= num_fitted < len(measured.e2e):
        raise InvalidConfigError(
            f"num_fitted is {num_fitted}, but must be from 0 to {len(measured.e2e) - 1}: at least one of "
            f"{len(measured.e2e)} requests has to be scored",
            field="num_fitted",
        )
    run = _Run(workload, resolved, progress, _MOST_SIMULATIONS if num_fitted else 1)
    overhead = HostOverhead(0, 0, 0)
    if num_fitted:
        overhead = _fit_overhead(run, measured, num_fitted)
    figures, share, digest = run(overhead)
    scored = slice(num_fitted, None)
    scheduler = resolved.scheduler
    return Validation(
        requests=str(requests),
        profile=str(profile),
        settings={
            "gpu": resolved.gpu.name,
            "model": resolved.model.name,
            "tensor_parallel_size": resolved.gpus_per_replica,
            "num_blocks": scheduler.num_blocks,
            "block_size": scheduler.block_size,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_model_len": scheduler.max_model_len,
            "pipeline_depth": scheduler.pipeline_depth,
            "enable_prefix_caching": scheduler.enable_prefix_caching,
        },
        num_requests=len(measured.e2e),
        num_fitted=num_fitted,
        num_scored=len(measured.e2e) - num_fitted,
        overhead=overhead,
        ttft=_compare(measured.ttft[scored], figures.ttft[scored]),
        tpot=_compare(measured.tpot[scored], figures.tpot[scored]),
        e2e=_compare(measured.e2e[scored], figures.e2e[scored]),
        extrapolated_share=share,
        event_log_sha256=digest,
    )


class _Run:
    """Simulations of one workload that differ in the overhead alone; none is run twice."""

    def __init__(
        self, workload: Workload, resolved: ResolvedDeployment, progress: Progress | None, num_most: int
    ) -> None:
        self._workload = workload
        self._model: StepTimeModel = resolved.step_time
        self._config = SimConfig(scheduler=resolved.scheduler)
        self.max_num_seqs = resolved.scheduler.max_num_seqs
        self._progress = progress
        self._num_most = num_most
        self._done: dict[HostOverhead, tuple[_Figures, float, str]] = {}

    def __call__(self, overhead: HostOverhead) -> tuple[_Figures, float, str]:
        """Figures of each request, share of steps extrapolated, hash of the event log."""
        if overhead not in self._done:
            simulation = simulate(self._config, self._workload, WithExposedOverhead(self._model, overhead))
            lost = [record for record in simulation.records if record.outcome != "done"]
            if lost:
                scheduler = self._config.scheduler
                raise InvalidConfigError(
                    f"{len(lost)} of {len(simulation.records)} measured requests cannot be served with these settings "
                    f"({scheduler.num_blocks} blocks, max_model_len {scheduler.max_model_len}); the first has "
                    f"{lost[0].num_prompt_tokens} prompt tokens: {lost[0].outcome}",
                    field="profile",
                )
            result = simulation.result
            self._done[overhead] = (_figures(simulation.records), result.extrapolated_share, result.event_log_sha256)
            if self._progress is not None:
                self._progress(len(self._done), self._num_most)
        return self._done[overhead]


def _figures(records: Sequence[RequestRecord]) -> _Figures:
    return _Figures(
        ttft=np.array([record.ttft_s for record in records]),
        tpot=np.array([record.tpot_s for record in records]),
        e2e=np.array([record.e2e_s for record in records]),
    )


def _read_measured(path: Path) -> _Figures:
    """What was measured, in the order in which the workload's requests arrive."""
    decoder = msgspec.json.Decoder(_Row)
    rows = []
    for number, line in enumerate(TraceFile(path).lines(), start=1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidTraceError(
                f"is not a measured request: {error}",
                file=str(path),
                line=number,
                advice="each line needs `measured` with ttft_ms and last_token_ms",
            ) from None
        if min(times := (row.measured.ttft_ms, row.measured.last_token_ms)) <= 0.0:
            raise InvalidTraceError(
                f"ttft_ms and last_token_ms are {times}, but must be above 0", file=str(path), line=number
            )
        if row.input_length > 0 and row.output_length > 0:
            rows.append(row)
    rows.sort(key=lambda row: row.timestamp)
    ttft, tpot, e2e = [], [], []
    for row in rows:
        measured = row.measured
        taken_ms = row.timestamp if measured.queued_ms is None else measured.queued_ms
        ttft.append((taken_ms - row.timestamp + measured.ttft_ms) / 1e3)
        e2e.append((taken_ms - row.timestamp + measured.last_token_ms) / 1e3)
        per_token_ms = measured.tpot_ms
        if per_token_ms is None or row.output_length < 2:
            between = row.output_length - 1
            per_token_ms = (measured.last_token_ms - measured.ttft_ms) / between if between else float("nan")
        tpot.append(per_token_ms / 1e3)
    return _Figures(np.array(ttft), np.array(tpot), np.array(e2e))


def _fit_overhead(run: _Run, measured: _Figures, num_fitted: int) -> HostOverhead:
    """Gauss-Newton on the relative errors of TPOT and E2E, coefficients from 0 up; the best point met.

    Simulations take time and the figures are nearly linear in the overhead, so slopes are taken anew only once steps
    along the old ones no longer help.
    """
    step_ns = _PROBE_SHARE * float(np.nanmean(measured.tpot)) * 1e9
    unit_ns = np.array([step_ns, step_ns / run.max_num_seqs, 2 * step_ns])  # like effects, roughly

    def residuals(units: Floats) -> Floats:
        return _residuals(run(_overhead(units * unit_ns))[0], measured, num_fitted)

    best = np.zeros(3)
    here = residuals(best)
    for _ in range(_FIT_SLOPES):
        slopes = np.stack([residuals(best + probe) - here for probe in np.eye(3)], axis=1)
        begin = float(here @ here)
        for _ in range(_FIT_STEPS):
            trial = nnls(slopes, slopes @ best - here)
            there = residuals(trial)
            if there @ there >= 0.99 * float(here @ here):
                if there @ there < here @ here:
                    best, here = trial, there
                break
            best, here = trial, there
        if here @ here >= 0.95 * begin or math.sqrt(here @ here / len(here)) < _EXACT:
            break
    return _overhead(best * unit_ns)


def _overhead(ns: Floats) -> HostOverhead:
    step_ns, row_ns, prefill_ns = (round(float(value)) for value in ns)
    return HostOverhead(step_ns, row_ns, prefill_ns)


def _residuals(figures: _Figures, measured: _Figures, num_fitted: int) -> Floats:
    """Logarithms of simulated / measured over the leading requests."""
    first = slice(0, num_fitted)
    ratios = np.concatenate([figures.tpot[first] / measured.tpot[first], figures.e2e[first] / measured.e2e[first]])
    found: Floats = np.log(ratios[np.isfinite(ratios)])
    return found


def _compare(measured: Floats, simulated: Floats) -> MetricError:
    """Mean and nearest-rank percentiles of both."""
    there, found = _statistics(measured), _statistics(simulated)
    return MetricError(
        measured=there, simulated=found, error={name: found[name] / there[name] - 1.0 for name in STATISTICS}
    )


def _statistics(values: Floats) -> dict[str, float]:
    values = np.sort(values[np.isfinite(values)])
    if not len(values):
        return dict.fromkeys(STATISTICS, float("nan"))
    ranks = {name: -(-int(name[1:]) * len(values) // 100) - 1 for name in STATISTICS[1:]}
    return {"mean": float(values.mean()), **{name: float(values[rank]) for name, rank in ranks.items()}}
