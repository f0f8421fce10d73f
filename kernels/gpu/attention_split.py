"""Split-KV attention's second kernel: states of parts of a row's keys become its output.

Two ways of cutting, each with its reduction:

- **Shares**: the KV tiles of the whole batch lie behind each other, and each of a fixed number of programs takes an
  equal run of them, wherever rows begin and end in it. No program waits for another, however ragged the batch is, and
  the grid depends on nothing but the GPU. Source: Stream-K (Osama et al. 2023); LeanAttention (Sanovar et al. 2024).
- **Chunks**: each row is cut at multiples of a fixed number of tokens, and the chunks' states are merged in order. A
  row's bits depend on nothing but the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LOG2_E, finish, merge

# Shares no smaller than this: a program's start and its part in the reduction cost about as much as a tile.
MIN_SHARE = tl.constexpr(2)
NUM_PARTS_AT_ONCE = tl.constexpr(16)


@triton.jit
def tile_ranges(query_len, context_len, S: tl.constexpr):
    """Rows' first KV tile, number of KV tiles, and number of query tiles a KV head; scalars or tensors alike."""
    first_tile = query_len * 0
    if S.WINDOW:
        first_tile = tl.maximum(context_len - query_len - S.WINDOW + 1, 0) // S.BLOCK_N
    num_tiles = (context_len + S.BLOCK_N - 1) // S.BLOCK_N - first_tile
    return first_tile, num_tiles, (query_len + S.BLOCK_Q - 1) // S.BLOCK_Q


@triton.jit
def _load_parts(partial_ptr, stats_ptr, index, valid, S: tl.constexpr):
    """States of query rows `index`: of each the largest logit, the sum and the values."""
    V_BLOCK: tl.constexpr = S.V_BLOCK
    dim = tl.arange(0, V_BLOCK)
    index = index.to(tl.int64)
    largest = tl.load(stats_ptr + 2 * index, mask=valid, other=float("-inf"))
    total = tl.load(stats_ptr + 2 * index + 1, mask=valid, other=0.0)
    acc = tl.load(partial_ptr + index[:, None] * V_BLOCK + dim[None, :], mask=valid[:, None], other=0.0)
    return largest, total, acc


@triton.jit
def store_part(partial_ptr, stats_ptr, state, index, valid, S: tl.constexpr):
    """Where `_load_parts` finds it."""
    V_BLOCK: tl.constexpr = S.V_BLOCK
    largest, total, acc = state
    dim = tl.arange(0, V_BLOCK)
    index = index.to(tl.int64)
    tl.store(stats_ptr + 2 * index, largest, mask=valid)
    tl.store(stats_ptr + 2 * index + 1, total, mask=valid)
    tl.store(partial_ptr + index[:, None] * V_BLOCK + dim[None, :], acc, mask=valid[:, None])


@triton.jit
def _one_row(S: tl.constexpr):
    """The state of one query row without keys."""
    V_BLOCK: tl.constexpr = S.V_BLOCK
    return tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32), tl.zeros([1, V_BLOCK], tl.float32)


@triton.jit
def _store_row(out_ptr, token, head, out_stride_token, out_stride_head, out, S: tl.constexpr):
    V_BLOCK: tl.constexpr = S.V_BLOCK
    dim = tl.arange(0, V_BLOCK)[None, :]
    row = tl.full([1, 1], 0, tl.int64) + token  # 64 bits wide; a loop's index has no `to` in the interpreter
    pointer = out_ptr + row * out_stride_token + head * out_stride_head + dim
    tl.store(pointer, out.to(out_ptr.dtype.element_ty), mask=dim < S.V_DIM)


@triton.jit
def _sink_of(sinks_ptr, head, S: tl.constexpr):
    sink = 0.0
    if S.SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
    return sink


