"""LLMServingSim's operator profile of one model on one GPU: `dense.csv`, `per_sequence.csv`, `attention.csv`.

Times in microseconds, one layer. Source: github.com/casys-kaist/LLMServingSim (ISPASS 2026), its profiler's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ....messages.errors import InvalidConfigError
from ..roofline import RooflineModel
from .grid import Curve, Grid
from .table_files import TableFile
from .table_model import TableParts, wave_spread

_US = 1000.0
_PER_STEP = ("embedding", "final_layernorm")
_PER_LAYER = ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
_TWICE_PER_LAYER = ("layernorm",)
_PER_SEQUENCE = ("lm_head", "sampler")


def is_llmservingsim(tables: Mapping[str, TableFile]) -> bool:
    """Whether these are such tables."""
    return "dense" in tables and "attention" in tables and "prefill_chunk" in tables["attention"].columns


class MixedAttention:
    """`AttentionTimes` over a table of mixed batches: one prefill chunk beside decodes of equal length."""

    def __init__(self, table: TableFile) -> None:
        names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
        decodes: dict[tuple[int, ...], float] = {}
        prefills: dict[tuple[int, ...], float] = {}
        mixed: dict[tuple[int, ...], float] = {}
        for chunk, history, num_decodes, kv, time_us in table.numbers(names):
            time_ns = time_us * _US
            if chunk == 0:
                decodes[int(num_decodes), int(kv)] = time_ns
            elif num_decodes == 0:
                prefills[int(chunk), int(history)] = time_ns
            else:
                mixed[int(chunk), int(history), int(num_decodes), int(kv)] = time_ns
        if not decodes or not prefills:
            raise InvalidConfigError(f"{table.path}: needs rows of decodes alone and of prefill alone", field="profile")
        self._decodes = Grid(decodes)
        self._prefills = Grid(prefills)
        self._mixed = Grid(mixed) if mixed else None

    def decode_curve(self, num_decodes: int) -> Curve:
        """See `AttentionTimes`."""
        return self._decodes.curve((num_decodes, 0), 1)

    def mixed_ns(self, num_decodes: int, decode_kv: float, prefills: Sequence[tuple[int, int]]) -> float:
        """See `AttentionTimes`.

        Several chunks count as one with as many new tokens and as many pairs of query and key.
        """
        num_new = sum([new for new, _ in prefills])
        if len(prefills) == 1:
            history: float = prefills[0][1]
        else:
            pairs = sum([new * past + new * new / 2 for new, past in prefills])
            history = max(0.0, (pairs - num_new * num_new / 2) / num_new)
        if not num_decodes:
            return self._prefills.at((num_new, history))
        if self._mixed is None:
            return self._prefills.at((num_new, history)) + self._decodes.at((num_decodes, decode_kv))
        return self._mixed.at((num_new, history, num_decodes, decode_kv))

    def outside(self, num_decodes: int, longest_kv: int, prefills: Sequence[tuple[int, int]]) -> bool:
        """See `AttentionTimes`."""
        if not prefills:
            return self._decodes.outside((num_decodes, longest_kv))
        num_new = sum([new for new, _ in prefills])
        history = max([past for _, past in prefills])
        if not num_decodes or self._mixed is None:
            return self._prefills.outside((num_new, history)) or self._decodes.outside((num_decodes, longest_kv))
        return self._mixed.outside((num_new, history, num_decodes, longest_kv))


def _curves(table: TableFile, column: str) -> dict[str, Curve]:
    """Layer -> its time over `column`, in ns."""
    points: dict[str, list[tuple[float, float]]] = {}
    names = table.rows(("layer",))
    for (layer,), (x, time_us) in zip(names, table.numbers((column, "time_us")), strict=True):
        points.setdefault(layer, []).append((x, time_us * _US))
    return {layer: Curve(rows) for layer, rows in points.items()}


def _known(curves: Mapping[str, Curve], layers: Sequence[str], table: TableFile) -> list[Curve]:
    missing = [layer for layer in layers if layer not in curves]
    if missing:
        raise InvalidConfigError(f"{table.path}: layer {', '.join(missing)} is missing", field="profile")
    return [curves[layer] for layer in layers]


def read_llmservingsim(tables: Mapping[str, TableFile], closed_form: RooflineModel) -> TableParts:
    """The parts of a model that was profiled; the tables do not say which, so the caller has to know.

    Args:
        closed_form: of the model; its number of layers, and its all-reduce, which the tables lack.

    Raises:
        InvalidConfigError: a table, column or layer is missing or malformed.
    """
    if "per_sequence" not in tables:
        raise InvalidConfigError(
            f"{tables['dense'].path.parent}: per_sequence.csv is missing beside dense.csv and attention.csv",
            field="profile",
        )
    dense = tables["dense"]
    curves = _curves(dense, "tokens")
    once = _known(curves, _PER_STEP, dense)
    layer = _known(curves, _PER_LAYER, dense)
    twice = _known(curves, _TWICE_PER_LAYER, dense)
    samples = _known(_curves(tables["per_sequence"], "sequences"), _PER_SEQUENCE, tables["per_sequence"])

    model = closed_form.model
    num_layers = model.num_layers

    def dense_ns(num_tokens: int) -> float:
        per_layer = sum([curve.at(num_tokens) for curve in layer]) + 2 * sum([curve.at(num_tokens) for curve in twice])
        per_layer += 2 * closed_form.all_reduce_ns(num_tokens)
        return sum([curve.at(num_tokens) for curve in once]) + num_layers * per_layer

    def sample_ns(num_samples: int) -> float:
        return sum([curve.at(num_samples) for curve in samples])

    return TableParts(
        num_layers=num_layers,
        dense_ns=dense_ns,
        sample_ns=sample_ns,
        max_tokens=min(curve.high for curve in [*once, *layer, *twice]),
        max_samples=min(curve.high for curve in samples),
        attention=MixedAttention(tables["attention"]),
        length_spread=wave_spread(model.kv_heads_per_rank(closed_form.tp), closed_form.gpu.num_sms),
        source={"kind": "tables", "format": "LLMServingSim", "folder": dense.path.parent.name},
    )
