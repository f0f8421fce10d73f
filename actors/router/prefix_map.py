"""Which replicas have seen which beginnings of prompts."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Final, NamedTuple

KEY_BYTES: Final = 16
"""Of a chunk's digest: among 2**20 chunks two are taken for one with a probability of 2**-89."""


class _Chunk(NamedTuple):
    """A chunk that is remembered.

    Attributes:
        number: of this chunk, never given again.
        seen_by: replica and its generation then, one after the other.
    """

    number: int
    seen_by: tuple[int, ...]


class PrefixMap:
    """An approximate picture of the replicas' prefix caches, made from what was sent to them.

    A chunk is known by its parent's number and its tokens, so equal chunks behind different histories differ. What a
    replica evicts is not heard of here; the least recently used chunks are forgotten instead. A replica that lost its
    cache is of the next generation: what its earlier ones have seen counts no more, and goes when it is come across.

    Source: the cache-aware router of SGLang v0.4 keeps such a picture as a radix tree.

    Args:
        num_replicas: numbered from 0.
        chunk_tokens: tokens of a chunk.
        max_chunks: chunks remembered, of some 350 bytes each.
    """

    def __init__(self, num_replicas: int, chunk_tokens: int, max_chunks: int) -> None:
        self._chunk_bytes = 4 * chunk_tokens
        self._chunk_tokens = chunk_tokens
        self._max_chunks = max_chunks
        self._generations = [0] * num_replicas
        self._chunks: OrderedDict[bytes, _Chunk] = OrderedDict()
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._chunks)

    def match(self, token_ids: bytes, salt: bytes) -> dict[int, int]:
        """For each replica that has seen a beginning of this prompt, how many tokens of it (whole chunks).

        Args:
            token_ids: int32, little endian.
            salt: cache salt (and adapter): prompts of different salts share nothing.
        """
        size, chunks, generations = self._chunk_bytes, self._chunks, self._generations
        found: dict[int, int] = {}
        parent = 0
        for begin in range(0, len(token_ids) - size + 1, size):
            key = self._key(parent, token_ids, begin, salt)
            chunk = chunks.get(key)
            if chunk is None:
                break
            parent, seen_by = chunk
            end = begin // 4 + self._chunk_tokens
            is_seen = False
            for replica, generation in zip(seen_by[::2], seen_by[1::2], strict=True):
                if generation == generations[replica]:  # who has seen a chunk has seen those before it
                    found[replica] = end
                    is_seen = True
            if not is_seen:
                del chunks[key]
                break
        return found

    def add(self, token_ids: bytes, salt: bytes, replica: int) -> None:
        """Remember that a replica is about to compute this prompt."""
        size, chunks, generations = self._chunk_bytes, self._chunks, self._generations
        parent = 0
        for begin in range(0, len(token_ids) - size + 1, size):
            key = self._key(parent, token_ids, begin, salt)
            chunk = chunks.get(key)
            if chunk is None:
                chunk = chunks[key] = _Chunk(self._next_number, (replica, generations[replica]))
                self._next_number += 1
            else:
                chunks.move_to_end(key)
                if not self._has_seen(replica, chunk.seen_by):
                    chunks[key] = _Chunk(chunk.number, (*self._current(chunk.seen_by), replica, generations[replica]))
            parent = chunk.number
        while len(chunks) > self._max_chunks:
            chunks.popitem(last=False)

    def forget(self, replica: int) -> None:
        """A replica lost its cache."""
        self._generations[replica] += 1

    def _has_seen(self, replica: int, seen_by: tuple[int, ...]) -> bool:
        generation = self._generations[replica]
        return any(pair == (replica, generation) for pair in zip(seen_by[::2], seen_by[1::2], strict=True))

    def _current(self, seen_by: tuple[int, ...]) -> list[int]:
        pairs = zip(seen_by[::2], seen_by[1::2], strict=True)
        return [number for pair in pairs if pair[1] == self._generations[pair[0]] for number in pair]

    def _key(self, parent: int, token_ids: bytes, begin: int, salt: bytes) -> bytes:
        digest = blake2b(parent.to_bytes(8, "little"), digest_size=KEY_BYTES)
        if begin == 0:
            digest.update(salt)
        digest.update(token_ids[begin : begin + self._chunk_bytes])
        return digest.digest()