@triton.jit
def find_share(query_start_ptr, context_lens_ptr, first_row, num_rows, program, num_programs, S: tl.constexpr):
    """Where a program's share begins and ends in the batch's tiles, the row it begins in, and where that row begins.

    Also the size of a share. All rows are looked at at once: a few hundred cycles, and no table made on the host.
    """
    MAX_ROWS: tl.constexpr = S.MAX_ROWS
    rows = tl.arange(0, MAX_ROWS)
    real = rows < num_rows
    start = tl.load(query_start_ptr + first_row + rows, mask=real, other=0)
    end = tl.load(query_start_ptr + first_row + rows + 1, mask=real, other=0)
    context_len = tl.load(context_lens_ptr + first_row + rows, mask=real, other=0)
    _, num_tiles, query_tiles = tile_ranges(end - start, context_len, S)
    work = num_tiles * query_tiles * S.HEAD_TILES
    total = tl.sum(work)
    share = tl.maximum((total + num_programs - 1) // num_programs, MIN_SHARE)
    begin = program * share
    row = tl.sum((tl.cumsum(work) <= begin).to(tl.int32))
    return begin, tl.minimum(begin + share, total), row, tl.sum(tl.where(rows < row, work, 0)), share


@triton.jit
def _zero_tokens(out_ptr, first, end, step, out_stride_token, out_stride_head, S: tl.constexpr):
    """Every `step`-th of the tokens `first : end`."""
    V_BLOCK: tl.constexpr = S.V_BLOCK
    HEAD_BLOCK: tl.constexpr = S.HEAD_BLOCK
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    dim = tl.arange(0, V_BLOCK)[None, :]
    zeros = tl.zeros([HEAD_BLOCK, V_BLOCK], out_ptr.dtype.element_ty)
    real = (head < S.NUM_KV_HEADS * S.GROUP) & (dim < S.V_DIM)
    for token in range(first, end, step):
        row = tl.full([1, 1], 0, tl.int64) + token
        tl.store(out_ptr + row * out_stride_token + head * out_stride_head + dim, zeros, mask=real)


@triton.jit(do_not_specialize=["first_row", "num_rows", "end_token"])
def reduce_shares_kernel(
    out_ptr,  # [num_tokens, num_heads, V_DIM]
    partial_ptr,  # [num_programs, 2, BLOCK_M, V_BLOCK] float32, as is stats_ptr without V_BLOCK but with 2
    stats_ptr,
    query_start_ptr,  # [rows + 1] int32
    context_lens_ptr,  # [rows] int32
    sinks_ptr,  # [num_heads]
    out_stride_token,
    out_stride_head,
    first_row,
    num_rows,
    end_token,
    S: tl.constexpr,
):
    """A program for each cut between two shares, and head of a query tile: merge the tile that was cut there.

    Of several cuts of one tile the first does it. The same programs write zeros for rows without keys and for the
    tokens of no row, which are behind those of the last.
    """
    cut, num_cuts = tl.program_id(0), tl.num_programs(0)
    if tl.program_id(1) == 0:
        tail = tl.load(query_start_ptr + first_row + num_rows)
        _zero_tokens(out_ptr, tail + cut, end_token, num_cuts, out_stride_token, out_stride_head, S)
        for row in range(first_row + cut, first_row + num_rows, num_cuts):
            if tl.load(context_lens_ptr + row) == 0:
                start, end = tl.load(query_start_ptr + row), tl.load(query_start_ptr + row + 1)
                _zero_tokens(out_ptr, start, end, 1, out_stride_token, out_stride_head, S)

    at, stop, row, row_begin, share = find_share(
        query_start_ptr, context_lens_ptr, first_row, num_rows, cut, num_cuts, S
    )
    if at >= stop:
        return
    start = tl.load(query_start_ptr + first_row + row)
    end = tl.load(query_start_ptr + first_row + row + 1)
    _, num_tiles, _ = tile_ranges(end - start, tl.load(context_lens_ptr + first_row + row), S)
    item = (at - row_begin) // num_tiles
    begin = row_begin + item * num_tiles
    first, last = begin // share, (begin + num_tiles - 1) // share
    if (begin == at) | (first != cut - 1):
        return

    tiles_per_head: tl.constexpr = S.HEAD_TILES // S.NUM_KV_HEADS
    head_tile = item % S.HEAD_TILES
    within = head_tile % tiles_per_head * S.HEADS + tl.program_id(1)
    head = head_tile // tiles_per_head * S.GROUP + within
    if within >= S.GROUP:
        return
    parts = tl.arange(0, NUM_PARTS_AT_ONCE)
    lowest_token = start + item // S.HEAD_TILES * S.BLOCK_Q
    for token in range(lowest_token, tl.minimum(lowest_token + S.BLOCK_Q, end)):
        query_row = (token - lowest_token) * S.HEADS + tl.program_id(1)
        state = _one_row(S)
        for part in range(first, last + 1, NUM_PARTS_AT_ONCE):
            program = part + parts
            # A share's first run continues another's (slot 0), unless it begins with the tile itself (slot 1).
            slot = tl.where(program == first, 1, 0)
            index = (program * 2 + slot) * S.BLOCK_M + query_row
            largest, total, acc = _load_parts(partial_ptr, stats_ptr, index, program <= last, S)
            most = tl.max(largest, 0)
            factor = tl.exp2(largest - tl.where(most == float("-inf"), 0.0, most))
            one = tl.zeros([1], tl.float32)
            summed = tl.sum(acc * factor[:, None], 0)[None, :]
            state = merge(state, (one + most, one + tl.sum(total * factor, 0), summed))
        out = finish(state, _sink_of(sinks_ptr, head, S), S)
        _store_row(out_ptr, token, head, out_stride_token, out_stride_head, out, S)


@triton.jit(do_not_specialize=["first_row", "num_rows", "first_token", "max_chunks"])
def reduce_chunks_kernel(
    out_ptr,  # [num_tokens, num_heads, V_DIM]
    partial_ptr,  # [num_tokens, num_heads, max_chunks, V_BLOCK] float32, as is stats_ptr without V_BLOCK but with 2
    stats_ptr,
    query_start_ptr,  # [rows + 1] int32
    context_lens_ptr,  # [rows] int32
    sinks_ptr,  # [num_heads]
    out_stride_token,
    out_stride_head,
    first_row,
    num_rows,
    first_token,
    max_chunks,
    CHUNK: tl.constexpr,  # tokens
    S: tl.constexpr,
):
    """One program a token and head: merge its chunks in order; zeros for a token of no row."""
    MAX_ROWS: tl.constexpr = S.MAX_ROWS
    token = first_token + tl.program_id(0)
    head = tl.program_id(1)
    row = tl.arange(0, MAX_ROWS)
    real = row < num_rows
    start = tl.load(query_start_ptr + first_row + row, mask=real, other=0)
    end = tl.load(query_start_ptr + first_row + row + 1, mask=real, other=0)
    context_len = tl.load(context_lens_ptr + first_row + row, mask=real, other=0)
    mine = (start <= token) & (token < end) & (context_len > 0)
    position = tl.sum(tl.where(mine, context_len - end + token, 0))
    end_chunk = tl.where(tl.sum(mine.to(tl.int32)) > 0, position // CHUNK + 1, 0)
    first_chunk = 0
    if S.WINDOW:
        first_chunk = tl.maximum(position - S.WINDOW + 1, 0) // CHUNK
    state = _one_row(S)
    for chunk in range(first_chunk, end_chunk):
        index = tl.full([1], 0, tl.int64) + ((token - first_token) * S.NUM_KV_HEADS * S.GROUP + head)
        index = index * max_chunks + chunk
        state = merge(state, _load_parts(partial_ptr, stats_ptr, index, index >= 0, S))
    out = finish(state, _sink_of(sinks_ptr, head, S), S)
    _store_row(out_ptr, token, head, out_stride_token, out_stride_head, out, S)
