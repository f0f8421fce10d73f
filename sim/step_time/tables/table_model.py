"""A step's time put together from measured parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from ..host_overhead import HostOverhead
from ..interface import StepShape
from .grid import Curve

_SPREAD = 0.3
_BLOCKS_PER_SM = 2  # of 128 query rows and KV in shared memory, two fit
_NUM_WORTH_AN_ARRAY = 24  # below it a loop is faster than numpy


class AttentionTimes(Protocol):
    """Attention of one layer, in ns."""

    def decode_curve(self, num_decodes: int) -> Curve:
        """Over the rows' KV length, as if all rows had it; the last row of the table included."""
        ...

    def mixed_ns(self, num_decodes: int, decode_kv: float, prefills: Sequence[tuple[int, int]]) -> float:
        """A batch with prefill chunks.

        Args:
            decode_kv: KV length that stands for those of the decodes.
            prefills: `(num_new, num_history)`, at least one.
        """
        ...

    def outside(self, num_decodes: int, longest_kv: int, prefills: Sequence[tuple[int, int]]) -> bool:
        """Whether the batch lies beyond what was measured."""
        ...


class TableParts(msgspec.Struct, frozen=True, kw_only=True):
    """What a table model is put together from.

    Attributes:
        num_layers: layers whose attention is alike.
        dense_ns: everything that depends on the number of tokens: all layers' products and norms, embedding,
            all-reduces; ns.
        sample_ns: what depends on the rows that are sampled from: output matrix, sampler; ns.
        max_tokens, max_samples: up to which those two were measured.
        attention: one layer's.
        length_spread: of the number of decodes: a batch of unequal lengths costs as one whose rows all have
            mean + length_spread * (longest - mean), 0 to 1.
        source: for reports.
    """

    num_layers: int
    dense_ns: Callable[[int], float]
    sample_ns: Callable[[int], float]
    max_tokens: float
    max_samples: float
    attention: AttentionTimes
    length_spread: Callable[[int], float]
    source: dict[str, str | int | float]


def wave_spread(num_kv_heads: int, num_sms: int) -> Callable[[int], float]:
    """How a batch of unequal KV lengths lies between its mean and its longest, on a GPU.

    Decode attention gives each row and KV head to one block of work. While all blocks run at once, the longest decides
    in part (those that end early leave it their share of the bandwidth); with several waves the others fill the gaps.

    The two numbers describe the draining phase of the RTX PRO 6000 run in LLMServingSim's repository: the excess over
    equal lengths is there about 0.3 of the way to the longest up to one wave, and falls to 0.02 at three. They were
    read off that run by hand, once; `octavo sim validate` on the same run is not blind to them.
    """
    slots = _BLOCKS_PER_SM * num_sms

    def spread(num_decodes: int) -> float:
        waves = num_decodes * num_kv_heads / slots
        return _SPREAD if waves <= 1.0 else _SPREAD / (waves * waves * waves)

    return spread


class TableModel:
    """A `StepTimeModel` over `TableParts`."""

    def __init__(self, parts: TableParts, host: HostOverhead | None = None) -> None:
        self.parts = parts
        self.host = host if host is not None else HostOverhead()
        self._base: dict[tuple[int, int], float] = {}
        self._curves: dict[int, Curve] = {}

    def _base_ns(self, num_tokens: int, num_samples: int) -> float:
        key = (num_tokens, num_samples)
        base = self._base.get(key)
        if base is None:
            base = self.parts.dense_ns(num_tokens)
            if num_samples:
                base += self.parts.sample_ns(num_samples)
            self._base[key] = base
        return base

    def _curve(self, num_decodes: int) -> Curve:
        curve = self._curves.get(num_decodes)
        if curve is None:
            curve = self._curves[num_decodes] = self.parts.attention.decode_curve(num_decodes)
        return curve

    def step_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        parts, num_decodes = self.parts, shape.num_decodes
        # The order of these operations is that of `decode_run_ns`, so that both round alike.
        standing_kv = 0.0
        if num_decodes:
            mean = shape.decode_kv_tokens / num_decodes
            standing_kv = mean + parts.length_spread(num_decodes) * (shape.max_decode_kv - mean)
        if shape.prefills:
            attention = parts.attention.mixed_ns(num_decodes, standing_kv, shape.prefills)
        elif num_decodes:
            attention = self._curve(num_decodes).at(standing_kv)
        else:
            attention = 0.0
        total = self._base_ns(shape.num_tokens, shape.num_samples) + parts.num_layers * attention
        return max(1, int(total + 0.5))

    def decode_run_ns(self, shape: StepShape, num_steps: int) -> Sequence[int]:
        """See `StepTimeModel`."""
        num_decodes = shape.num_decodes
        if num_steps < _NUM_WORTH_AN_ARRAY or not num_decodes:
            return [self.step_ns(shape.after_decodes(i)) for i in range(num_steps)]
        parts = self.parts
        steps = np.arange(num_steps, dtype=np.int64)
        mean = (shape.decode_kv_tokens + steps * num_decodes) / num_decodes
        standing_kv = mean + parts.length_spread(num_decodes) * ((shape.max_decode_kv + steps) - mean)
        attention = self._curve(num_decodes).at_many(standing_kv)
        total = self._base_ns(num_decodes, shape.num_samples) + parts.num_layers * attention
        result: list[int] = np.maximum(1, (total + 0.5).astype(np.int64)).tolist()
        return result

    def host_ns(self, shape: StepShape) -> int:
        """See `StepTimeModel`."""
        return self.host.host_ns(shape)

    def num_extrapolated(self, shape: StepShape, num_steps: int) -> int:
        """See `StepTimeModel`."""
        parts = self.parts
        if shape.num_tokens > parts.max_tokens or shape.num_samples > parts.max_samples:
            return num_steps
        outside = parts.attention.outside
        if outside(shape.num_decodes, shape.max_decode_kv, shape.prefills):
            return num_steps
        longest = shape.max_decode_kv + num_steps - 1
        if num_steps <= 1 or not outside(shape.num_decodes, longest, ()):
            return 0
        # The rows grow out of the table on the way: the first step outside, by halving.
        low, high = 0, num_steps - 1  # step `low` is inside, `high` outside
        while high - low > 1:
            middle = (low + high) // 2
            if outside(shape.num_decodes, shape.max_decode_kv + middle, ()):
                high = middle
            else:
                low = middle
        return num_steps - high

    def describe(self) -> dict[str, str | int | float]:
        """See `StepTimeModel`."""
        return {
            **self.parts.source,
            "host_step_ns": self.host.step_ns,
            "host_row_ns": self.host.row_ns,
        }
