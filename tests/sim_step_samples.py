"""Measured steps that a roofline makes up, for tests of the fit."""

from __future__ import annotations

import random

from step_time_tools import H100

from octavo.sim.step_time.fit_profile import StepSample
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.known_models import find_model
from octavo.sim.step_time.roofline import RooflineModel

TRUTH = RooflineModel(find_model("llama-3.1-8b"), H100)


def draw_shape(rng: random.Random) -> StepShape:
    num_decodes = rng.choice([0, 1, 2, 4, 8, 16, 32, 64, 128, 256])
    lengths = [rng.randint(10, 4000) for _ in range(num_decodes)]
    num_prefills = rng.choice([0, 0, 1, 2]) if num_decodes else 1
    prefills = tuple((rng.choice([16, 64, 256, 512, 1024]), rng.choice([0, 0, 512, 2048])) for _ in range(num_prefills))
    return StepShape(num_decodes, sum(lengths), max(lengths, default=0), prefills, num_decodes + num_prefills)


def draw_samples(seed: int, num_samples: int, *, noise: float = 0.0, outliers: float = 0.0) -> list[StepSample]:
    rng = random.Random(seed)
    samples = []
    for _ in range(num_samples):
        shape = draw_shape(rng)
        factor = rng.gauss(1, noise) * (4 if rng.random() < outliers else 1)
        samples.append(StepSample(shape, max(1, int(TRUTH.step_ns(shape) * factor)), 100_000 + 900 * shape.num_decodes))
    return samples
