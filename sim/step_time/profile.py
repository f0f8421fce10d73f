"""A fitted step-time model as a file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ...messages.errors import InvalidConfigError
from .host_overhead import HostOverhead
from .interface import StepShape
from .step_features import FEATURES, regime

FORMAT = "octavo-step-time-profile"
VERSION = 1
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Coverage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The box of what was measured: the greatest of each; nothing below it is foreign.

    Attributes:
        regimes: `decode`, `prefill`, `mixed`: those that were met.
        max_chunk, max_history: of one row of prefill.
    """

    regimes: tuple[str, ...]
    max_tokens: int
    max_decodes: int
    max_prefills: int
    max_samples: int
    max_decode_kv: int
    max_decode_kv_tokens: int
    max_chunk: int
    max_history: int

    def holds(self, shape: StepShape) -> bool:
        """Whether a step lies inside."""
        return (
            shape.num_tokens <= self.max_tokens
            and shape.num_decodes <= self.max_decodes
            and len(shape.prefills) <= self.max_prefills
            and shape.num_samples <= self.max_samples
            and shape.max_decode_kv <= self.max_decode_kv
            and shape.decode_kv_tokens <= self.max_decode_kv_tokens
            and all(new <= self.max_chunk and history <= self.max_history for new, history in shape.prefills)
            and regime(shape) in self.regimes
        )

    def decode_steps_inside(self, shape: StepShape) -> int:
        """How many decode steps from this one on, rows growing, lie inside."""
        if not self.holds(shape):
            return 0
        num_steps = self.max_decode_kv - shape.max_decode_kv
        if shape.num_decodes:
            num_steps = min(num_steps, (self.max_decode_kv_tokens - shape.decode_kv_tokens) // shape.num_decodes)
        return num_steps + 1


class RegimeError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far off the model was on samples held out.

    Attributes:
        mape: mean of |predicted / measured - 1|.
        bias: sum of predicted / sum of measured - 1.
        quantiles: of measured / predicted - 1, at `QUANTILES`.
    """

    num_samples: int
    mape: float
    bias: float
    quantiles: tuple[float, ...]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fit of step times; the file holds these fields as JSON.

    Attributes:
        meta: what was measured (model, device, engine's commit, settings), as given to `fit`.
        coefficients: ns for each unit of each feature of `FEATURES`; from 0 up.
        knots: numbers of tokens where the slope changes.
        slopes: ns a token in each stretch between them, `len(knots) + 1`.
        errors: on samples held out, by regime and `overall`.
    """

    format: str
    version: int
    meta: dict[str, str | int | float]
    num_samples: int
    coefficients: dict[str, float]
    knots: tuple[int, ...]
    slopes: tuple[float, ...]
    host: HostOverhead
    coverage: Coverage
    errors: dict[str, RegimeError]


def save_profile(profile: Profile, path: Path) -> None:
    """Write it as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def load_profile(path: Path) -> Profile:
    """Read it back.

    Raises:
        InvalidConfigError: no such file, not a profile, another version, or numbers that cannot be.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidConfigError(f"{path} cannot be read: {error.strerror or error}", field="profile") from None
    try:
        header = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        kind = msgspec.json.decode(header.get("format", b'""'))
        version = msgspec.json.decode(header.get("version", b"0"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidConfigError(f"{path} is no step-time profile: {error}", field="profile") from None
    if kind != FORMAT:
        raise InvalidConfigError(
            f"{path} is no step-time profile: its format is {kind!r}, not {FORMAT!r}; `octavo sim calibrate` makes one",
            field="profile",
        )
    if version != VERSION:
        raise InvalidConfigError(
            f"{path} is a step-time profile of version {version}, but version {VERSION} is read here: calibrate again",
            field="profile",
        )
    try:
        profile = msgspec.json.decode(raw, type=Profile)
    except (msgspec.DecodeError, ValueError) as error:
        raise InvalidConfigError(f"{path} is a damaged step-time profile: {error}", field="profile") from None
    problem = _problem(profile)
    if problem:
        raise InvalidConfigError(f"{path} is a damaged step-time profile: {problem}", field="profile")
    return profile


def _problem(profile: Profile) -> str:
    """What cannot be in a profile; empty: nothing."""
    if set(profile.coefficients) != set(FEATURES):
        return f"its coefficients are {', '.join(profile.coefficients)}, but must be {', '.join(FEATURES)}"
    if any(not 0.0 <= value < 1e18 for value in (*profile.coefficients.values(), *profile.slopes)):
        return "a coefficient is negative or too large"
    if len(profile.slopes) != len(profile.knots) + 1:
        return f"{len(profile.knots)} knots need {len(profile.knots) + 1} slopes, not {len(profile.slopes)}"
    if list(profile.knots) != sorted(set(profile.knots)) or any(knot < 1 for knot in profile.knots):
        return "its knots do not ascend from 1 up"
    return ""
