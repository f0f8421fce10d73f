"""Paged attention on a GPU: which kernels are launched, with what.

The meaning is `paged_attention_ref` one level up; `attention_kernels` computes it, by the schedule that
`attention_config` chooses.
"""

from __future__ import annotations

import torch
import triton

from ..attention_batch import AttentionBatch
from ..kv_quantization import head_dim_of, is_quantized
from .attention_config import Problem, Schedule, choose_schedule
from .attention_kernels import share_kernel, tile_kernel
from .attention_split import reduce_chunks_kernel, reduce_shares_kernel
from .attention_tiles import LOG2_E, Tiling
from .kv_write import scale_view, write_kv
from .launch import UPCAST, num_processors

__all__ = ["paged_attention", "write_kv"]

FEWEST_ROWS = 256  # that kernels are compiled for: to search so many costs no more than to search one


def _check(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: AttentionBatch, scale: float) -> None:
    """What the kernels take for granted."""
    if q.dtype not in {torch.bfloat16, torch.float16, torch.float32}:
        raise ValueError(f"attention on a GPU takes bfloat16, float16 or float32, got {q.dtype}")
    if scale <= 0.0:
        raise ValueError(f"scale must be positive, got {scale}")
    if k_cache.dtype is not v_cache.dtype or k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"key and value caches differ: {k_cache.shape=} {v_cache.shape=} {k_cache.dtype} {v_cache.dtype}"
        )
    if not k_cache.is_contiguous() or not v_cache.is_contiguous():
        raise ValueError("the KV cache must be contiguous")
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads do not divide into {k_cache.shape[1]} KV heads")
    if not is_quantized(k_cache.dtype) and q.dtype is not k_cache.dtype:
        raise ValueError(f"queries are {q.dtype} but the KV cache is {k_cache.dtype}: cast one of them")
    assert head_dim_of(k_cache) == q.shape[2]
    assert batch.block_size == k_cache.shape[2]
    for indices in (batch.query_start, batch.context_lens, batch.block_tables):
        assert indices.dtype is torch.int32
        assert indices.stride(-1) == 1 or indices.shape[-1] <= 1


