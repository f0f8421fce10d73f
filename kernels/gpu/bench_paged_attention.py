"""How fast paged attention is on this GPU, beside torch's own attention on caches that are not paged.

    python -m octavo.kernels.gpu.bench_paged_attention            # the shapes that serving is made of
    python -m octavo.kernels.gpu.bench_paged_attention --sweep    # other tile sizes than `choose_schedule`'s

A time is a median over replays of a CUDA graph that goes round several layers' caches, more than the L2 cache holds
(`device_time`).
Bytes are those of keys, values and their scales, each once; operations of a causal prefill are those of visible pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention_batch import AttentionBatch
from ..attention_kind import AttentionKind
from ..kv_quantization import is_quantized, row_width
from ..paged_attention import gather_kv, paged_attention_ref
from .attention_config import Schedule
from .cases import Case, OnCase, Row, rows_of, worded
from .device_time import Timed, device_time
from .kv_write import write_kv
from .paged_attention import paged_attention

_L2_BYTES = 256 << 20  # what a round of layers must read at least, several times the L2 of any GPU of today
_CHECKED_ROWS = 3  # of a batch, against the meaning in float32
_MOST_ERROR = 2e-2


@dataclasses.dataclass(frozen=True)
class Shape:
    """One batch to be timed.

    Attributes:
        name: the goal that it belongs to.
        query_lens, context_lens: of each row.
    """

    name: str
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    cache_dtype: torch.dtype = torch.bfloat16

    @property
    def is_decode(self) -> bool:
        return max(self.query_lens) == 1

    @property
    def is_uniform(self) -> bool:
        return len(set(zip(self.query_lens, self.context_lens, strict=True))) == 1

    @property
    def num_bytes(self) -> int:
        """Of keys and values that have to be read."""
        width = row_width(self.head_dim, self.cache_dtype) * self.cache_dtype.itemsize
        return 2 * sum(self.context_lens) * self.num_kv_heads * width

    @property
    def num_operations(self) -> int:
        """Two products of visible pairs of query and key, a multiplication and an addition for each element."""
        pairs = sum(
            new * context - new * (new - 1) // 2
            for new, context in zip(self.query_lens, self.context_lens, strict=True)
        )
        return 4 * pairs * self.num_heads * self.head_dim

    def describe(self) -> str:
        lens = f"{self.context_lens[0]}" if self.is_uniform else f"{min(self.context_lens)}-{max(self.context_lens)}"
        return (
            f"{len(self.query_lens)} x {max(self.query_lens)} new, context {lens}, heads {self.num_heads}/"
            f"{self.num_kv_heads} x {self.head_dim}, blocks of {self.block_size}, {str(self.cache_dtype)[6:]}"
        )


def decode(name: str, num_rows: int, context_len: int, **options: Any) -> Shape:
    return Shape(name, (1,) * num_rows, (context_len,) * num_rows, **options)


def offline_mix(name: str, **options: Any) -> Shape:
    """The 256-request offline workload in its middle: rows that still run after 512 decode steps.

    Lengths of prompts and outputs are uniform in 100-1024 with seed 0, all requests start at once. Each prompt's length
    is drawn, then its ids, and after all of them the outputs.
    """
    chance = random.Random(0)  # noqa: S311 - the workload's own definition
    prompts = [len([chance.randint(0, 10_000) for _ in range(chance.randint(100, 1024))]) for _ in range(256)]
    outputs = [chance.randint(100, 1024) for _ in range(256)]
    lens = tuple(prompt + 512 for prompt, output in zip(prompts, outputs, strict=True) if output > 512)
    return Shape(name, (1,) * len(lens), lens, **options)


def shapes() -> list[Shape]:
    """Decodes of large batches (K1), hard ones (K2), fp8 caches (K3), a prefill (K4), one on a cached prefix (K5)."""
    fp8 = torch.float8_e4m3fn
    return [
        *(decode("K1", rows, context) for rows, context in ((64, 1024), (64, 8192), (128, 4096), (256, 1024))),
        decode("K1", 256, 4096),
        decode("K2", 1, 32768),
        decode("K2", 8, 4096),
        decode("K2", 64, 1024, num_heads=16),
        offline_mix("K2", num_heads=16),
        offline_mix("K2", num_heads=16, block_size=64),
        *(decode("K3", rows, context, cache_dtype=fp8) for rows, context in ((64, 1024), (64, 8192), (256, 1024))),
        *(Shape("K4", (8192,), (8192,), block_size=block_size) for block_size in (16, 128)),
        *(Shape("K5", (2048,), (8192,), block_size=block_size) for block_size in (16, 128)),
    ]  # fmt: skip


@dataclasses.dataclass
class Layers:
    """A shape's tensors on a device: queries, one batch, and as many layers' caches as outgrow the L2."""

    shape: Shape
    q: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    batch: AttentionBatch

    @property
    def kind(self) -> AttentionKind:
        return AttentionKind(self.shape.head_dim**-0.5)


def make_layers(shape: Shape, device: torch.device, *, num_layers: int | None = None) -> Layers:
    """Random queries, keys and values, in blocks of random order."""
    torch.manual_seed(0)
    counts = [-(-context // shape.block_size) for context in shape.context_lens]
    order = torch.randperm(sum(counts), device=device).int()
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
    used = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[used : used + count]
        used += count
    query_start = torch.tensor([0, *shape.query_lens]).cumsum(0).int().to(device)
    num_tokens = sum(shape.query_lens)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter's products know no bfloat16
    cache_dtype = shape.cache_dtype if is_quantized(shape.cache_dtype) else dtype
    num_layers = num_layers or max(1, -(-_L2_BYTES // shape.num_bytes))
    caches = []
    for _ in range(num_layers):
        sides = []
        for _ in range(2):
            size = (sum(counts), shape.num_kv_heads, shape.block_size, row_width(shape.head_dim, cache_dtype))
            cache = torch.empty(size, dtype=cache_dtype, device=device)
            if is_quantized(cache_dtype):
                slots = torch.arange(sum(counts) * shape.block_size, device=device)
                x = torch.randn(slots.shape[0], shape.num_kv_heads, shape.head_dim, dtype=dtype, device=device)
                write_kv(x, x, cache, cache, slots)
            else:
                cache.normal_()
            sides.append(cache)
        caches.append((sides[0], sides[1]))
    batch = AttentionBatch(
        query_start=query_start,
        context_lens=torch.tensor(shape.context_lens, dtype=torch.int32, device=device),
        block_tables=tables,
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
        block_size=shape.block_size,
        max_query_len=max(shape.query_lens),
        max_context_len=max(shape.context_lens),
        num_decodes=len(counts) if shape.is_decode else 0,
    )
    q = torch.randn(num_tokens, shape.num_heads, shape.head_dim, dtype=dtype, device=device)
    return Layers(shape, q, caches, batch)


def relative_error(layers: Layers, out: torch.Tensor) -> float:
    """Of the first rows of `out`, against the meaning in float32, as norms."""
    last = min(_CHECKED_ROWS, layers.batch.num_rows)
    end = int(layers.batch.query_start[last])
    batch = dataclasses.replace(
        layers.batch,
        query_start=layers.batch.query_start[: last + 1],
        context_lens=layers.batch.context_lens[:last],
        block_tables=layers.batch.block_tables[:last],
    )
    exact = paged_attention_ref(layers.q[:end].float(), *layers.caches[0], batch, layers.kind)
    return float((out[:end].float() - exact).norm() / exact.norm())


def _peer_calls(layers: Layers, name: str) -> list[Callable[[], object]]:
    """Torch's attention on the same numbers, each row's tokens behind each other: less work than with block tables."""
    shape = layers.shape
    num_rows, num_new, context = len(shape.query_lens), shape.query_lens[0], shape.context_lens[0]
    q = layers.q.view(num_rows, num_new, shape.num_heads, shape.head_dim).transpose(1, 2)
    tables = layers.batch.block_tables
    dense = [
        tuple(torch.stack([gather_kv(cache, tables[row], context) for row in range(num_rows)]) for cache in caches)
        for caches in layers.caches
    ]
    if name == "sdpa":
        from torch.nn.attention.bias import causal_lower_right

        mask = None if num_new == 1 else causal_lower_right(num_new, context)
        return [
            lambda k=k, v=v: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)  # type: ignore[misc]
            for k, v in dense
        ]
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    flex = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if num_new > 1:
        before = context - num_new

        def causal(_b: torch.Tensor, _h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
            return j <= i + before

        block_mask = create_block_mask(causal, None, None, num_new, context, device=str(layers.q.device))
    return [
        lambda k=k, v=v: flex(q, k, v, block_mask=block_mask, enable_gqa=True)  # type: ignore[misc]
        for k, v in dense
    ]


def _row(shape: Shape, implementation: str, timed: Timed) -> Row:
    row: Row = {**_name_of(shape, implementation), **timed.figures}
    if timed.how:
        row["note"] = timed.how
    if shape.is_decode:
        return row | {"gbytes": shape.num_bytes / 1e9, "gbytes_per_s": shape.num_bytes / timed.us / 1e3}
    return row | {"tflop": shape.num_operations / 1e12, "tflop_per_s": shape.num_operations / timed.us / 1e6}


def _name_of(shape: Shape, implementation: str) -> Row:
    return {"name": shape.name, "shape": shape.describe(), "implementation": implementation}


def _failed(shape: Shape, implementation: str, failure: Exception) -> Row:
    return {**_name_of(shape, implementation), "failed": worded(failure)}


def our_calls(layers: Layers) -> list[Callable[[], object]]:
    """Both variants that are timed."""
    return [*_calls(layers), *_calls(layers, batch_invariant=True)]


def _calls(layers: Layers, **options: Any) -> list[Callable[[], object]]:
    return [
        lambda k=k, v=v: paged_attention(layers.q, k, v, layers.batch, layers.kind, **options)  # type: ignore[misc]
        for k, v in layers.caches
    ]


def rows(
    device: torch.device,
    *,
    peers: Sequence[str] = ("sdpa", "flex"),
    first_case: int = 0,
    on_case: OnCase = lambda _number, _of, _what: None,
) -> Iterator[Row]:
    """Time every shape on a CUDA device, ours and the peers'.

    Yields:
        For each shape and implementation: `name` (K1 ... K5), `shape`, `implementation`, `us`; for decodes `gbytes`
        (counted, 10^9) and `gbytes_per_s`, for prefills `tflop` and `tflop_per_s`; for ours `error`, relative to
        float32. A peer that cannot run has `failed`, its reason, instead of times.
    """
    cases = [
        Case(_name_of(shape, "octavo"), lambda shape=shape: _shape_rows(shape, device, peers))  # type: ignore[misc]
        for shape in shapes()
    ]
    return rows_of(cases, device, first=first_case, on_case=on_case)


def _shape_rows(shape: Shape, device: torch.device, peers: Sequence[str]) -> Iterator[Row]:
    layers = make_layers(shape, device)
    error = relative_error(layers, paged_attention(layers.q, *layers.caches[0], layers.batch, layers.kind))
    if error < _MOST_ERROR:
        yield _row(shape, "octavo", device_time(*_calls(layers))) | {"error": error}
        yield _row(shape, "octavo, batch-invariant", device_time(*_calls(layers, batch_invariant=True)))
    else:  # NaN is wrong too
        yield {**_name_of(shape, "octavo"), "failed": f"WRONG: off by {error:.1e} of the norm"}
    for peer in peers if shape.is_uniform and not is_quantized(shape.cache_dtype) else ():
        try:
            yield _row(shape, peer, device_time(*_peer_calls(layers, peer)))
        except Exception as failure:  # noqa: BLE001,RUF100 - whatever keeps a peer from running is no failure of ours
            yield _failed(shape, peer, failure)


def sweep_rows(device: torch.device) -> list[Row]:
    """Time other schedules than the chosen ones, for a decode, a ragged one, an fp8 one and a prefill."""
    by_share = [
        Schedule(True, 16, block_n, num_warps, num_stages, programs_per_processor=programs)
        for block_n, num_warps, num_stages, programs in (
            (64, 4, 4, 2), (64, 4, 3, 2), (64, 4, 3, 3), (32, 4, 4, 2),
            (32, 4, 4, 4), (32, 2, 4, 4), (128, 4, 3, 1), (128, 8, 3, 1),
        )
    ]  # fmt: skip
    by_tile = [
        Schedule(False, block_m, block_n, num_warps, num_stages)
        for block_m, block_n, num_warps, num_stages in (
            (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 64, 4, 3),
            (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 8, 4),
        )
    ]  # fmt: skip
    fp8 = torch.float8_e4m3fn
    table = []
    for shape, schedules in (
        (decode("sweep", 128, 4096), by_share),
        (offline_mix("sweep", num_heads=16), by_share),
        (decode("sweep", 128, 4096, cache_dtype=fp8), by_share),
        (Shape("sweep", (8192,), (8192,)), by_tile),
        (Shape("sweep", (8192,), (8192,), block_size=128), by_tile),
    ):
        layers = make_layers(shape, device)
        for schedule in schedules:
            label = " ".join(f"{field}={value}" for field, value in dataclasses.asdict(schedule).items())
            try:
                table.append(_row(shape, label, device_time(*_calls(layers, schedule=schedule))))
            except Exception as failure:  # a schedule that does not fit is a result, too
                table.append(_failed(shape, label, failure))
        del layers
        torch.cuda.empty_cache()
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="time other tile sizes than the chosen ones")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this times a CUDA device, and there is none")
    device = torch.device("cuda")
    for row in sweep_rows(device) if arguments.sweep else rows(device):
        rate = (
            f"{row['gbytes_per_s']:8.0f} GB/s" if "gbytes_per_s" in row else f"{row.get('tflop_per_s', 0):8.0f} TFLOP/s"
        )
        timed = f"{row.get('us', 0.0):9.1f} us {rate} {row.get('error', '')}"
        rest = row.get("failed") or (timed if "us" in row else row["note"])
        print(f"{row['name']:6} {row['shape']:70} {row['implementation']:28} {rest}")


if __name__ == "__main__":
    main()
