"""Which replicas have seen which beginnings of prompts."""

from __future__ import annotations

from collections import OrderedDict


class PrefixMap:
    """An approximate picture of the replicas' prefix caches, made from what was sent to them.

    A chunk is known by its parent's number and its tokens, so equal chunks behind different histories differ. What a
    replica evicts is not heard of here; the least recently used chunks are forgotten instead.

    Source: the cache-aware router of SGLang v0.4 keeps such a picture as a radix tree.

    Args:
        chunk_tokens: tokens of a chunk.
        max_chunks: chunks remembered.
    """

    def __init__(self, chunk_tokens: int, max_chunks: int) -> None:
        self._chunk_bytes = 4 * chunk_tokens
        self._chunk_tokens = chunk_tokens
        self._max_chunks = max_chunks
        self._chunks: OrderedDict[tuple[int, bytes], tuple[int, dict[int, None]]] = OrderedDict()
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._chunks)

    def match(self, token_ids: bytes, salt: bytes) -> dict[int, int]:
        """For each replica that has seen a beginning of this prompt, how many tokens of it (whole chunks).

        Args:
            token_ids: int32, little endian.
            salt: cache salt (and adapter): prompts of different salts share nothing.
        """
        size, chunks = self._chunk_bytes, self._chunks
        found: dict[int, int] = {}
        parent = 0
        for begin in range(0, len(token_ids) - size + 1, size):
            entry = chunks.get((parent, self._key(token_ids, begin, salt)))
            if entry is None:
                break
            parent, replicas = entry
            end = begin // 4 + self._chunk_tokens
            for replica in replicas:  # who has seen a chunk has seen those before it
                found[replica] = end
        return found

    def add(self, token_ids: bytes, salt: bytes, replica: int) -> None:
        """Remember that a replica is about to compute this prompt."""
        size, chunks = self._chunk_bytes, self._chunks
        parent = 0
        for begin in range(0, len(token_ids) - size + 1, size):
            key = (parent, self._key(token_ids, begin, salt))
            entry = chunks.get(key)
            if entry is None:
                entry = chunks[key] = (self._next_number, {replica: None})
                self._next_number += 1
            else:
                chunks.move_to_end(key)
                entry[1][replica] = None
            parent = entry[0]
        while len(chunks) > self._max_chunks:
            chunks.popitem(last=False)

    def forget(self, replica: int) -> None:
        """A replica lost its cache."""
        for key in [key for key, (_, replicas) in self._chunks.items() if replica in replicas]:
            replicas = self._chunks[key][1]
            del replicas[replica]

    def _key(self, token_ids: bytes, begin: int, salt: bytes) -> bytes:
        tokens = token_ids[begin : begin + self._chunk_bytes]
        return salt + tokens if begin == 0 else tokens
