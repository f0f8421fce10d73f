"""What-ifs are step-time models and configurations like any other."""

from __future__ import annotations

import pytest

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.sim.deployment import Deployment
from octavo.sim.plan.relax import RELAXATIONS, Relaxation, relaxed_config, relaxed_model
from octavo.sim.step_time.interface import StepShape

MIXED = StepShape(8, 8000, 1500, ((512, 0), (100, 900)), 9)
DECODES = StepShape(8, 8000, 1500, (), 8)
PREFILL = StepShape(0, 0, 0, ((512, 0),), 1)


@pytest.mark.parametrize("relaxation", RELAXATIONS)
def test_a_run_of_decodes_is_the_same_as_its_steps(relaxation: Relaxation) -> None:
    model = relaxed_model(Deployment().resolve().step_time, relaxation)
    run = model.decode_run_ns(DECODES, 20)
    assert [int(time) for time in run] == [model.step_ns(DECODES.after_decodes(i)) for i in range(20)]


def test_half_of_the_right_part_is_saved() -> None:
    model = Deployment().resolve().step_time
    prefill, decode = relaxed_model(model, "prefill compute"), relaxed_model(model, "decode bandwidth")
    assert prefill.step_ns(DECODES) == model.step_ns(DECODES)
    assert decode.step_ns(PREFILL) == model.step_ns(PREFILL)
    assert abs(2 * prefill.step_ns(PREFILL) - model.step_ns(PREFILL)) <= 1
    assert abs(2 * decode.step_ns(DECODES) - model.step_ns(DECODES)) <= 1
    saved = [model.step_ns(MIXED) - other.step_ns(MIXED) for other in (prefill, decode)]
    assert min(saved) > 0 and abs(2 * sum(saved) - model.step_ns(MIXED)) <= 2


def test_only_the_named_setting_grows() -> None:
    config = SchedulerConfig(num_blocks=100, block_size=16, max_model_len=512)
    changed = {
        relaxation: [
            name
            for name in config.__struct_fields__
            if getattr(relaxed_config(config, relaxation), name) != getattr(config, name)
        ]
        for relaxation in RELAXATIONS
    }
    assert changed == {
        "prefill compute": [],
        "decode bandwidth": [],
        "host": [],
        "KV memory": ["num_blocks"],
        "seats": ["max_num_seqs"],
        "token budget": ["max_num_batched_tokens"],
        "admission": ["max_num_queued_requests", "max_num_queued_tokens"],
    }


def test_no_host_time_is_lost_without_a_host() -> None:
    model = Deployment().resolve().step_time
    assert relaxed_model(model, "host").host_ns(MIXED) == 0
    assert relaxed_model(model, "KV memory") is model
