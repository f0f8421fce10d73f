"""What-ifs: a replica with more of one thing, to learn which one binds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from ...actors.scheduler.config import SchedulerConfig
from ..step_time.interface import StepShape, StepTimeModel

Relaxation = Literal["prefill compute", "decode bandwidth", "KV memory", "seats", "token budget", "host", "admission"]

RELAXATIONS: dict[Relaxation, str] = {
    "prefill compute": "prompts computed twice as fast",
    "decode bandwidth": "decode steps twice as fast",
    "KV memory": "twice the KV blocks",
    "seats": "twice --max-num-seqs",
    "token budget": "twice --max-num-batched-tokens",
    "host": "no time lost between steps",
    "admission": "a queue without bounds",
}

_BOUNDLESS = 1 << 60


def relaxed_config(config: SchedulerConfig, relaxation: Relaxation) -> SchedulerConfig:
    """The configuration with more of one thing; itself, if the thing is the model's."""
    match relaxation:
        case "KV memory":
            return msgspec.structs.replace(config, num_blocks=2 * config.num_blocks)
        case "seats":
            return msgspec.structs.replace(config, max_num_seqs=2 * config.max_num_seqs)
        case "token budget":
            return msgspec.structs.replace(config, max_num_batched_tokens=2 * config.max_num_batched_tokens)
        case "admission":
            return msgspec.structs.replace(config, max_num_queued_requests=_BOUNDLESS, max_num_queued_tokens=_BOUNDLESS)
        case "prefill compute" | "decode bandwidth" | "host":
            return config


def relaxed_model(model: StepTimeModel, relaxation: Relaxation) -> StepTimeModel:
    """The model with one thing quicker; itself, if the thing is the configuration's."""
    return Quicker(model, relaxation) if relaxation in ("prefill compute", "decode bandwidth", "host") else model


class Quicker:
    """A step-time model of which one part takes half as long, or none for the host.

    A step's decode part is what its decoding rows would take alone, its prefill part the rest.
    """

    def __init__(self, model: StepTimeModel, what: Relaxation) -> None:
        self._model = model
        self._what = what

    def step_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        whole = self._model.step_ns(shape)
        if self._what == "host":
            return whole
        decode = self._decode_part(shape, whole)
        saved = decode if self._what == "decode bandwidth" else whole - decode
        return max(1, whole - saved // 2)

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        """See `StepTimeModel`."""
        times = self._model.decode_run_ns(shape, num_steps)
        if self._what != "decode bandwidth":
            return times
        return [max(1, int(time) - int(time) // 2) for time in times]

    def host_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        return 0 if self._what == "host" else self._model.host_ns(shape)

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        """See `StepTimeModel`."""
        return self._model.num_extrapolated(shape, num_steps)

    def describe(self) -> dict[str, str | int | float]:
        """See `StepTimeModel`."""
        return {**self._model.describe(), "relaxed": self._what}

    def _decode_part(self, shape: StepShape, whole: int) -> int:
        if not shape.prefills:
            return whole
        if not shape.num_decodes:
            return 0
        alone = StepShape(shape.num_decodes, shape.decode_kv_tokens, shape.max_decode_kv, (), shape.num_decodes)
        return min(whole, self._model.step_ns(alone))
