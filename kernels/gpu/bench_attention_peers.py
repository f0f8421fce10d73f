"""Attention at the same shapes by our kernel and by others': one at a time, each in a process of its own.

Decode reads a paged cache where a peer can; torch's own functions cannot, and get each sequence's keys and values
behind each other, which is easier. What is timed is the device alone (`device_time`): a step's launches lie in a graph.
Where one cache is not several times the L2, several take turns. What is wrong has no time, and where a peer's call
cannot be captured, its row says so. `octavo bench gpu` starts one process for each of `PEERS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..attention_batch import AttentionBatch
from ..attention_kind import AttentionKind
from .cases import Case, OnCase, Row, rows_of, worded
from .device_time import device_time

PEERS = ("octavo", "torch_attention", "cudnn", "flex_attention", "flashinfer", "fa3")
FA3_LIBRARY = "OCTAVO_FA3_LIBRARY"
"""Path of FlashAttention-3's library as vLLM's wheel has it (`_vllm_fa3_C.abi3.so`)."""

_PAGE = 16
_WORKSPACE = 512 * 1024**2
_BEYOND_L2 = 256 * 1024**2  # bytes that take turns: several times an H200's 60 MB
_MOST_ERROR = 2e-2
_CHECKED_ROWS, _CHECKED_QUERIES = 4, 256  # the first rows, the last queries of each: float64 takes room

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of equal lengths: `num_new` queries each, behind `num_cached` tokens; causal."""

    rows: int
    num_new: int
    num_cached: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @property
    def context(self) -> int:
        return self.num_new + self.num_cached

    @property
    def name(self) -> str:
        kind = "decode" if self.num_new == 1 else "prefill"
        return f"{kind} attention"

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads} x {self.head_dim}"
        if self.num_new == 1:
            return f"B={self.rows} ctx={self.context} {heads}"
        return f"{self.rows} x {self.num_new} behind {self.num_cached}, {heads}"

    @property
    def num_bytes(self) -> int:
        """Of bfloat16 keys and values read, queries read and outputs written."""
        kv = 2 * self.rows * self.context * self.num_kv_heads * self.head_dim
        return 2 * (kv + 2 * self.rows * self.num_new * self.num_heads * self.head_dim)

    @property
    def turns(self) -> int:
        """Caches that are read in turn."""
        kv_bytes = 4 * self.rows * self.context * self.num_kv_heads * self.head_dim
        return max(1, -(-_BEYOND_L2 // kv_bytes)) if self.num_new == 1 else 1

    @property
    def flops(self) -> int:
        pairs = self.num_new * self.num_cached + self.num_new * (self.num_new + 1) // 2
        return 4 * self.rows * self.num_heads * self.head_dim * pairs


SHAPES = (
    Shape(64, 1, 1023, 32, 8),
    Shape(64, 1, 4095, 32, 8),
    Shape(256, 1, 1023, 32, 8),
    Shape(256, 1, 8191, 32, 8),
    Shape(256, 1, 1023, 16, 8),
    Shape(8, 1, 4095, 32, 8),
    Shape(1, 1, 32767, 32, 8),
    Shape(1, 8192, 0, 32, 8),
    Shape(8, 1024, 0, 32, 8),
    Shape(1, 2048, 6144, 32, 8),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A paged cache whose pages lie in random order.

    Attributes:
        q: `[rows * num_new, num_heads, head_dim]`.
        k, v: `[num_blocks, num_kv_heads, page, head_dim]`.
        table: `[rows, blocks of a row]` int32.
    """

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Inputs:
    """Random ones."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator)

    blocks_each = -(-shape.context // _PAGE)
    num_blocks = shape.rows * blocks_each
    order = torch.randperm(num_blocks, device=device, generator=generator)
    return Inputs(
        shape=shape,
        q=randn(shape.rows * shape.num_new, shape.num_heads, shape.head_dim),
        k=randn(num_blocks, shape.num_kv_heads, _PAGE, shape.head_dim),
        v=randn(num_blocks, shape.num_kv_heads, _PAGE, shape.head_dim),
        table=order.view(shape.rows, blocks_each).to(torch.int32),
        query_start=torch.arange(shape.rows + 1, dtype=torch.int32, device=device) * shape.num_new,
        context_lens=torch.full((shape.rows,), shape.context, dtype=torch.int32, device=device),
    )


def dense(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as torch wants them: `[rows, heads, tokens, head_dim]`."""
    s = inputs.shape

    def gathered(cache: torch.Tensor) -> torch.Tensor:
        pages = cache[inputs.table.long()].transpose(1, 2)  # [rows, heads, blocks, page, head_dim]
        return pages.reshape(s.rows, s.num_kv_heads, -1, s.head_dim)[:, :, : s.context].contiguous()

    q = inputs.q.view(s.rows, s.num_new, s.num_heads, s.head_dim).transpose(1, 2).contiguous()
    return q, gathered(inputs.k), gathered(inputs.v)


def reference(inputs: Inputs) -> torch.Tensor:
    """In float64, of what `checked` takes: `[rows * queries, num_heads, head_dim]`."""
    s = inputs.shape
    num_rows, num_queries = min(s.rows, _CHECKED_ROWS), min(s.num_new, _CHECKED_QUERIES)
    few = replace(s, rows=num_rows)
    inputs = replace(inputs, shape=few, q=inputs.q[: num_rows * s.num_new], table=inputs.table[:num_rows])
    q, k, v = (tensor.double() for tensor in dense(inputs))
    q = q[:, :, -num_queries:].reshape(num_rows, s.num_kv_heads, -1, s.head_dim)  # a group's heads behind each other
    scores = q @ k.transpose(-1, -2) * s.head_dim**-0.5
    scores = scores.view(num_rows, s.num_kv_heads, -1, num_queries, s.context)
    positions = torch.arange(s.context - num_queries, s.context, device=q.device).unsqueeze(1)
    scores.masked_fill_(torch.arange(s.context, device=q.device) > positions, -torch.inf)
    out = torch.softmax(scores, -1).flatten(2, 3) @ v
    return out.view(num_rows, s.num_heads, num_queries, s.head_dim).transpose(1, 2).flatten(0, 1)


def checked(out: torch.Tensor, shape: Shape) -> torch.Tensor:
    """The rows and queries of an engine's output that `reference` computes."""
    num_rows, num_queries = min(shape.rows, _CHECKED_ROWS), min(shape.num_new, _CHECKED_QUERIES)
    out = out.view(shape.rows, shape.num_new, shape.num_heads, shape.head_dim)
    return out[:num_rows, shape.num_new - num_queries :].flatten(0, 1)


def _ours(inputs: Inputs) -> Run:
    from .paged_attention import paged_attention

    s = inputs.shape
    batch = AttentionBatch(
        query_start=inputs.query_start,
        context_lens=inputs.context_lens,
        block_tables=inputs.table,
        slot_mapping=torch.full((len(inputs.q),), -1, dtype=torch.int64, device=inputs.q.device),
        block_size=_PAGE,
        max_query_len=s.num_new,
        max_context_len=s.context,
        num_decodes=s.rows if s.num_new == 1 else 0,
    )
    return lambda: paged_attention(inputs.q, inputs.k, inputs.v, batch, AttentionKind(s.head_dim**-0.5))


def _back(out: torch.Tensor, shape: Shape) -> torch.Tensor:
    return out.transpose(1, 2).reshape(-1, shape.num_heads, shape.head_dim)


def _torch_attention(inputs: Inputs) -> Run:
    s = inputs.shape
    q, k, v = dense(inputs)
    if s.num_cached and s.num_new > 1:
        from torch.nn.attention.bias import causal_lower_right

        bias: Any = causal_lower_right(s.num_new, s.context)
        return lambda: _back(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True), s)
    is_causal = s.num_new > 1
    return lambda: _back(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True), s)


def _cudnn(inputs: Inputs) -> Run:
    """Torch's attention by cuDNN's kernel alone; by itself torch takes another one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    run = _torch_attention(inputs)

    def by_cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return run()

    return by_cudnn


def _flex_attention(inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s = inputs.shape
    q, k, v = dense(inputs)
    torch._dynamo.reset()  # type: ignore[no-untyped-call]  # after some shapes it would compile no further one
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    mask = None
    if s.num_new > 1:

        def causal(b: Any, h: Any, query: Any, key: Any) -> Any:
            return query + s.num_cached >= key

        mask = create_block_mask(causal, None, None, s.num_new, s.context, device=str(q.device))
    return lambda: _back(compiled(q, k, v, block_mask=mask, enable_gqa=True), s)


def _import_flashinfer() -> None:
    import flashinfer  # type: ignore[import-not-found]  # noqa: F401 - a peer, no dependency


def _flashinfer(inputs: Inputs) -> Run:
    import flashinfer

    s, device = inputs.shape, inputs.q.device
    workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
    blocks_each = inputs.table.shape[1]
    indptr = torch.arange(s.rows + 1, dtype=torch.int32) * blocks_each
    last = torch.full((s.rows,), (s.context - 1) % _PAGE + 1, dtype=torch.int32)
    sizes = (s.num_heads, s.num_kv_heads, s.head_dim, _PAGE)
    if s.num_new == 1:
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        decode.plan(indptr, inputs.table.flatten(), last, *sizes, q_data_type=inputs.q.dtype)
        return lambda: decode.run(inputs.q, (inputs.k, inputs.v))
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    prefill.plan(
        *(inputs.query_start, indptr.to(device), inputs.table.flatten(), last.to(device), *sizes),
        causal=True,
        q_data_type=inputs.q.dtype,
    )
    return lambda: prefill.run(inputs.q, (inputs.k, inputs.v))


def _load_fa3() -> None:
    path = os.environ.get(FA3_LIBRARY, "")
    if not path:
        raise ImportError(f"no library: set {FA3_LIBRARY} to the path of vLLM's _vllm_fa3_C.abi3.so")
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]  # torch has no type for it


def _fa3(inputs: Inputs) -> Run:
    s = inputs.shape
    k, v = (cache.transpose(1, 2).contiguous() for cache in (inputs.k, inputs.v))  # token-major pages
    out = torch.empty_like(inputs.q)
    operation = torch.ops._vllm_fa3_C.fwd
    none = (None,) * 3
    arguments = [
        *(inputs.q, k, v, *none, out, inputs.query_start, None, None, None, inputs.context_lens),
        *(s.num_new, s.context, inputs.table, None, None, *none, *none, s.head_dim**-0.5),
        *(True, -1, -1, 0.0, True, None, 0, None, 0, None),
    ]
    num_arguments = len(operation.default._schema.arguments)
    arguments += [1, 0, None][: max(0, num_arguments - len(arguments))]  # of context parallelism, in later versions

    def run() -> torch.Tensor:
        operation(*arguments)
        return out

    return run


_MAKERS: dict[str, Callable[[Inputs], Run]] = {
    "octavo": _ours,
    "torch_attention": _torch_attention,
    "cudnn": _cudnn,
    "flex_attention": _flex_attention,
    "flashinfer": _flashinfer,
    "fa3": _fa3,
}
_PROBES: dict[str, Callable[[], None]] = {"flashinfer": _import_flashinfer, "fa3": _load_fa3}
"""What raises where a peer is absent."""


def make_run(peer: str, inputs: Inputs) -> Run:
    """A call of one of `PEERS`; raises what keeps it from running."""
    return _MAKERS[peer](inputs)


def rows(
    device: torch.device,
    *,
    peer: str = "octavo",
    shapes: tuple[Shape, ...] = SHAPES,
    first_case: int = 0,
    on_case: OnCase = lambda _number, _of, _what: None,
) -> Iterator[Row]:
    """Figures of one engine's attention; a shape that fails is a row that says why, a peer that is absent one row."""
    try:
        _PROBES.get(peer, lambda: None)()
    except Exception as error:  # noqa: BLE001,RUF100 - a peer that cannot be imported is absent, whatever the reason
        yield {"kernel": "attention", "shape": "", "engine": peer, "note": f"left out: {worded(error)}"}
        return
    cases = [
        Case(
            {"kernel": shape.name, "shape": str(shape), "engine": peer},
            lambda shape=shape: [_measured(peer, shape, device)],  # type: ignore[misc]
        )
        for shape in shapes
    ]
    yield from rows_of(cases, device, first=first_case, on_case=on_case)


def _measured(peer: str, shape: Shape, device: torch.device) -> Row:
    runs = []
    for turn in range(shape.turns):
        inputs = make_inputs(shape, device, seed=turn)
        runs.append(make_run(peer, inputs))
        if not turn:
            error = relative_error(checked(runs[0](), shape), reference(inputs))
    if not error < _MOST_ERROR:  # NaN is wrong too
        return {"note": f"WRONG: off by {error:.1e} of the norm"}
    timed = device_time(*runs)
    note = "; ".join(filter(None, (f"error {error:.1e}", timed.how)))
    return {**timed.figures, "bytes": shape.num_bytes, "flops": shape.flops, "error": error, "note": note}


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN stays NaN."""
    return float((out.double().view_as(exact) - exact).norm() / exact.norm())
