"""AIConfigurator's kernel tables: products, attention and all-reduce of a GPU, for any model.

Files `<gpu>_gemm_<bf16|fp8>`, `<gpu>_context_attention_bf16`, `<gpu>_generation_attention_bf16` and
`<gpu>_allreduce_bf16`; milliseconds for one call on one GPU. Source: github.com/ai-dynamo/aiconfigurator.

What they lack (norms, activation,
rotary embedding, sampler) comes from the closed form.
"""

from __future__ import annotations

from collections.abc import Mapping

from ....messages.errors import InvalidConfigError, UnsupportedModelError
from ..gpus import gpu_in
from ..model_shape import BITS
from ..roofline import RooflineModel
from .grid import Curve, Grid
from .split_attention import ClosedFormAttention, SplitAttention
from .table_files import TableFile
from .table_model import AttentionTimes, TableParts, wave_spread

_MS = 1e6
_GEMM_DTYPES = {"bfloat16": "bf16", "float16": "bf16", "fp8": "fp8"}
_LAUNCH_NS = 2_500.0  # least time of an elementwise kernel: norms and rotary embedding in LLMServingSim's tables
_SAMPLER_NS, _SAMPLER_ROW_NS = 25_000.0, 500.0  # likewise
_MAX_RATIO = 2.0  # how far heads may be from a measured number of heads


def is_aiconfigurator(tables: Mapping[str, TableFile]) -> bool:
    """Whether there are such tables."""
    return any("_gemm_" in name for name in tables)


def of_gpu(tables: Mapping[str, TableFile], gpu_name: str) -> dict[str, TableFile]:
    """The tables whose file is named after this GPU."""
    return {name: table for name, table in tables.items() if (gpu := gpu_in(name)) is not None and gpu.name == gpu_name}


class Products:
    """Time of a matrix product over tokens, for weights of any size.

    Between the table's sizes of weights it is linear in both, hence exact for what is proportional to their FLOPs or
    bytes; over tokens it keeps every step of the table's staircase.
    """

    def __init__(self, table: TableFile) -> None:
        self._points: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for m, n, k, latency_ms in table.numbers(("m", "n", "k", "latency_ms")):
            self._points.setdefault((int(n), int(k)), []).append((m, latency_ms * _MS))
        self._ns = sorted({n for n, _ in self._points})
        self._ks = sorted({k for _, k in self._points})

    def curve(self, n: int, k: int) -> Curve:
        """Over tokens, ns, for weights `[n, k]`."""
        ends_n, part_n = _bracket(self._ns, n)
        ends_k, part_k = _bracket(self._ks, k)
        total: dict[float, float] = {}
        for end_n, weight_n in zip(ends_n, (1.0 - part_n, part_n), strict=True):
            for end_k, weight_k in zip(ends_k, (1.0 - part_k, part_k), strict=True):
                if weight_n * weight_k == 0.0:
                    continue
                curve = self._nearest(end_n, end_k)
                for m in curve.xs:
                    total[m] = total.get(m, 0.0) + weight_n * weight_k * curve.at(m)
        return Curve(list(total.items()))

    def _nearest(self, n: int, k: int) -> Curve:
        """The curve of a corner; where the largest did not fit the GPU, the next smaller one in proportion."""
        if (n, k) in self._points:
            return Curve(self._points[n, k])
        smaller = max((other for other in self._ks if other < k and (n, other) in self._points), default=None)
        if smaller is None:
            smaller = min(other for other in self._ks if (n, other) in self._points)
        return Curve([(m, ns * k / smaller) for m, ns in self._points[n, smaller]])


def _bracket(sizes: list[int], size: int) -> tuple[tuple[int, int], float]:
    """Neighbours, and how far `size` lies between them; past the last it goes on along the last two."""
    if size <= sizes[0] or len(sizes) == 1:
        return (sizes[0], sizes[0]), 0.0
    i = next((i for i, other in enumerate(sizes) if other >= size), len(sizes) - 1)
    low, high = sizes[i - 1], sizes[i]
    return (low, high), (size - low) / (high - low)


def read_attention(tables: Mapping[str, TableFile], closed_form: RooflineModel) -> tuple[AttentionTimes, str]:
    """Attention of one GPU's tables, and where it is from; the closed form where the model's heads were not measured.

    Heads that were not measured take the nearest measured ratio of heads with the same KV heads and head dimension, in
    proportion for prefill, which multiplies, and as they are for decode, which reads.
    """
    model, tp = closed_form.model, closed_form.tp
    heads, kv_heads = model.num_heads // tp, model.kv_heads_per_rank(tp)
    contexts = [table for name, table in tables.items() if "_context_attention_" in name]
    generations = [table for name, table in tables.items() if "_generation_attention_" in name]
    if not contexts or not generations or model.num_sliding_layers:
        return ClosedFormAttention(closed_form), "closed form"
    names = ("num_heads", "num_key_value_heads", "head_dim", "batch_size")
    prompts: dict[int, list[tuple[float, float]]] = {}
    for num_heads, num_kv, dim, batch, length, ms in contexts[0].numbers((*names, "prompt_len", "latency_ms")):
        if num_kv == kv_heads and dim == model.head_dim and batch == 1:
            prompts.setdefault(int(num_heads), []).append((length, ms * _MS))
    decodes: dict[int, dict[tuple[int, ...], float]] = {}
    for num_heads, num_kv, dim, batch, cached, ms in generations[0].numbers((*names, "kv_cached", "latency_ms")):
        if num_kv == kv_heads and dim == model.head_dim:
            # The table counts what lies in the cache, a step's shape the new token too.
            decodes.setdefault(int(num_heads), {})[int(batch), int(cached) + 1] = ms * _MS
    measured = [number for number in prompts if number in decodes]
    nearest = min(measured, key=lambda number: max(number / heads, heads / number), default=0)
    if not nearest or max(nearest / heads, heads / nearest) > _MAX_RATIO:
        return ClosedFormAttention(closed_form), "closed form"
    ratio = heads / nearest
    attention = SplitAttention(
        Curve([(length, ns * ratio) for length, ns in prompts[nearest]]),
        Grid(decodes[nearest]),
        closed_form.kv_read_ns,
    )
    return attention, "AIConfigurator"


