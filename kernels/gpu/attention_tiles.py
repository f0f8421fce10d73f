"""The inner loop that every schedule of paged attention shares: one tile of queries over a run of KV tiles.

A tile of queries packs the query heads of one KV head with consecutive tokens of one row, so that keys and values are
read once for all of them. KV tiles begin at absolute positions that are multiples of their width, in whatever blocks
those lie. Softmax runs in powers of two, online (Milakov and Gimelshein 2018; FlashAttention-2, Dao 2023, algorithm 1).
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Everything about a launch that its kernels are compiled for; passed to them as one constexpr.

    Attributes:
        BLOCK_M: rows of a query tile, each a (token, head), >= 16, a power of two.
        BLOCK_N: tokens of a KV tile, >= 16, a power of two.
        GROUP: query heads of a KV head.
        HEADS: of them in one tile; GROUP unless that is more than BLOCK_M.
        K_DIM, V_DIM: widths of a head.
        K_BLOCK, V_BLOCK: those, padded to powers of two.
        BLOCK_SIZE: tokens of a cache block.
        NUM_KV_HEADS: of the cache.
        WINDOW: sliding window in tokens; 0: none.
        SOFTCAP, ALIBI, SINKS: whether there is one.
        QUANTIZED: whether the cache holds codes with a scale behind each row.
        MAX_ROWS: rows of the batch, padded to a power of two: each program searches all of them at once.
        UPCAST: make a dot's operands float32 first (interpreter only).
    """

    BLOCK_M: int
    BLOCK_N: int
    GROUP: int
    HEADS: int
    K_DIM: int
    V_DIM: int
    K_BLOCK: int
    V_BLOCK: int
    BLOCK_SIZE: int
    NUM_KV_HEADS: int
    WINDOW: int
    SOFTCAP: bool
    ALIBI: bool
    SINKS: bool
    QUANTIZED: bool
    MAX_ROWS: int
    UPCAST: bool

    @property
    def BLOCK_Q(self) -> int:
        """Tokens of a query tile."""
        return self.BLOCK_M // self.HEADS

    @property
    def HEAD_TILES(self) -> int:
        """Query tiles that the heads of one token take."""
        return self.NUM_KV_HEADS * -(-self.GROUP // self.HEADS)

    @property
    def HEAD_BLOCK(self) -> int:
        """Query heads, padded to a power of two."""
        return 1 << (self.NUM_KV_HEADS * self.GROUP - 1).bit_length()

    @property
    def KEEPS_QUERIES(self) -> bool:
        """Whether queries of codes keep their type, which the key codes are widened to; else both become float16.

        Either holds a code exactly. Tensor cores that take 64 rows read queries from shared memory, unless those were
        converted: then they pass through registers with each KV tile, through 64 of a thread's if heads are 256 wide.
        Float16 is the quicker one to widen to.
        """
        return self.BLOCK_M >= 64 and self.K_BLOCK > 128

    @property
    def K_WIDTH(self) -> int:
        """Elements of a row of the key cache, the scale included."""
        return self.K_DIM + 4 * self.QUANTIZED

    @property
    def V_WIDTH(self) -> int:
        return self.V_DIM + 4 * self.QUANTIZED


LOG2_E = tl.constexpr(1.4426950408889634)
# Probabilities times a value's scale go through float16: this keeps small scales out of its subnormals, and up to a
# magnitude of 228,000 (fp8) or 64,000 (int8) of a value out of its infinity. A power of two, so it divides out exactly.
VALUE_BOOST = tl.constexpr(128.0)


@triton.jit
def query_rows(S: tl.constexpr):
    """For each row of a query tile: its token within the tile, its head within the tile, and whether it is one."""
    BLOCK_M: tl.constexpr = S.BLOCK_M
    HEADS: tl.constexpr = S.HEADS
    rows = tl.arange(0, BLOCK_M)
    token = rows // HEADS
    return token, rows - token * HEADS, rows < S.BLOCK_Q * HEADS


@triton.jit
def load_queries(q_ptr, stride_token, stride_head, token, head, valid, S: tl.constexpr):
    """A query tile, `[BLOCK_M, K_BLOCK]`, of tokens and heads from `q_ptr` on; zeros where not valid."""
    K_BLOCK: tl.constexpr = S.K_BLOCK
    dim = tl.arange(0, K_BLOCK)
    pointers = q_ptr + token.to(tl.int64)[:, None] * stride_token + head[:, None] * stride_head + dim[None, :]
    q = tl.load(pointers, mask=valid[:, None] & (dim < S.K_DIM)[None, :], other=0.0)
    return q.to(tl.float16) if S.QUANTIZED and not S.KEEPS_QUERIES else q


@triton.jit
def _table_entries(table_ptr, tile, context_len, S: tl.constexpr):
    """The block ids of a tile's tokens; one scalar where the whole tile lies in one block.

    Tokens behind the context take its last block: the table may end there.
    """
    BLOCK_N: tl.constexpr = S.BLOCK_N
    if S.BLOCK_SIZE % S.BLOCK_N == 0:
        position = tile * BLOCK_N
    else:
        position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(table_ptr + tl.minimum(position, context_len - 1) // S.BLOCK_SIZE)


@triton.jit
def _load_rows(ptr, row, exists, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of the cache, `[BLOCK_N, DIM_BLOCK]`; zeros where none exists and in the padding of its width."""
    dim = tl.arange(0, DIM_BLOCK)
    pointers = ptr + row[:, None] + dim[None, :]
    if MASKED and DIM < DIM_BLOCK:
        x = tl.load(pointers, mask=exists[:, None] & (dim < DIM)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=exists[:, None], other=0.0)
    elif DIM < DIM_BLOCK:
        x = tl.load(pointers, mask=(dim < DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def _load_scales(ptr, row, exists, DIM: tl.constexpr, MASKED: tl.constexpr):
    """The float32 behind each row's `DIM` codes."""
    pointers = (ptr + row + DIM).to(tl.pointer_type(tl.float32), bitcast=True)
    if MASKED:
        scales = tl.load(pointers, mask=exists, other=0.0)
    else:
        scales = tl.load(pointers)
    return scales


@triton.jit
def attend(
    query,  # (queries [BLOCK_M, K_BLOCK], their positions [BLOCK_M], ALiBi's slopes [BLOCK_M], in powers of two)
    state,  # (largest logit [BLOCK_M], sum of exponentials [BLOCK_M], weighted values [BLOCK_M, V_BLOCK]), float32
    first_tile,
    end_tile,
    keys,  # (keys, values: pointers at this KV head of block 0; the row's block ids, context_len)
    scale,  # float32, in powers of two but for a soft cap
    softcap,
    MASKED: tl.constexpr,  # whether any query of the tile may not see any of these keys
    S: tl.constexpr,
):
    """Take the KV tiles `first_tile : end_tile` into the state, in order."""
    BLOCK_N: tl.constexpr = S.BLOCK_N
    K_STRIDE: tl.constexpr = S.NUM_KV_HEADS * S.BLOCK_SIZE * S.K_WIDTH
    V_STRIDE: tl.constexpr = S.NUM_KV_HEADS * S.BLOCK_SIZE * S.V_WIDTH
    SCALED_LATE: tl.constexpr = not (S.SOFTCAP or S.ALIBI or S.QUANTIZED)
    q, position, slope = query
    k_ptr, v_ptr, table_ptr, context_len = keys
    largest, total, acc = state
    n = tl.arange(0, BLOCK_N)
    # Block ids are fetched one tile ahead of what they point to: else the pipeline of loads, whose depth is what hides
    # the memory's latency, would spend half of its stages on waiting for them.
    block = _table_entries(table_ptr, first_tile, context_len, S)
    for tile in tl.range(first_tile, end_tile):
        key = tile * BLOCK_N + n
        if S.BLOCK_SIZE % S.BLOCK_N == 0:
            slot = tile * BLOCK_N % S.BLOCK_SIZE + n
        else:
            slot = key % S.BLOCK_SIZE
        exists = key < context_len
        k_row = block.to(tl.int64) * K_STRIDE + slot * S.K_WIDTH
        v_row = block.to(tl.int64) * V_STRIDE + slot * S.V_WIDTH
        block = _table_entries(table_ptr, tile + 1, context_len, S)
        # Values behind the context must be zeros, not what lies there: 0 times NaN is NaN.
        k = _load_rows(k_ptr, k_row, exists, S.K_DIM, S.K_BLOCK, MASKED)
        v = _load_rows(v_ptr, v_row, exists, S.V_DIM, S.V_BLOCK, MASKED)
        if S.QUANTIZED:
            k = k.to(q.dtype)
            v = v.to(tl.float16)
        if S.UPCAST:
            logits = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if S.QUANTIZED:
            logits *= _load_scales(k_ptr, k_row, exists, S.K_DIM, MASKED)[None, :]
        if not SCALED_LATE:
            logits *= scale
        if S.SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), which neither overflows nor makes NaN.
            powers = tl.exp2(logits * (2.0 * LOG2_E / softcap))
            logits = (softcap - 2.0 * softcap / (powers + 1.0)) * LOG2_E
        if S.ALIBI or S.WINDOW:
            distance = position[:, None] - key[None, :]
        if S.ALIBI:
            logits -= slope[:, None] * distance.to(tl.float32)
        if MASKED:
            if S.WINDOW:  # one comparison: a distance below 0 is, without its sign, beyond any window
                visible = distance.to(tl.uint32, bitcast=True) < S.WINDOW
            else:
                visible = key[None, :] <= position[:, None]
            logits = tl.where(visible, logits, float("-inf"))
        # Explicit fused products: a compiler that chose which of them to fuse could choose differently in the kernels
        # that share this loop, and a row's bits are promised to be the same in all of them.
        if SCALED_LATE:
            larger = tl.maximum(largest, tl.max(logits, 1) * scale)
            base = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
            p = tl.exp2(tl.fma(logits, tl.zeros_like(logits) + scale, tl.zeros_like(logits) - base[:, None]))
        else:
            larger = tl.maximum(largest, tl.max(logits, 1))
            base = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
            p = tl.exp2(logits - base[:, None])
        decay = tl.exp2(largest - base)
        largest = larger
        total = tl.fma(total, decay, tl.sum(p, 1))
        if S.QUANTIZED:
            p *= (_load_scales(v_ptr, v_row, exists, S.V_DIM, MASKED) * VALUE_BOOST)[None, :]
        acc *= decay[:, None]
        if S.UPCAST:
            acc = tl.dot(p, v.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return largest, total, acc


@triton.jit
def empty_state(S: tl.constexpr):
    """Of no keys at all."""
    BLOCK_M: tl.constexpr = S.BLOCK_M
    V_BLOCK: tl.constexpr = S.V_BLOCK
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return largest, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, V_BLOCK], tl.float32)


@triton.jit
def merge(ours, theirs):
    """The state of both states' keys; theirs come later. The values must be of rank 2, the others of rank 1."""
    largest, total, acc = ours
    other_largest, other_total, other_acc = theirs
    larger = tl.maximum(largest, other_largest)
    base = tl.where(larger == float("-inf"), 0.0, larger)
    keep = tl.exp2(largest - base)
    take = tl.exp2(other_largest - base)
    total = tl.fma(other_total, take, total * keep)
    acc = tl.fma(other_acc, tl.zeros_like(acc) + take[:, None], acc * keep[:, None])
    return larger, total, acc


@triton.jit
def finish(state, sink, S: tl.constexpr):
    """Attention's output, `[rows, V_BLOCK]` float32; zeros where no key was seen. `sink`: in powers of two."""
    largest, total, acc = state
    if S.SINKS:
        larger = tl.maximum(largest, sink)
        keep = tl.exp2(largest - larger)  # 0 where no key was seen
        total = tl.fma(total, keep, tl.exp2(sink - larger))
        acc = acc * keep[:, None]
    boost: tl.constexpr = 1.0 / 128.0 if S.QUANTIZED else 1.0
    return acc * (boost / tl.where(total == 0.0, 1.0, total))[:, None]
