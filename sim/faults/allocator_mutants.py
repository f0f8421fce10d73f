"""Planted bugs of the KV allocator; see `mutant_table`."""

from __future__ import annotations

from .mutation import Mutant

_A = "actors/kv_allocator/"

ALLOCATOR_MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "a whole prompt may be found, its last token too",
        _A + "core.py",
        "(len(token_ids) - _TOKEN_BYTES) // self._block_bytes",
        "len(token_ids) // self._block_bytes",
        "vLLM's early prefix cache: a full hit leaves nothing to compute",
    ),
    Mutant(
        "partly computed blocks of a prompt are shared",
        _A + "core.py",
        "self._publish(request, request.token_ids, num_tokens // self._config.block_size)",
        "self._publish(request, request.token_ids, -(-num_tokens // self._config.block_size))",
        "vllm#53912: prefix cache with a partial block gives other tokens",
    ),
    Mutant(
        "a released table is cached one block too far",
        _A + "core.py",
        "num_full = min(len(token_ids) // self._block_bytes, len(request.block_table))",
        "num_full = min(-(-len(token_ids) // self._block_bytes), len(request.block_table))",
        "vllm#39146: a block in the cache whose end was never written",
    ),
    Mutant(
        "blocks are handed out twice within a step",
        _A + "core.py",
        "at += num_blocks",
        "at += 1",
        "I3: one block in two block tables",
    ),
    Mutant(
        "salts do not separate",
        _A + "core.py",
        "root = root_of(match.cache_salt, match.adapter)",
        'root = root_of("", match.adapter)',
        "CVE-2025-46570 class: one tenant's prompt is found by another's",
    ),
    Mutant(
        "tokens are not compared, only counted",
        _A + "prefix_index.py",
        "min(node.count_equal(token_ids, begin, size), max_blocks - len(found))",
        "min(len(node.block_ids), max_blocks - len(found))",
        "F-59: a hash collision in the prefix cache shares a wrong block",
    ),
    Mutant(
        "an evicted block can still be found",
        _A + "block_pool.py",
        "self._index.forget(evicted)",
        "self._index.forget([])",
        "vllm#50702: a block is reused while the prefix index still names it",
    ),
    Mutant(
        "a cached block that is held again can be evicted",
        _A + "block_pool.py",
        "                self._cached.remove(block_id)\n",
        "                pass\n",
        "I3: a block is held and evictable at once",
    ),
    Mutant(
        "held blocks are not told of",
        _A + "block_pool.py",
        "                num_taken += 1",
        "                num_taken += 0",
        "I9: two owners count the same blocks differently",
    ),
    Mutant(
        "a shared block is freed by the first who leaves",
        _A + "block_pool.py",
        "            if num_left == 0:",
        "            if num_left <= 1:",
        "double free: vllm#49146, aborts through shared blocks",
    ),
)