def read_all_reduce(tables: Mapping[str, TableFile], tp: int) -> Curve | None:
    """ns over bytes, as vLLM does it in a captured graph; None: not measured for so many GPUs."""
    for name, table in tables.items():
        if "_allreduce_" not in name:
            continue
        points = []
        backends = table.rows(("backend",))
        numbers = table.numbers(("num_gpus", "message_elems", "latency_ms"))
        for (backend,), (num_gpus, elements, ms) in zip(backends, numbers, strict=True):
            if backend == "vllm_graph" and num_gpus == tp:
                points.append((2 * elements, ms * _MS))
        if points:
            return Curve(points)
    return None


def elementwise_ns(closed_form: RooflineModel, num_tokens: int) -> float:
    """Norms, rotary embedding and activation of one layer: what they read and write, or their launches."""
    model, tp = closed_form.model, closed_form.tp
    width = BITS[model.kv_dtype] / 8 if BITS[model.kv_dtype] >= 16 else 2.0
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    moved = (
        4 * model.hidden_size,  # a norm reads hidden state and residual, writes both
        4 * model.hidden_size,
        2 * heads / tp,  # rotary embedding of q and k, in place
        3 * model.intermediate_size / tp,  # gate and up read, their product written
    )
    return sum([max(_LAUNCH_NS, closed_form.bytes_ns(num_tokens * width * size)) for size in moved])


def read_aiconfigurator(tables: Mapping[str, TableFile], closed_form: RooflineModel) -> TableParts:
    """The parts for a dense model.

    Args:
        tables: of one GPU.
        closed_form: of the model, for what the tables lack.

    Raises:
        InvalidConfigError: no products of this precision, or a malformed table.
        UnsupportedModelError: a model with experts, whose kernels are not there.
    """
    model, tp = closed_form.model, closed_form.tp
    if model.num_experts:
        raise UnsupportedModelError(f"{model.name} has experts, whose kernels AIConfigurator's cut of tables lacks")
    dtype = _GEMM_DTYPES.get(model.weight_dtype)
    gemms = [table for name, table in tables.items() if dtype is not None and f"_gemm_{dtype}" in name]
    if not gemms:
        there = sorted({name.rpartition("_gemm_")[2] for name in tables if "_gemm_" in name})
        raise InvalidConfigError(
            f"there is no table of products for {model.weight_dtype} weights on {closed_form.gpu.name}; "
            f"there: {', '.join(there) or 'none'}",
            field="dtype",
        )
    products = Products(gemms[0])
    hidden, matrices = model.hidden_size, 2 if model.gated_mlp else 1
    heads, kv_heads = model.num_heads // tp, model.kv_heads_per_rank(tp)
    layer = [
        products.curve((heads + 2 * kv_heads) * model.head_dim, hidden),
        products.curve(hidden, heads * model.head_dim),
        products.curve(matrices * model.intermediate_size // tp, hidden),
        products.curve(hidden, model.intermediate_size // tp),
    ]
    head = products.curve(model.vocab_size // tp, hidden)
    attention, attention_from = read_attention(tables, closed_form)
    all_reduce = read_all_reduce(tables, tp) if tp > 1 else None
    num_layers = model.num_layers

    def dense_ns(num_tokens: int) -> float:
        per_layer = sum([curve.at(num_tokens) for curve in layer]) + elementwise_ns(closed_form, num_tokens)
        if all_reduce is not None:
            per_layer += 2 * all_reduce.at(2 * num_tokens * hidden)
        else:
            per_layer += 2 * closed_form.all_reduce_ns(num_tokens)
        return num_layers * per_layer + 2 * _LAUNCH_NS  # embedding, last norm

    def sample_ns(num_samples: int) -> float:
        return head.at(num_samples) + _SAMPLER_NS + _SAMPLER_ROW_NS * num_samples

    return TableParts(
        num_layers=num_layers,
        dense_ns=dense_ns,
        sample_ns=sample_ns,
        max_tokens=min(curve.high for curve in layer),
        max_samples=head.high,
        attention=attention,
        length_spread=wave_spread(model.kv_heads_per_rank(tp), closed_form.gpu.num_sms),
        source={
            "kind": "tables",
            "format": "AIConfigurator",
            "attention": attention_from,
            "all_reduce": "AIConfigurator" if all_reduce is not None else "closed form" if tp > 1 else "none",
        },
    )
