"""Paged attention's two schedules over one inner loop.

**By query tile**: a program for each tile of queries and KV head, all of its keys in one go; for prefills, which fill
the GPU with query tiles. **By share**: a fixed number of programs, each with an equal run of the batch's KV tiles; for
decodes, whose query tiles are few, or of very different lengths. Batch invariance is the first with the keys cut at
fixed positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_split import find_share, store_part, tile_ranges
from .attention_tiles import LOG2_E, attend, empty_state, finish, load_queries, merge, query_rows
from .launch import is_interpreted


def _condition(running, disable_licm):
    """`tl.condition`, of which the interpreter makes an object that is always true."""
    return running


if not is_interpreted():
    _condition = tl.condition


@triton.jit
def _keys_of(k_ptr, v_ptr, kv_head, table_ptr, context_len, S: tl.constexpr):
    """What `attend` has to know of one row and KV head."""
    head = kv_head.to(tl.int64) * S.BLOCK_SIZE
    return k_ptr + head * S.K_WIDTH, v_ptr + head * S.V_WIDTH, table_ptr, context_len


@triton.jit
def _slopes_of(slopes_ptr, head, valid, S: tl.constexpr):
    slope = 0.0
    if S.ALIBI:
        slope = tl.load(slopes_ptr + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    return slope


@triton.jit
def _load_query(q_ptr, stride_token, stride_head, slopes_ptr, tile, lowest, S: tl.constexpr):
    """What `attend` has to know of a query tile whose first token is at position `lowest`.

    Args:
        tile: its first token, where the row's tokens end, its first head, where the KV head's query heads end.
    """
    lowest_token, end_token, first_head, end_head = tile
    offset, within, used = query_rows(S)
    valid = used & (offset < end_token - lowest_token) & (within < end_head - first_head)
    q_ptr += lowest_token.to(tl.int64) * stride_token + first_head * stride_head
    q = load_queries(q_ptr, stride_token, stride_head, offset, within, valid, S)
    return q, lowest + offset, _slopes_of(slopes_ptr + first_head, within, valid, S)


@triton.jit
def _stored_rows(tile, S: tl.constexpr):
    """Token and head of each row of a query tile, and whether its output is stored.

    In other words than `_load_query` has for it, whose tokens count from the tile's: of the same words a compiler makes
    one computation, before all keys, and keeps what comes of it, 35 registers a thread of a prefill, until after them.
    """
    lowest_token, end_token, first_head, end_head = tile
    offset, within, used = query_rows(S)
    token, head = lowest_token + offset, first_head + within
    return token, head, used & (token < end_token) & (head < end_head)


@triton.jit
def _sinks_of(sinks_ptr, head, valid, S: tl.constexpr):
    sink = 0.0
    if S.SINKS:
        sink = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    return sink


@triton.jit
def _store_out(out_ptr, stride_token, stride_head, out, token, head, valid, S: tl.constexpr):
    V_BLOCK: tl.constexpr = S.V_BLOCK
    dim = tl.arange(0, V_BLOCK)
    pointers = out_ptr + token.to(tl.int64)[:, None] * stride_token + head[:, None] * stride_head + dim[None, :]
    tl.store(pointers, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (dim < S.V_DIM)[None, :])


@triton.jit
def _attend_range(query, state, begin, end, keys, lowest, highest, scale, softcap, S: tl.constexpr):
    """KV tiles `begin : end` for queries at positions `lowest ... highest`: masks only where some query needs one."""
    visible_to_all = tl.minimum((lowest + 1) // S.BLOCK_N, end)
    if S.WINDOW:
        inside = (tl.maximum(highest - S.WINDOW + 1, 0) + S.BLOCK_N - 1) // S.BLOCK_N
        inside = tl.minimum(tl.maximum(begin, inside), end)
        state = attend(query, state, begin, inside, keys, scale, softcap, True, S)
        begin = inside
    middle = tl.maximum(visible_to_all, begin)
    state = attend(query, state, begin, middle, keys, scale, softcap, False, S)
    return attend(query, state, middle, end, keys, scale, softcap, True, S)


@triton.jit
def _find_tile(
    query_start_ptr, context_lens_ptr, query_tile, first_row, num_rows, first_token, end_token, S: tl.constexpr
):
    """A query tile's row, that row's context, the tile's first token, and where the row's tokens end.

    Row i's tiles begin at tile `query_start[i] // BLOCK_Q + i`, so that a program finds its row, and a grid that the
    host knows has room for all. Behind the last row comes one more, without keys: the tokens of no row.
    """
    MAX_ROWS: tl.constexpr = S.MAX_ROWS
    rows = tl.arange(0, MAX_ROWS)
    is_row = rows < num_rows
    starts = tl.load(query_start_ptr + first_row + rows, mask=is_row, other=0) - first_token
    begins = tl.where(is_row, starts // S.BLOCK_Q + rows, 2147483647)
    begin_of_none = (tl.load(query_start_ptr + first_row + num_rows) - first_token) // S.BLOCK_Q + num_rows
    row = tl.sum((begins <= query_tile).to(tl.int32)) + (begin_of_none <= query_tile).to(tl.int32) - 1
    start = tl.load(query_start_ptr + first_row + row)
    end = tl.load(query_start_ptr + first_row + row + 1, mask=row < num_rows, other=0)
    context_len = tl.load(context_lens_ptr + first_row + row, mask=row < num_rows, other=0)
    end = tl.where(row < num_rows, end, end_token)
    lowest_token = start + (query_tile - ((start - first_token) // S.BLOCK_Q + row)) * S.BLOCK_Q
    return row, context_len, lowest_token, end


@triton.jit
def _attend_chunks(
    query, first_tile, end_tile, keys, lowest, highest, scale, softcap, TILES: tl.constexpr, S: tl.constexpr
):
    """As `_attend_range`, with the keys cut at multiples of `TILES` tiles and the parts merged in their order."""
    state = empty_state(S)
    for chunk in range(first_tile // TILES, (end_tile + TILES - 1) // TILES):
        begin, stop = tl.maximum(first_tile, chunk * TILES), tl.minimum(end_tile, (chunk + 1) * TILES)
        part = _attend_range(query, empty_state(S), begin, stop, keys, lowest, highest, scale, softcap, S)
        state = merge(state, part)
    return state


@triton.jit(do_not_specialize=["table_stride", "first_row", "num_rows", "first_token", "end_token", "max_chunks"])
def tile_kernel(
    out_ptr,  # [num_tokens, num_heads, V_DIM]
    partial_ptr,  # [num_tokens, num_heads, max_chunks, V_BLOCK] float32, as is stats_ptr without V_BLOCK but with 2
    stats_ptr,
    q_ptr,  # [num_tokens, num_heads, K_DIM]
    k_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, K_WIDTH], as is v_ptr with V_WIDTH
    v_ptr,
    query_start_ptr,  # [rows + 1] int32
    context_lens_ptr,  # [rows] int32
    tables_ptr,  # [rows, ...] int32
    sinks_ptr,  # [num_heads]
    slopes_ptr,  # [num_heads]
    scale,
    softcap,
    q_stride_token,
    q_stride_head,
    out_stride_token,
    out_stride_head,
    table_stride,
    first_row,
    num_rows,
    first_token,
    end_token,
    max_chunks,
    CHUNK: tl.constexpr,  # tokens; 0: all keys in one go
    SPLIT: tl.constexpr,  # a program for each chunk, whose state is kept; else all chunks in order
    S: tl.constexpr,
):
    """One program a query tile, and a chunk of keys where those are split; `_find_tile` says which tile it is."""
    # From the last tile on: it has the most keys of its row, and what is longest should start first.
    query_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_tile = tl.program_id(1)
    row, context_len, lowest_token, end = _find_tile(
        query_start_ptr, context_lens_ptr, query_tile, first_row, num_rows, first_token, end_token, S
    )
    if lowest_token >= end:
        return

    tiles_per_head: tl.constexpr = S.HEAD_TILES // S.NUM_KV_HEADS
    kv_head = head_tile // tiles_per_head
    first_head = kv_head * S.GROUP + head_tile % tiles_per_head * S.HEADS
    queries = (lowest_token, end, first_head, (kv_head + 1) * S.GROUP)
    if context_len <= 0:
        if tl.program_id(2) == 0:
            _, _, nothing = empty_state(S)
            token, head, valid = _stored_rows(queries, S)
            _store_out(out_ptr, out_stride_token, out_stride_head, nothing, token, head, valid, S)
        return

    lowest = context_len - end + lowest_token
    highest = tl.minimum(lowest + S.BLOCK_Q, context_len) - 1
    first_tile = 0
    if S.WINDOW:
        first_tile = tl.maximum(lowest - S.WINDOW + 1, 0) // S.BLOCK_N
    end_tile = highest // S.BLOCK_N + 1
    query = _load_query(q_ptr, q_stride_token, q_stride_head, slopes_ptr, queries, lowest, S)
    table_ptr = tables_ptr + (first_row + row).to(tl.int64) * table_stride
    keys = _keys_of(k_ptr, v_ptr, kv_head, table_ptr, context_len, S)
    TILES: tl.constexpr = CHUNK // S.BLOCK_N
    if CHUNK == 0:
        state = _attend_range(query, empty_state(S), first_tile, end_tile, keys, lowest, highest, scale, softcap, S)
    elif SPLIT:
        chunk = tl.program_id(2)
        begin, stop = tl.maximum(first_tile, chunk * TILES), tl.minimum(end_tile, (chunk + 1) * TILES)
        if begin >= stop:
            return
        state = _attend_range(query, empty_state(S), begin, stop, keys, lowest, highest, scale, softcap, S)
        token, head, valid = _stored_rows(queries, S)
        index = ((token - first_token) * (S.NUM_KV_HEADS * S.GROUP) + head).to(tl.int64) * max_chunks + chunk
        store_part(partial_ptr, stats_ptr, state, index, valid, S)
        return
    else:
        state = _attend_chunks(query, first_tile, end_tile, keys, lowest, highest, scale, softcap, TILES, S)
    token, head, valid = _stored_rows(queries, S)
    out = finish(state, _sinks_of(sinks_ptr, head, valid, S), S)
    _store_out(out_ptr, out_stride_token, out_stride_head, out, token, head, valid, S)


@triton.jit(do_not_specialize=["table_stride", "first_row", "num_rows"])
def share_kernel(
    out_ptr,  # [num_tokens, num_heads, V_DIM]
    partial_ptr,  # [num_programs, 2, BLOCK_M, V_BLOCK] float32, as is stats_ptr without V_BLOCK but with 2
    stats_ptr,
    q_ptr,  # [num_tokens, num_heads, K_DIM]
    k_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, K_WIDTH], as is v_ptr with V_WIDTH
    v_ptr,
    query_start_ptr,  # [rows + 1] int32
    context_lens_ptr,  # [rows] int32
    tables_ptr,  # [rows, ...] int32
    sinks_ptr,  # [num_heads]
    slopes_ptr,  # [num_heads]
    scale,
    softcap,
    q_stride_token,
    q_stride_head,
    out_stride_token,
    out_stride_head,
    table_stride,
    first_row,
    num_rows,
    S: tl.constexpr,
):
    """One program an equal share of all KV tiles, ordered by row, query tile, head and position."""
    program = tl.program_id(0)
    at, stop, row, row_begin, _ = find_share(
        query_start_ptr, context_lens_ptr, first_row, num_rows, program, tl.num_programs(0), S
    )
    tiles_per_head: tl.constexpr = S.HEAD_TILES // S.NUM_KV_HEADS
    # What is the same in all turns is computed in each: kept from before the first, it would take 40 registers.
    while _condition(at < stop, disable_licm=True):
        start = tl.load(query_start_ptr + first_row + row)
        end = tl.load(query_start_ptr + first_row + row + 1)
        context_len = tl.load(context_lens_ptr + first_row + row)
        row_first, num_tiles, query_tiles = tile_ranges(end - start, context_len, S)
        work_of_row = num_tiles * query_tiles * S.HEAD_TILES
        item = (at - row_begin) // tl.maximum(num_tiles, 1)
        tile = at - row_begin - item * num_tiles
        count = tl.minimum(num_tiles - tile, stop - at)
        if work_of_row > 0:
            head_tile = item % S.HEAD_TILES
            kv_head = head_tile // tiles_per_head
            first_head = kv_head * S.GROUP + head_tile % tiles_per_head * S.HEADS
            lowest_token = start + item // S.HEAD_TILES * S.BLOCK_Q
            queries = (lowest_token, end, first_head, (kv_head + 1) * S.GROUP)
            lowest = context_len - end + lowest_token
            highest = tl.minimum(lowest + S.BLOCK_Q, context_len) - 1
            # An early query tile of a row sees fewer keys than its row's share was counted for.
            begin_tile = row_first + tile
            end_tile = tl.minimum(begin_tile + count, highest // S.BLOCK_N + 1)
            query = _load_query(q_ptr, q_stride_token, q_stride_head, slopes_ptr, queries, lowest, S)
            table_ptr = tables_ptr + (first_row + row).to(tl.int64) * table_stride
            keys = _keys_of(k_ptr, v_ptr, kv_head, table_ptr, context_len, S)
            state = attend(query, empty_state(S), begin_tile, end_tile, keys, scale, softcap, True, S)
            token, head, valid = _stored_rows(queries, S)
            if count == num_tiles:
                out = finish(state, _sinks_of(sinks_ptr, head, valid, S), S)
                _store_out(out_ptr, out_stride_token, out_stride_head, out, token, head, valid, S)
            else:
                # At most two runs of a share are parts: its first, begun by another program, and its last.
                slot = program * 2 + (tile == 0).to(tl.int32)
                index = slot * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
                store_part(partial_ptr, stats_ptr, state, index, valid, S)
        at += tl.maximum(count, 0)
        if at >= row_begin + work_of_row:
            row_begin += work_of_row
            row += 1
