"""Attention as prefill and decode kernels that run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from ..roofline import RooflineModel
from .grid import Curve, Grid

_FAR = 1 << 20


class ClosedFormAttention:
    """`AttentionTimes` of the closed form, for tables that lack attention."""

    def __init__(self, closed_form: RooflineModel) -> None:
        self._closed_form = closed_form
        self._num_layers = closed_form.model.num_layers
        self._floor_ns = closed_form.efficiency.layer_ns

    def decode_curve(self, num_decodes: int) -> Curve:
        """See `AttentionTimes`."""
        at = self._closed_form.decode_attention_ns
        window = self._closed_form.model.sliding_window
        lengths = [0, window, _FAR] if 0 < window < _FAR else [0, _FAR]
        return Curve(
            [(kv, self._floor_ns + at(num_decodes, num_decodes * kv) / self._num_layers) for kv in lengths],
        )

    def mixed_ns(self, num_decodes: int, decode_kv: float, prefills: Sequence[tuple[int, int]]) -> float:
        """See `AttentionTimes`."""
        closed = self._closed_form
        total = sum([closed.prefill_attention_ns(new, history) for new, history in prefills])
        if num_decodes:
            total += closed.decode_attention_ns(num_decodes, round(num_decodes * decode_kv))
        return self._floor_ns + total / self._num_layers

    def outside(self, num_decodes: int, longest_kv: int, prefills: Sequence[tuple[int, int]]) -> bool:
        """See `AttentionTimes`; a closed form has no range."""
        return False


class SplitAttention:
    """`AttentionTimes` of a table of whole prompts and one of decodes.

    A chunk with history counts as `prompt(history + chunk) - prompt(history)`, but not as less than the time to read
    its KV.

    Args:
        prompts: ns of one layer over the length of one prompt, nothing cached before it.
        decodes: ns of one layer over (rows, KV length, the last token included).
        kv_read_ns: of one token's KV, one layer.
    """

    def __init__(self, prompts: Curve, decodes: Grid, kv_read_ns: float) -> None:
        self._prompts = prompts
        self._decodes = decodes
        self._kv_read_ns = kv_read_ns

    def decode_curve(self, num_decodes: int) -> Curve:
        """See `AttentionTimes`."""
        return self._decodes.curve((num_decodes, 0), 1)

    def mixed_ns(self, num_decodes: int, decode_kv: float, prefills: Sequence[tuple[int, int]]) -> float:
        """See `AttentionTimes`."""
        launch = self._prompts.at(1)
        total = launch
        for new, history in prefills:
            length = history + new
            if history:
                grown = self._prompts.at(length) - self._prompts.at(history)
                total += max(grown, self._kv_read_ns * length)
            else:
                total += self._prompts.at(length) - launch
        if num_decodes:
            total += self._decodes.at((num_decodes, decode_kv))
        return total

    def outside(self, num_decodes: int, longest_kv: int, prefills: Sequence[tuple[int, int]]) -> bool:
        """See `AttentionTimes`."""
        if num_decodes and self._decodes.outside((num_decodes, longest_kv)):
            return True
        return any(new + history > self._prompts.high for new, history in prefills)
