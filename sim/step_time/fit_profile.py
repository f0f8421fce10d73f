"""Fitting step times to what an engine measured of itself."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ...messages.errors import InvalidConfigError
from .host_overhead import HostOverhead
from .interface import StepShape
from .nnls import Floats, nnls
from .profile import FORMAT, QUANTILES, VERSION, Coverage, Profile, RegimeError
from .step_features import FEATURES, features, regime

MIN_SAMPLES = 20
_MAX_KNOTS = 6
_WORTH_A_KNOT = 0.03  # of the squared error
_ROBUST_ROUNDS = 4


class StepSample(msgspec.Struct, frozen=True, gc=False):
    """A step that was measured.

    Attributes:
        duration_ns: that the device was busy.
        host_ns: from its end to the begin of the step planned in answer to it; 0: not measured.
    """

    shape: StepShape
    duration_ns: int
    host_ns: int = 0


def fit(
    samples: Sequence[StepSample],
    meta: Mapping[str, str | int | float],
    *,
    seed: int = 0,
    holdout: float = 0.2,
) -> Profile:
    """Fit coefficients from 0 up to samples, by relative error, and say how good they are on samples held out.

    Samples that are far off the rest (another process took the machine) count less, as Huber's loss has it.

    Args:
        samples: of all regimes that will be asked for.
        meta: kept in the profile.
        seed: of the choice of what is held out.
        holdout: share held out.

    Raises:
        InvalidConfigError: too few samples, or a duration that is not above 0.
    """
    if len(samples) < MIN_SAMPLES:
        raise InvalidConfigError(
            f"{len(samples)} measured steps are too few to fit step times: at least {MIN_SAMPLES}", field="samples"
        )
    if any(sample.duration_ns <= 0 or not sample.shape.num_tokens for sample in samples):
        raise InvalidConfigError("a measured step has no tokens or took no time", field="samples")
    order = list(range(len(samples)))
    random.Random(f"{seed}:holdout").shuffle(order)  # noqa: S311 (which samples, not a secret)
    num_held = min(max(1, round(holdout * len(samples))), len(samples) // 2)
    held = [samples[i] for i in sorted(order[:num_held])]
    trained = [samples[i] for i in sorted(order[num_held:])]
    knots = _choose_knots(trained)
    trial = _solve(trained, knots)
    final = _solve(samples, knots)
    return Profile(
        format=FORMAT,
        version=VERSION,
        meta=dict(meta),
        num_samples=len(samples),
        coefficients=dict(zip(FEATURES, final[: len(FEATURES)].tolist(), strict=True)),
        knots=knots,
        slopes=tuple(final[len(FEATURES) :].tolist()),
        host=_fit_host(samples),
        coverage=_coverage(samples),
        errors=_errors(held, knots, trial),
    )


def _matrix(samples: Sequence[StepSample], knots: Sequence[int]) -> tuple[Floats, Floats]:
    """Features divided by the duration, so that an error of 1 is one of 100 %; and the durations."""
    durations = np.array([sample.duration_ns for sample in samples], dtype=np.float64)
    values = np.array([features(sample.shape, knots) for sample in samples], dtype=np.float64)
    return values / durations[:, None], durations


def _solve(samples: Sequence[StepSample], knots: Sequence[int]) -> Floats:
    matrix, _ = _matrix(samples, knots)
    return _robust(matrix)


def _robust(matrix: Floats) -> Floats:
    """Least relative squares with Huber's weights."""
    target = np.ones(len(matrix))
    coefficients = nnls(matrix, target)
    for _ in range(_ROBUST_ROUNDS):
        residuals = np.abs(matrix @ coefficients - target)
        # Four median residuals is 2.7 standard deviations of a normal error: only what is foreign counts less.
        limit = max(4.0 * float(np.median(residuals)), 1e-6)
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(residuals, 1e-12)))
        coefficients = nnls(matrix * weights[:, None], target * weights)
    return coefficients


