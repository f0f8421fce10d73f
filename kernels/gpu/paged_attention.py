"""Paged attention on a GPU: which kernels are launched, with what.

The meaning is `paged_attention_ref` one level up; `attention_kernels` computes it, by the schedule that
`attention_config` chooses.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
import triton

from ..attention_batch import AttentionBatch
from ..attention_kind import AttentionKind
from ..kv_quantization import head_dim_of, is_quantized
from .attention_config import Problem, Schedule, choose_schedule
from .attention_kernels import share_kernel, tile_kernel
from .attention_split import reduce_chunks_kernel, reduce_shares_kernel
from .attention_tiles import LOG2_E, Tiling
from .kv_write import write_kv
from .launch import UPCAST, num_processors

__all__ = ["paged_attention", "write_kv"]

_LOG2_E = float(LOG2_E.value)
MAX_HEAD_DIM = 256  # of wider heads a query tile and the keys on their way take more shared memory than there is
FEWEST_ROWS = 256  # that kernels are compiled for: to search so many costs no more than to search one


def _check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch) -> None:
    """What the kernels take for granted of all layers of a kind."""
    if q.dtype not in {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"attention on a GPU takes bfloat16, float16 or float32, got {q.dtype}")
    if k_cache.dtype is not v_cache.dtype or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"key and value caches differ: {k_cache.shape=} {v_cache.shape=} {k_cache.dtype} {v_cache.dtype}"
        )
    widest = max(q.shape[2], head_dim_of(v_cache))
    if widest > MAX_HEAD_DIM:
        raise ValueError(f"attention on a GPU takes heads of at most {MAX_HEAD_DIM} elements, got {widest}")
    if is_quantized(k_cache.dtype) and (k_cache.shape[3] % 4 or v_cache.shape[3] % 4):  # scales would not be aligned
        raise ValueError(
            f"a quantised KV cache on a GPU needs heads of a multiple of 4 elements, got {head_dim_of(k_cache)} and "
            f"{head_dim_of(v_cache)}: keep this model's cache in its own dtype"
        )
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into {k_cache.shape[1]} KV heads")
    if not is_quantized(k_cache.dtype) and q.dtype is not k_cache.dtype:
        raise ValueError(f"queries are {q.dtype} but the KV cache is {k_cache.dtype}: cast one of them")
    assert head_dim_of(k_cache) == q.shape[2]
    assert batch.block_size == k_cache.shape[2]
    for indices in (batch.query_start, batch.context_lens, batch.block_tables):
        assert indices.dtype is torch.int32
        assert indices.stride(-1) == 1 or indices.shape[-1] <= 1


@dataclasses.dataclass(frozen=True, slots=True)
class _Alike:
    """What layers have in common whose attention over the same batch is launched alike."""

    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    device: torch.device
    sliding_window: int
    has_softcap: bool
    has_sinks: bool
    has_alibi: bool
    batch_invariant: bool
    schedule: Schedule | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """A run of a batch's rows, `first_row : first_row + num_rows`, and how it is launched in each layer of a kind.

    Attributes:
        scratch: of a launch by share, which one layer has no use for any more when the next one is launched.
    """

    first_row: int
    num_rows: int
    first_token: int
    end_token: int
    schedule: Schedule
    tiling: Tiling
    scratch: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def rows(self) -> tuple[int, int]:
        return self.first_row, self.num_rows

    @property
    def num_tokens(self) -> int:
        return self.end_token - self.first_token


def _plan(alike: _Alike, batch: AttentionBatch, num_tokens: int) -> tuple[_Run, ...]:
    """The launches of a batch.

    Decodes and the rest in launches of their own: the former's tiles are too low for the latter, and the latter's would
    spend a prefill's arithmetic on each decode.
    """
    num_rows, longest = batch.num_rows, batch.max_query_len
    num_decodes = num_rows if longest <= 1 else batch.num_decodes
    if num_decodes in {0, num_rows}:
        cuts = [(0, num_rows, 0, num_tokens, longest)]
    else:
        rest = (num_decodes, num_rows - num_decodes, num_decodes, num_tokens, longest)
        cuts = [(0, num_decodes, 0, num_decodes, 1), rest]
    return tuple(_plan_run(alike, batch, cut) for cut in cuts if cut[3] > cut[2])


def _plan_run(alike: _Alike, batch: AttentionBatch, cut: tuple[int, int, int, int, int]) -> _Run:
    """A run's launch.

    Args:
        cut: first row, rows, first token, end of the tokens, most tokens of a row.
    """
    first_row, num_rows, first_token, end_token, max_query_len = cut
    group, quantized = alike.num_heads // alike.num_kv_heads, is_quantized(alike.cache_dtype)
    problem = Problem(
        num_rows=num_rows,
        num_tokens=end_token - first_token,
        max_query_len=max_query_len,
        max_context_len=batch.max_context_len,
        group=group,
        num_kv_heads=alike.num_kv_heads,
        head_dim=triton.next_power_of_2(max(alike.k_dim, alike.v_dim)),
        element_bytes=alike.dtype.itemsize,
        cache_bytes=alike.cache_dtype.itemsize,
        block_size=batch.block_size,
        num_processors=num_processors(alike.device),
    )
    schedule = alike.schedule or choose_schedule(problem, batch_invariant=alike.batch_invariant)
    tiling = Tiling(
        BLOCK_M=schedule.block_m,
        BLOCK_N=schedule.block_n,
        GROUP=group,
        HEADS=min(group, schedule.block_m),
        K_DIM=alike.k_dim,
        V_DIM=alike.v_dim,
        K_BLOCK=max(16, triton.next_power_of_2(alike.k_dim)),
        V_BLOCK=max(16, triton.next_power_of_2(alike.v_dim)),
        BLOCK_SIZE=batch.block_size,
        NUM_KV_HEADS=alike.num_kv_heads,
        WINDOW=max(0, alike.sliding_window),
        SOFTCAP=alike.has_softcap,
        ALIBI=alike.has_alibi,
        SINKS=alike.has_sinks,
        QUANTIZED=quantized,
        # One size for all batches, if they say how many rows there can be: each is compiled anew.
        MAX_ROWS=max(FEWEST_ROWS, triton.next_power_of_2(max(num_rows, batch.max_rows))),
        UPCAST=UPCAST,
    )
    scratch = None
    if schedule.by_share:
        num_programs = num_processors(alike.device) * schedule.programs_per_processor
        scratch = _scratch(num_programs * 2 * tiling.BLOCK_M, tiling, alike.device)
    return _Run(first_row, num_rows, first_token, end_token, schedule, tiling, scratch)


def _scratch(num_states: int, tiling: Tiling, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty(num_states * tiling.V_BLOCK, dtype=torch.float32, device=device)
    return values, torch.empty(num_states * 2, dtype=torch.float32, device=device)


class _Launch:
    """One call's tensors, and the launch of a run of its rows."""

    def __init__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        kind: AttentionKind,
        out: torch.Tensor,
    ) -> None:
        self.q, self.out, self.batch = q, out, batch
        self.tensors = (
            *(q, k_cache, v_cache),
            *(batch.query_start, batch.context_lens, batch.block_tables),
            *(q if kind.sinks is None else kind.sinks, q if kind.alibi_slopes is None else kind.alibi_slopes),
        )
        self.numbers = (
            *(kind.scale if kind.softcap > 0 else kind.scale * _LOG2_E, kind.softcap),
            *(q.stride(0), q.stride(1), out.stride(0), out.stride(1)),
            batch.block_tables.stride(0),
        )

    def run(self, run: _Run) -> None:
        """Attention of these rows."""
        if run.scratch is not None:
            self._run_shares(run, *run.scratch)
        else:
            self._run_tiles(run)

    def _run_shares(self, run: _Run, partial: torch.Tensor, stats: torch.Tensor) -> None:
        schedule, tiling, batch = run.schedule, run.tiling, self.batch
        num_programs = num_processors(self.q.device) * schedule.programs_per_processor
        share_kernel[(num_programs,)](
            *(self.out, partial, stats, *self.tensors, *self.numbers, *run.rows),
            S=tiling,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
        )
        reduce_shares_kernel[(num_programs, tiling.HEADS)](
            *(self.out, partial, stats, batch.query_start, batch.context_lens, self.tensors[6]),
            *(self.out.stride(0), self.out.stride(1), *run.rows, run.end_token),
            S=tiling,
            num_warps=4,
        )

    def _run_tiles(self, run: _Run) -> None:
        schedule, tiling, batch = run.schedule, run.tiling, self.batch
        num_tokens, num_heads = run.num_tokens, self.q.shape[1]
        max_chunks = -(-batch.max_context_len // schedule.chunk) if schedule.split else 1
        partial, stats = (
            _scratch(num_tokens * num_heads * max_chunks, tiling, self.q.device) if schedule.split else (self.out,) * 2
        )
        tile_kernel[(num_tokens // tiling.BLOCK_Q + run.num_rows + 1, tiling.HEAD_TILES, max_chunks)](
            *(self.out, partial, stats, *self.tensors, *self.numbers, *run.rows),
            *(run.first_token, run.end_token, max_chunks),
            CHUNK=schedule.chunk,
            SPLIT=schedule.split,
            S=tiling,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
            enable_fp_fusion=schedule.fuses,
        )
        if schedule.split:
            reduce_chunks_kernel[(num_tokens, num_heads)](
                *(self.out, partial, stats, batch.query_start, batch.context_lens, self.tensors[6]),
                *(self.out.stride(0), self.out.stride(1), *run.rows, run.first_token, max_chunks),
                CHUNK=schedule.chunk,
                S=tiling,
                num_warps=4,
                enable_fp_fusion=schedule.fuses,
            )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    kind: AttentionKind,
    *,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    schedule: Schedule | None = None,
) -> torch.Tensor:
    """Causal attention of each new token over its row's cached tokens; arguments as one level up, and two more.

    Safe to capture in a CUDA graph: which programs run and how much memory they take depends on shapes and on the
    batch's Python integers alone, of which `max_query_len` and `max_context_len` may be upper bounds. Rows without
    keys and tokens of no row give zeros.

    Args:
        q: `[num_tokens, num_heads, k_head_dim]`, of the cache's dtype unless that is quantised; any stride but the
            last, which must be 1.
        out: `[num_tokens, num_heads, v_head_dim]` of the dtype of `q`, for the result; a new tensor by default.
        batch_invariant: a query's bits depend on that query, its visible keys and values and their positions alone: the
            same alone or in any batch, decoded or prefilled in any chunks, for any block size and block table.
        schedule: instead of `choose_schedule`'s, for measurements.

    Raises:
        ValueError: shapes or dtypes that the kernels cannot take; the message says which.
    """
    if kind.scale <= 0.0:
        raise ValueError(f"scale must be positive, got {kind.scale}")
    if not k_cache.is_contiguous() or not v_cache.is_contiguous():
        raise ValueError("the KV cache must be contiguous")
    # What follows from these is found out in the first layer of a kind: it costs the host more than the launches do.
    key = (
        *(q.shape, k_cache.shape, v_cache.shape, q.dtype, k_cache.dtype, v_cache.dtype),
        *(kind.sliding_window, kind.softcap > 0, kind.sinks is None, kind.alibi_slopes is None),
        *(batch_invariant, schedule),
    )
    runs = batch.plans.get(key)
    if runs is None:
        _check(q, k_cache, v_cache, batch)
        alike = _Alike(
            num_heads=q.shape[1],
            num_kv_heads=k_cache.shape[1],
            k_dim=q.shape[2],
            v_dim=head_dim_of(v_cache),
            dtype=q.dtype,
            cache_dtype=k_cache.dtype,
            device=q.device,
            sliding_window=kind.sliding_window,
            has_softcap=kind.softcap > 0,
            has_sinks=kind.sinks is not None,
            has_alibi=kind.alibi_slopes is not None,
            batch_invariant=batch_invariant,
            schedule=schedule,
        )
        runs = batch.plans[key] = _plan(alike, batch, q.shape[0])
    if q.stride(2) != 1:
        q = q.contiguous()
    if out is None:
        out = torch.empty((*q.shape[:2], head_dim_of(v_cache)), dtype=q.dtype, device=q.device)
    launch = _Launch(q, k_cache, v_cache, batch, kind, out)
    for run in cast("tuple[_Run, ...]", runs):
        launch.run(run)
    return out
