"""Which schedule and which tile sizes a batch's attention is launched with, and why.

Nothing here reads a tensor: a captured graph replays one launch for batches that are not known yet.
"""

from __future__ import annotations

import dataclasses

# Deterministic mode cuts a row's keys at multiples of this. Small enough that a context of 8k fills a third of the GPU
# with 8 KV heads and one row, large enough that states kept (2 KiB a head) are 1 % of what is read (512 B a token).
CHUNK_TOKENS = 512
# States of chunks may take this much; a batch that needs more has rows enough not to be split.
MAX_CHUNK_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How one run of rows is launched.

    Attributes:
        by_share: equal shares of all KV tiles; else a program for each query tile.
        block_m, block_n: rows of a query tile, tokens of a KV tile.
        num_warps, num_stages: Triton's options.
        programs_per_processor: of a launch by share.
        chunk: tokens at whose multiples keys are cut; 0: nowhere.
        split: whether chunks are programs of their own.
    """

    by_share: bool
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_processor: int = 0
    chunk: int = 0
    split: bool = False

    @property
    def fuses(self) -> bool:
        """Whether the compiler may fuse products with sums.

        Not where bits are promised: keys that some of a tile's queries may not see go through code with a mask in it,
        which keeps a logit's scaling and what is subtracted from it apart, where code without one fuses them. Which of
        the two a query's keys go through is up to its neighbours.
        """
        return not self.chunk


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is known of a run of rows before its launch.

    Attributes:
        num_rows, num_tokens, max_query_len, max_context_len: of these rows; upper bounds.
        group: query heads of a KV head.
        num_kv_heads: of the cache.
        head_dim: the wider one of keys and values, padded to a power of two.
        element_bytes: of a query.
        cache_bytes: of a code or number in the cache.
        block_size: tokens of a cache block.
        num_processors: of the GPU.
    """

    num_rows: int
    num_tokens: int
    max_query_len: int
    max_context_len: int
    group: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    cache_bytes: int
    block_size: int
    num_processors: int

    @property
    def is_quantized(self) -> bool:
        """Whether the cache holds codes, which are widened before they are multiplied."""
        return self.cache_bytes == 1


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def choose_schedule(problem: Problem, *, batch_invariant: bool) -> Schedule:
    """The launch for a run of rows."""
    if batch_invariant:
        return _invariant(problem)
    query_rows = problem.max_query_len * problem.group  # of a row's whole query, a KV head
    if query_rows <= 64:
        return _by_share(problem, max(16, _power_of_two(query_rows)))
    tiles = _by_tile(problem)
    tokens_of_tile = max(1, tiles.block_m // problem.group)
    num_programs = problem.num_kv_heads * (problem.num_tokens // tokens_of_tile + problem.num_rows)
    # A short chunk of a long prompt: its query tiles are fewer than the processors, its keys many. (A prompt's first
    # chunk is not: shares count what the causal mask hides, and half of them would be idle.)
    if num_programs < problem.num_processors and problem.max_context_len >= 4 * problem.max_query_len:
        return _by_share(problem, min(tiles.block_m, 64))
    return tiles


def _by_share(problem: Problem, block_m: int) -> Schedule:
    """Decodes: bound by memory, so all that counts is how many bytes are on their way.

    4.3 TB/s at about 0.8 us of latency are 26 KiB in flight for each of 132 processors. A tile of 64 tokens, 128 wide,
    is 32 KiB of keys and values in bfloat16. Of four stages three are buffers, so two tiles are on their way while one
    is worked on; two programs a processor (102 KiB of shared memory leave room for no more) make that four, a margin of
    five, and let one load while the other is in its softmax. One-byte caches have as many tokens in a tile, half of the
    bytes, and the same margin over their latency.
    """
    if problem.element_bytes == 4:  # products by fused multiply-add: registers, not memory, bound the tile
        return Schedule(True, 16, 16, 4, 3, programs_per_processor=2)
    block_n = min(128, max(16, 8192 // problem.head_dim))
    if block_m <= 16:
        return Schedule(True, block_m, block_n, 4, 4, programs_per_processor=2)
    # More queries than most decodes have: their logits and outputs take the registers of a stage, or of some keys.
    if problem.head_dim > 128:
        if block_m <= 32:
            return Schedule(True, block_m, block_n, 4, 3, programs_per_processor=2)
        if problem.is_quantized:  # whose codes are widened in registers: one program, of twice as many threads
            return Schedule(True, block_m, block_n, 8, 3, programs_per_processor=1)
        return Schedule(True, block_m, 16, 4, 4, programs_per_processor=2)
    if block_m <= 32:
        num_stages = 3 if problem.is_quantized and problem.head_dim <= 64 else 4
        return Schedule(True, block_m, block_n // 2, 4, num_stages, programs_per_processor=2)
    if problem.is_quantized:
        return Schedule(True, block_m, min(64, block_n), 4, 3, programs_per_processor=2)
    return Schedule(True, block_m, block_n, 4, 3, programs_per_processor=2)


def _by_tile(problem: Problem) -> Schedule:
    """Prefills: bound by the tensor cores, so query tiles as high as registers allow.

    Two warp groups of 64 rows each (wgmma's height). With 128 wide heads a thread holds 64 registers of output, and 32
    or 64 of logits. The longer KV tile has fewer barriers and rescalings an operation, but fits without spilling only
    where a whole tile lies in one block, so that addresses are the same for all of its rows. Codes take registers of
    their own while they are widened.
    """
    if problem.element_bytes == 4:
        return Schedule(False, 16, 16, 4, 3)
    if problem.head_dim > 128:
        return Schedule(False, 128, 16 if problem.is_quantized else 32, 8, 3)
    if problem.head_dim <= 64:
        return Schedule(False, 128, 64 if problem.is_quantized else 128, 8, 3)
    if not problem.is_quantized and problem.block_size % 128 == 0:
        return Schedule(False, 128, 128, 8, 2)
    return Schedule(False, 128, 64, 8, 3)


def _invariant(problem: Problem) -> Schedule:
    """Tiles by the model's shape alone, so that a query's bits depend on nothing but it and its keys.

    Whether chunks are split depends on the batch, but changes no bit: they are merged in the same order and by the same
    operations. Where they are not split, a thread holds two states, so tiles are half as high as else, and narrower
    where codes are widened.
    """
    if problem.element_bytes == 4:
        schedule = Schedule(False, 16, 16, 4, 3, chunk=CHUNK_TOKENS)
    elif problem.head_dim <= 128:
        block_n = 32 if problem.is_quantized and problem.head_dim > 64 else 64
        schedule = Schedule(False, 64, block_n, 8, 3, chunk=CHUNK_TOKENS)
    else:
        schedule = Schedule(False, 64, 16 if problem.is_quantized else 32, 8, 3, chunk=CHUNK_TOKENS)
    tokens_of_tile = max(1, schedule.block_m // problem.group)
    num_programs = problem.num_kv_heads * (problem.num_tokens // tokens_of_tile + problem.num_rows)
    max_chunks = -(-problem.max_context_len // CHUNK_TOKENS)
    heads = problem.group * problem.num_kv_heads
    state_bytes = problem.num_tokens * heads * max_chunks * (problem.head_dim + 2) * 4
    split = max_chunks > 1 and num_programs < 2 * problem.num_processors and state_bytes <= MAX_CHUNK_BYTES
    return dataclasses.replace(schedule, split=split)