class _Launch:
    """One call's tensors, and the launch of a run of its rows."""

    def __init__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        out: torch.Tensor,
        *,
        scale: float,
        sliding_window: int,
        softcap: float,
        sinks: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        batch_invariant: bool,
        schedule: Schedule | None,
    ) -> None:
        self.schedule = schedule
        self.q, self.out, self.batch = q, out, batch
        self.num_kv_heads = k_cache.shape[1]
        self.k_dim, self.v_dim = head_dim_of(k_cache), head_dim_of(v_cache)
        self.cache = k_cache
        self.sliding_window, self.softcap = sliding_window, softcap
        self.sinks, self.alibi_slopes = sinks, alibi_slopes
        self.batch_invariant = batch_invariant
        self.tensors = (
            *(q, k_cache, v_cache, scale_view(k_cache), scale_view(v_cache)),
            *(batch.query_start, batch.context_lens, batch.block_tables),
            *(q if sinks is None else sinks, q if alibi_slopes is None else alibi_slopes),
        )
        self.numbers = (
            *(scale if softcap > 0 else scale * float(LOG2_E.value), softcap),
            *(q.stride(0), q.stride(1), out.stride(0), out.stride(1)),
            batch.block_tables.stride(0),
        )

    def tiling(self, schedule: Schedule) -> Tiling:
        group = self.q.shape[1] // self.num_kv_heads
        return Tiling(
            BLOCK_M=schedule.block_m,
            BLOCK_N=schedule.block_n,
            GROUP=group,
            HEADS=min(group, schedule.block_m),
            K_DIM=self.k_dim,
            V_DIM=self.v_dim,
            K_BLOCK=max(16, triton.next_power_of_2(self.k_dim)),
            V_BLOCK=max(16, triton.next_power_of_2(self.v_dim)),
            BLOCK_SIZE=self.batch.block_size,
            NUM_KV_HEADS=self.num_kv_heads,
            WINDOW=max(0, self.sliding_window),
            SOFTCAP=self.softcap > 0,
            ALIBI=self.alibi_slopes is not None,
            SINKS=self.sinks is not None,
            QUANTIZED=is_quantized(self.cache.dtype),
            # One size for all batches, if they say how many rows there can be: each is compiled anew.
            MAX_ROWS=max(FEWEST_ROWS, triton.next_power_of_2(max(self.batch.num_rows, self.batch.max_rows))),
            UPCAST=UPCAST,
        )

    def run(self, first_row: int, num_rows: int, first_token: int, end_token: int, max_query_len: int) -> None:
        """Attention of rows `first_row : first_row + num_rows`, whose tokens begin at `first_token`."""
        if end_token == first_token:
            return
        group = self.q.shape[1] // self.num_kv_heads
        problem = Problem(
            num_rows=num_rows,
            num_tokens=end_token - first_token,
            max_query_len=max_query_len,
            max_context_len=self.batch.max_context_len,
            group=group,
            num_kv_heads=self.num_kv_heads,
            head_dim=triton.next_power_of_2(max(self.k_dim, self.v_dim)),
            element_bytes=self.q.element_size(),
            cache_bytes=self.cache.element_size(),
            block_size=self.batch.block_size,
            num_processors=num_processors(self.q.device),
        )
        schedule = self.schedule or choose_schedule(problem, batch_invariant=self.batch_invariant)
        tiling = self.tiling(schedule)
        rows = (first_row, num_rows)
        if schedule.by_share:
            self._run_shares(schedule, tiling, rows, end_token)
        else:
            self._run_tiles(schedule, tiling, rows, (first_token, end_token))

    def _scratch(self, num_states: int, tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.empty(num_states * tiling.V_BLOCK, dtype=torch.float32, device=self.q.device)
        return values, torch.empty(num_states * 2, dtype=torch.float32, device=self.q.device)

    def _run_shares(self, schedule: Schedule, tiling: Tiling, rows: tuple[int, int], end_token: int) -> None:
        num_programs = num_processors(self.q.device) * schedule.programs_per_processor
        partial, stats = self._scratch(num_programs * 2 * tiling.BLOCK_M, tiling)
        share_kernel[(num_programs,)](
            *(self.out, partial, stats, *self.tensors, *self.numbers, *rows),
            S=tiling,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
        )
        reduce_shares_kernel[(num_programs, tiling.HEADS)](
            *(self.out, partial, stats, self.batch.query_start, self.batch.context_lens, self.tensors[8]),
            *(self.out.stride(0), self.out.stride(1), *rows, end_token),
            S=tiling,
            num_warps=4,
        )

    def _run_tiles(self, schedule: Schedule, tiling: Tiling, rows: tuple[int, int], tokens: tuple[int, int]) -> None:
        num_tokens, num_heads = tokens[1] - tokens[0], self.q.shape[1]
        max_chunks = -(-self.batch.max_context_len // schedule.chunk) if schedule.split else 1
        partial, stats = (
            self._scratch(num_tokens * num_heads * max_chunks, tiling) if schedule.split else (self.out,) * 2
        )
        tile_kernel[(num_tokens // tiling.BLOCK_Q + rows[1] + 1, tiling.HEAD_TILES, max_chunks)](
            *(self.out, partial, stats, *self.tensors, *self.numbers, *rows, *tokens, max_chunks),
            CHUNK=schedule.chunk,
            SPLIT=schedule.split,
            S=tiling,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
        )
        if schedule.split:
            reduce_chunks_kernel[(num_tokens, num_heads)](
                *(self.out, partial, stats, self.batch.query_start, self.batch.context_lens, self.tensors[8]),
                *(self.out.stride(0), self.out.stride(1), *rows, tokens[0], max_chunks),
                CHUNK=schedule.chunk,
                S=tiling,
                num_warps=4,
            )


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
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
    _check(q, k_cache, v_cache, batch, scale)
    if q.stride(2) != 1:
        q = q.contiguous()
    if out is None:
        out = torch.empty((*q.shape[:2], head_dim_of(v_cache)), dtype=q.dtype, device=q.device)
    launch = _Launch(
        *(q, k_cache, v_cache, batch, out),
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        batch_invariant=batch_invariant,
        schedule=schedule,
    )
    # Decodes and the rest in launches of their own: the former's tiles are too low for the latter, and the latter's
    # would spend a prefill's arithmetic on each decode.
    num_decodes = batch.num_rows if batch.max_query_len <= 1 else batch.num_decodes
    if num_decodes in {0, batch.num_rows}:
        launch.run(0, batch.num_rows, 0, q.shape[0], batch.max_query_len)
    else:
        launch.run(0, num_decodes, 0, num_decodes, 1)
        launch.run(num_decodes, batch.num_rows - num_decodes, num_decodes, q.shape[0], batch.max_query_len)
    return out