def _choose_knots(samples: Sequence[StepSample]) -> tuple[int, ...]:
    """Where the slope over tokens changes: one knot after the other, each the best, while it is worth it."""
    tokens = np.array([sample.shape.num_tokens for sample in samples])
    most = int(tokens.max())
    candidates = sorted({size for power in range(20) for size in (1 << power, 3 << power) if size < most})
    candidates = [knot for knot in candidates if (tokens <= knot).any() and (tokens > knot).any()]
    knots: tuple[int, ...] = ()
    error = _squared_error(samples, knots)
    while len(knots) < _MAX_KNOTS:
        trials = [
            (_squared_error(samples, tuple(sorted((*knots, knot)))), knot) for knot in candidates if knot not in knots
        ]
        if not trials:
            break
        best_error, knot = min(trials)
        if best_error > (1.0 - _WORTH_A_KNOT) * error:
            break
        knots, error = tuple(sorted((*knots, knot))), best_error
    return knots


def _squared_error(samples: Sequence[StepSample], knots: Sequence[int]) -> float:
    """Of the plain fit, errors cut at 50 % so that what is foreign decides nothing."""
    matrix, _ = _matrix(samples, knots)
    residuals = matrix @ nnls(matrix, np.ones(len(matrix))) - 1.0
    return float(np.minimum(np.abs(residuals), 0.5) @ np.minimum(np.abs(residuals), 0.5))


def _fit_host(samples: Sequence[StepSample]) -> HostOverhead:
    """Constant, rows and prefill of the host's time; zero where it was not measured."""
    measured = [sample for sample in samples if sample.host_ns > 0]
    if len(measured) < MIN_SAMPLES:
        return HostOverhead(0, 0, 0)
    rows = np.array(
        [
            (1.0, sample.shape.num_decodes + len(sample.shape.prefills), bool(sample.shape.prefills))
            for sample in measured
        ],
        dtype=np.float64,
    )
    times = np.array([sample.host_ns for sample in measured], dtype=np.float64)
    step_ns, row_ns, prefill_ns = _robust(rows / times[:, None]).tolist()
    return HostOverhead(round(step_ns), round(row_ns), round(prefill_ns))


def _coverage(samples: Sequence[StepSample]) -> Coverage:
    shapes = [sample.shape for sample in samples]
    met = {regime(shape) for shape in shapes}
    return Coverage(
        regimes=tuple(name for name in ("decode", "prefill", "mixed") if name in met),
        max_tokens=max(shape.num_tokens for shape in shapes),
        max_decodes=max(shape.num_decodes for shape in shapes),
        max_prefills=max(len(shape.prefills) for shape in shapes),
        max_samples=max(shape.num_samples for shape in shapes),
        max_decode_kv=max(shape.max_decode_kv for shape in shapes),
        max_decode_kv_tokens=max(shape.decode_kv_tokens for shape in shapes),
        max_chunk=max((new for shape in shapes for new, _ in shape.prefills), default=0),
        max_history=max((history for shape in shapes for _, history in shape.prefills), default=0),
    )


def _errors(held: Sequence[StepSample], knots: Sequence[int], coefficients: Floats) -> dict[str, RegimeError]:
    """By regime, and over all."""
    found = {}
    for name in ("overall", "decode", "prefill", "mixed"):
        group = [sample for sample in held if name in ("overall", regime(sample.shape))]
        if not group:
            continue
        matrix, durations = _matrix(group, knots)
        ratio = matrix @ coefficients
        found[name] = RegimeError(
            num_samples=len(group),
            mape=float(np.abs(ratio - 1.0).mean()),
            bias=float((ratio * durations).sum() / durations.sum() - 1.0),
            quantiles=tuple(np.quantile(1.0 / np.maximum(ratio, 1e-9) - 1.0, QUANTILES).tolist()),
        )
    return found
