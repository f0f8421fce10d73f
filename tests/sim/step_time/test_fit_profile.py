import random

import pytest
from sim_step_samples import TRUTH, draw_samples, draw_shape

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.fit_profile import StepSample, fit
from octavo.sim.step_time.fitted import FittedModel
from octavo.sim.step_time.interface import StepShape


def mean_error(samples: list[StepSample]) -> float:
    model = FittedModel(fit(samples, {}))
    rng = random.Random("other shapes")
    shapes = [draw_shape(rng) for _ in range(200)]
    return sum(abs(model.step_ns(shape) / TRUTH.step_ns(shape) - 1) for shape in shapes) / len(shapes)


def test_a_roofline_is_recovered_from_its_samples() -> None:
    assert mean_error(draw_samples(1, 400)) < 0.01


def test_noise_and_outliers_hardly_move_the_fit() -> None:
    assert mean_error(draw_samples(2, 800, noise=0.05, outliers=0.03)) < 0.02


def test_a_floor_is_found_where_the_weights_bind() -> None:
    rng = random.Random(3)
    samples = [
        StepSample(StepShape(0, 0, 0, ((num_new, 0),), 1), max(8_000_000, 50_000 * num_new))
        for num_new in [rng.randint(1, 1000) for _ in range(300)]
    ]
    profile = fit(samples, {})
    assert any(128 <= knot <= 192 for knot in profile.knots)  # the floor ends at 160 tokens
    model = FittedModel(profile)
    for num_new in (1, 50, 100, 300, 900):
        shape = StepShape(0, 0, 0, ((num_new, 0),), 1)
        assert model.step_ns(shape) == pytest.approx(max(8_000_000, 50_000 * num_new), rel=0.06)


def test_the_error_it_states_is_that_of_samples_held_out() -> None:
    profile = fit(draw_samples(4, 600, noise=0.05), {})
    overall = profile.errors["overall"]
    assert overall.num_samples == 120
    assert sum(profile.errors[name].num_samples for name in ("decode", "prefill", "mixed")) == 120
    assert 0.03 < overall.mape < 0.06  # of a normal error of 5 %: 4 %
    assert abs(overall.bias) < 0.02
    assert list(overall.quantiles) == sorted(overall.quantiles)


def test_the_same_samples_and_seed_give_the_same_profile() -> None:
    samples = draw_samples(5, 200, noise=0.05)
    assert fit(samples, {"a": 1}) == fit(samples, {"a": 1})
    assert fit(samples, {}, seed=1).errors != fit(samples, {}, seed=2).errors


def test_host_time_is_fitted_where_it_was_measured() -> None:
    samples = draw_samples(6, 200)
    host = fit(samples, {}).host
    assert (host.step_ns, host.row_ns) == (pytest.approx(100_000, rel=0.05), pytest.approx(900, rel=0.05))
    unmeasured = [StepSample(sample.shape, sample.duration_ns) for sample in samples]
    assert fit(unmeasured, {}).host.step_ns == 0


def test_coverage_is_the_box_of_the_samples() -> None:
    samples = draw_samples(7, 200)
    coverage = fit(samples, {}).coverage
    shapes = [sample.shape for sample in samples]
    assert coverage.regimes == ("decode", "prefill", "mixed")
    assert coverage.max_decode_kv == max(shape.max_decode_kv for shape in shapes)
    assert (coverage.max_chunk, coverage.max_history, coverage.max_decodes) == (1024, 2048, 256)
    assert all(coverage.holds(shape) for shape in shapes)


def test_too_few_or_impossible_samples_are_refused() -> None:
    samples = draw_samples(8, 30)
    with pytest.raises(InvalidConfigError, match="19 measured steps are too few"):
        fit(samples[:19], {})
    with pytest.raises(InvalidConfigError, match="took no time"):
        fit([*samples, StepSample(samples[0].shape, 0)], {})
    with pytest.raises(InvalidConfigError, match="has no tokens"):
        fit([*samples, StepSample(StepShape(0, 0, 0, (), 0), 5)], {})
