import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_time_tools import assert_run_equals_steps, decode_shapes, step_shapes

from octavo.sim.step_time.fitted import FittedModel
from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.profile import FORMAT, VERSION, Coverage, Profile, RegimeError
from octavo.sim.step_time.step_features import FEATURES, features

COVERAGE = Coverage(
    regimes=("decode", "mixed"),
    max_tokens=2000,
    max_decodes=200,
    max_prefills=2,
    max_samples=200,
    max_decode_kv=10_000,
    max_decode_kv_tokens=1_000_000,
    max_chunk=2000,
    max_history=5000,
)
PROFILE = Profile(
    format=FORMAT,
    version=VERSION,
    meta={"model": "tiny"},
    num_samples=100,
    coefficients={name: 1.7 ** (i + 1) / 3 for i, name in enumerate(FEATURES)},
    knots=(4, 100),
    slopes=(0.0, 1234.5, 77.7),
    host=HostOverhead(11, 3),
    coverage=COVERAGE,
    errors={"overall": RegimeError(num_samples=20, mape=0.04, bias=0.01, quantiles=())},
)
MODEL = FittedModel(PROFILE)


@given(decode_shapes(), st.integers(0, 60))
def test_a_run_of_decodes_equals_its_steps_bit_for_bit(shape: StepShape, num_steps: int) -> None:
    assert_run_equals_steps(MODEL, shape, num_steps)


def test_a_run_that_leaves_64_bits_equals_its_steps() -> None:
    steep = msgspec.structs.replace(PROFILE, coefficients={**PROFILE.coefficients, "decode_kv": 1e9})
    shape = StepShape(2, 1 << 40, 1 << 39, (), 2)
    assert_run_equals_steps(FittedModel(steep), shape, 5)


@given(step_shapes())
def test_a_step_is_the_sum_over_its_features(shape: StepShape) -> None:
    coefficients = [*PROFILE.coefficients.values(), *PROFILE.slopes]
    total = sum(c * value for c, value in zip(coefficients, features(shape, PROFILE.knots), strict=True))
    assert MODEL.step_ns(shape) == pytest.approx(total, rel=1e-4, abs=2)  # each of two parts is rounded


@given(step_shapes(), st.integers(1, 3))
def test_scaling_every_coefficient_scales_every_step(shape: StepShape, factor: int) -> None:
    scaled = msgspec.structs.replace(
        PROFILE,
        coefficients={name: value * factor for name, value in PROFILE.coefficients.items()},
        slopes=tuple(slope * factor for slope in PROFILE.slopes),
    )
    assert FittedModel(scaled).step_ns(shape) == pytest.approx(MODEL.step_ns(shape) * factor, rel=1e-3, abs=factor + 1)


@pytest.mark.parametrize(
    ("shape", "num_outside"),
    [
        (StepShape(10, 1000, 500, (), 10), 0),
        (StepShape(201, 1000, 500, (), 10), 1),
        (StepShape(10, 1000, 10_001, (), 10), 1),
        (StepShape(10, 1000, 500, (), 201), 1),
        (StepShape(10, 1000, 500, ((1990, 0),), 10), 0),
        (StepShape(10, 1000, 500, ((1991, 0),), 10), 1),
        (StepShape(10, 1000, 500, ((5, 5001),), 10), 1),
        (StepShape(10, 1000, 500, ((5, 0), (5, 0), (5, 0)), 10), 1),
        (StepShape(0, 0, 0, ((100, 0),), 1), 1),  # prefill alone was not met
    ],
)
def test_what_lies_outside_the_box_counts_as_extrapolated(shape: StepShape, num_outside: int) -> None:
    assert MODEL.num_extrapolated(shape, 1) == num_outside


def test_rows_that_grow_out_of_the_box_count_from_there_on() -> None:
    assert MODEL.num_extrapolated(StepShape(2, 10_000, 9_990, (), 2), 31) == 20
    assert MODEL.num_extrapolated(StepShape(100, 999_800, 9_000, (), 100), 31) == 28


def test_the_profiles_host_time_can_be_replaced() -> None:
    shape = StepShape(3, 30, 10, (), 3)
    assert MODEL.host_ns(shape) == 20
    assert FittedModel(PROFILE, host=HostOverhead(1, 0)).host_ns(shape) == 1


def test_it_says_what_it_rests_on() -> None:
    described = MODEL.describe()
    assert (described["kind"], described["model"], described["error_overall_mape"]) == ("fitted", "tiny", 0.04)
