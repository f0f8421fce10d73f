"""The real engine as the simulator's teacher: steps are seen as they were, and a profile of them can be used."""

import asyncio
import math
import random

import pytest
from engines import engine_on, save_servable

from octavo import SamplingParams
from octavo.gateway.config import make_config
from octavo.gateway.simulate.live import Figures, calibrate, compare_live
from octavo.gateway.simulate.step_tap import StepTap
from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.fitted import FittedModel
from octavo.sim.step_time.interface import StepShape
from octavo.sim.workload.spec import make_workload


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder)
    return folder


def config(folder, **fields):
    return make_config(
        {"model": str(folder), "dtype": "float32", "num_blocks": 256, "block_size": 4, "max_model_len": 128}
        | {"num_threads": 1, "max_num_seqs": 8, **fields}
    )


def test_the_tap_sees_every_token_that_was_computed_and_sampled(folder) -> None:
    asyncio.run(_the_tap_sees_every_token_that_was_computed_and_sampled(folder))


async def _the_tap_sees_every_token_that_was_computed_and_sampled(folder) -> None:
    tap = StepTap()
    engine = engine_on(folder, tap=tap, enable_prefix_caching=False)
    chance = random.Random(3)
    prompts = [[chance.randrange(256) for _ in range(length)] for length in (3, 17, 40, 9)]
    async with engine:
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        await asyncio.gather(*(engine.generate(prompt, params) for prompt in prompts))
    shapes = [sample.shape for sample in tap.samples]
    assert sum(new for shape in shapes for new, _ in shape.prefills) == sum(map(len, prompts))
    assert sum(shape.num_samples for shape in shapes) == 12 * len(prompts)
    assert sum(shape.num_decodes for shape in shapes) == 11 * len(prompts)
    # Each decode of a request reads one token more than the one before.
    contexts = [length + i for length in map(len, prompts) for i in range(1, 12)]
    assert sum(shape.decode_kv_tokens for shape in shapes) == sum(contexts)
    assert max(shape.max_decode_kv for shape in shapes) <= max(contexts)
    assert all(sample.duration_ns > 0 for sample in tap.samples)
    assert len(tap.ingress_ns) == len(prompts)


def test_a_profile_of_the_real_engine_times_steps_of_any_shape(folder) -> None:
    asyncio.run(_a_profile_of_the_real_engine_times_steps_of_any_shape(folder))


async def _a_profile_of_the_real_engine_times_steps_of_any_shape(folder) -> None:
    shares: list[float] = []
    profile = await calibrate(config(folder), 3, lambda share, text: shares.append(share))
    assert shares
    assert profile.num_samples > 50
    assert {"decode", "overall"} <= set(profile.errors)
    assert profile.meta["num_blocks"] == 256
    model = FittedModel(profile)
    small, large = (model.step_ns(StepShape(n, 20 * n, 20, (), n)) for n in (1, 8))
    assert 0 < small <= large
    assert model.step_ns(StepShape(0, 0, 0, ((100, 0),), 1)) > 0


def test_simulated_figures_stand_beside_those_of_real_runs(folder) -> None:
    asyncio.run(_simulated_figures_stand_beside_those_of_real_runs(folder))


async def _simulated_figures_stand_beside_those_of_real_runs(folder) -> None:
    profile = await calibrate(config(folder), 2)
    workload = make_workload("synthetic:poisson,rate=50,n=20,prompt=uniform:5:40,output=uniform:2:20,seed=4")
    comparison = await compare_live(config(folder), profile, workload, load=0.3, repeats=2)
    assert len(comparison.real) == 2
    assert set(comparison.errors) == set(comparison.spread) == set(Figures.__struct_fields__)
    for figures in (comparison.simulated, *comparison.real):
        assert 0 < figures.ttft_p50 <= figures.ttft_p90 <= figures.ttft_p99
        assert figures.ttft_p50 < figures.e2e_p50
        assert figures.output_token_rate > 0
    assert all(math.isfinite(error) for error in comparison.errors.values())
    assert 0 < comparison.busy_share < 0.6


def test_a_workload_that_does_not_fit_the_engine_is_refused_with_the_request_and_the_context(folder) -> None:
    asyncio.run(_a_workload_that_does_not_fit_the_engine_is_refused_with_the_request_and_the_context(folder))


async def _a_workload_that_does_not_fit_the_engine_is_refused_with_the_request_and_the_context(folder) -> None:
    profile = await calibrate(config(folder), 1)
    workload = make_workload("synthetic:poisson,rate=50,n=3,prompt=200,output=20")
    with pytest.raises(InvalidConfigError, match=r"request 1 .* 200 \+ 20 tokens, but the engine's context is 128"):
        await compare_live(config(folder), profile, workload, repeats=1)
