"""Step times from a fit to our own engine: linear in what a step computes, exact in integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .fit_profile import StepSample, fit
from .host_overhead import HostOverhead
from .interface import StepShape
from .profile import Profile, load_profile, save_profile
from .step_features import FEATURES, features

__all__ = ["FittedModel", "Profile", "StepSample", "fit", "load_profile", "save_profile"]

_SHIFT = 16
_ONE = 1 << _SHIFT
_MAX_INT64 = (1 << 63) - 1


class FittedModel:
    """A `StepTimeModel` over a profile.

    Args:
        profile: of `fit` or `load_profile`.
        host: in place of the profile's.
    """

    def __init__(self, profile: Profile, host: HostOverhead | None = None) -> None:
        self.profile = profile
        self.host = profile.host if host is None else host
        # In units of 2**-16 ns, so that sums are exact.
        self._per_feature = tuple(round(profile.coefficients[name] * _ONE) for name in FEATURES)
        self._per_token = tuple(round(slope * _ONE) for slope in profile.slopes)
        self._kv_units = self._per_feature[FEATURES.index("decode_kv")]
        self._by_tokens: dict[int, int] = {}

    def _step_units(self, shape: StepShape) -> int:
        """The sum over `features`, written out: this is asked for every step."""
        constant, decode, prefill, sample, kv, unequal, pair, history_pair, past = self._per_feature
        num_decodes, kv_tokens = shape.num_decodes, shape.decode_kv_tokens
        num_tokens = num_decodes
        units = constant + decode * num_decodes + sample * shape.num_samples + kv * kv_tokens
        units += unequal * (num_decodes * shape.max_decode_kv - kv_tokens)
        for num_new, num_history in shape.prefills:
            num_tokens += num_new
            units += prefill + pair * num_new * num_new + (history_pair * num_new + past) * num_history
        by_tokens = self._by_tokens.get(num_tokens)
        if by_tokens is None:
            stretches = features(StepShape(num_tokens, 0, 0, (), 0), self.profile.knots)[len(FEATURES) :]
            by_tokens = sum([unit * value for unit, value in zip(self._per_token, stretches, strict=True)])
            self._by_tokens[num_tokens] = by_tokens
        return units + by_tokens

    def step_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        return max(1, self._step_units(shape) >> _SHIFT)

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        """See `StepTimeModel`."""
        # As all rows grow by one, only the sum of the lengths changes: their differences stay.
        first = self._step_units(shape)
        slope = self._kv_units * shape.num_decodes
        if first + slope * num_steps > _MAX_INT64:
            return [max(1, (first + slope * i) >> _SHIFT) for i in range(num_steps)]
        units = first + slope * np.arange(num_steps, dtype=np.int64)
        result: list[int] = np.maximum(1, units >> _SHIFT).tolist()
        return result

    def host_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        return self.host.host_ns(shape)

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        """See `StepTimeModel`."""
        coverage = self.profile.coverage
        if num_steps == 1:
            return 0 if coverage.holds(shape) else 1
        return max(0, num_steps - coverage.decode_steps_inside(shape))

    def describe(self) -> dict[str, str | int | float]:
        """See `StepTimeModel`."""
        described: dict[str, str | int | float] = {"kind": "fitted", "num_samples": self.profile.num_samples}
        described |= {f"error_{name}_mape": error.mape for name, error in self.profile.errors.items()}
        described |= {
            "host_step_ns": self.host.step_ns,
            "host_row_ns": self.host.row_ns,
            "host_prefill_ns": self.host.prefill_ns,
        }
        return {**self.profile.meta, **described}
