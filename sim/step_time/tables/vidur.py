"""Vidur's operator profiles: `<gpu>_<model>_mlp` for a model's layers, `<node>_all_reduce` for a node.

Medians, milliseconds, one layer on one GPU. Source: github.com/microsoft/vidur (MLSys 2024). Attention, output matrix
and sampler are not in them: attention comes from AIConfigurator's tables of the same GPU where they lie beside, else
from the closed form, as do the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....messages.errors import InvalidConfigError
from ..roofline import RooflineModel
from .aiconfigurator import read_all_reduce, read_attention
from .grid import Curve
from .table_files import TableFile
from .table_model import TableParts, wave_spread

_MS = 1e6
_ONCE = "time_stats.emb.median"
_PER_LAYER = tuple(
    f"time_stats.{name}.median"
    for name in (
        "input_layernorm",
        "attn_pre_proj",
        "attn_rope",
        "attn_post_proj",
        "post_attention_layernorm",
        "mlp_up_proj",
        "mlp_act",
        "mlp_down_proj",
        "add",
    )
)
_SHAPE = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd")


def is_vidur(tables: Mapping[str, TableFile]) -> bool:
    """Whether there are such tables."""
    return any(
        name.endswith("mlp") and "num_tensor_parallel_workers" in table.columns for name, table in tables.items()
    )


def read_vidur(tables: Mapping[str, TableFile], closed_form: RooflineModel) -> TableParts:
    """The parts for a model whose layers have the sizes of a profile.

    Args:
        tables: of one GPU.
        closed_form: of the model, for what the tables lack.

    Raises:
        InvalidConfigError: no profile of such layers or of this tensor-parallel size, or a malformed table.
    """
    model, tp = closed_form.model, closed_form.tp
    wanted = (model.num_heads, model.num_kv_heads, model.hidden_size, model.intermediate_size)
    layer: list[tuple[float, float]] = []
    once: list[tuple[float, float]] = []
    there: dict[str, None] = {}
    for name, table in tables.items():
        if not name.endswith("mlp"):
            continue
        rows = table.numbers(("num_tokens", "num_tensor_parallel_workers", *_SHAPE, _ONCE, *_PER_LAYER))
        for num_tokens, workers, *rest in rows:
            shape, times = tuple(int(value) for value in rest[:4]), rest[4:]
            there[f"{name} (heads, KV heads, hidden, MLP = {shape}, TP {int(workers)})"] = None
            if shape == wanted and workers == tp:
                once.append((num_tokens, times[0] * _MS))
                layer.append((num_tokens, sum(times[1:]) * _MS))
    if not layer:
        raise InvalidConfigError(
            f"no Vidur profile on {closed_form.gpu.name} has layers like {model.name}'s (heads, KV heads, hidden, MLP "
            f"= {wanted}) at TP {tp}; there: {'; '.join(there) or 'none of this GPU'}",
            field="model",
        )
    layer_curve, once_curve = Curve(layer), Curve(once)
    all_reduce = _read_all_reduce(tables, tp) if tp > 1 else None
    attention, attention_from = read_attention(tables, closed_form)
    num_layers, efficiency = model.num_layers, closed_form.efficiency

    def dense_ns(num_tokens: int) -> float:
        per_layer = layer_curve.at(num_tokens)
        if all_reduce is not None:
            per_layer += 2 * all_reduce.at(2 * num_tokens * model.hidden_size)
        else:
            per_layer += 2 * closed_form.all_reduce_ns(num_tokens)
        return num_layers * per_layer + once_curve.at(num_tokens)

    def sample_ns(num_samples: int) -> float:
        return closed_form.head_ns(num_samples) + efficiency.step_ns + efficiency.row_ns * num_samples

    return TableParts(
        num_layers=num_layers,
        dense_ns=dense_ns,
        sample_ns=sample_ns,
        max_tokens=layer_curve.high,
        max_samples=layer_curve.high,
        attention=attention,
        length_spread=wave_spread(model.kv_heads_per_rank(tp), closed_form.gpu.num_sms),
        source={
            "kind": "tables",
            "format": "Vidur",
            "attention": attention_from,
            "all_reduce": "measured" if all_reduce is not None else "closed form" if tp > 1 else "none",
        },
    )


def _read_all_reduce(tables: Mapping[str, TableFile], tp: int) -> Curve | None:
    """ns over bytes, within one node; None: not measured for so many GPUs."""
    for name, table in tables.items():
        if not name.endswith("all_reduce"):
            continue
        names = ("num_workers", "devices_per_node", "size", "time_stats.all_reduce.median")
        points = [
            (size, ms * _MS) for workers, per_node, size, ms in table.numbers(names) if workers == tp and per_node == tp
        ]
        if points:
            return Curve(points)
    return read_all_reduce(tables, tp)
