"""Tokens in disguise: equal exactly where real ones share a prefix, and otherwise telling nothing."""

from __future__ import annotations

from array import array
from hashlib import blake2b

_TOKEN_BYTES = 4
_MASK = 0x7FFFFFFF

KEY_BYTES = 16


class TokenChain:
    """How far the tokens of one request have been hashed.

    Attributes:
        digest: of all full blocks, and of the block's first tokens once all but its last are known.
        block: tokens of the last block that `digest` does not cover, int32.
        position: tokens in the last block.
    """

    __slots__ = ("block", "digest", "position")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.block = b""
        self.position = 0


class TokenDisguise:
    """Replaces tokens by such as lead scheduler and allocator to the same decisions.

    Those look at tokens in whole blocks alone, and only to find the longest common prefix. So a disguised block is
    zeros but for its last two tokens, its marks: 31 bits each of a keyed hash of everything up to there, the one
    without and the other with the last token. Two disguised sequences begin with the same blocks if and only if the
    real ones do (a false match takes a collision in 62 bits, or in 31 between blocks that differ in their last token
    alone).

    Args:
        block_size: tokens in a block.
        key: random, and kept nowhere: without it no guess at a text can be verified.
    """

    def __init__(self, block_size: int, key: bytes) -> None:
        self._block_size = block_size
        self._key = key

    @property
    def key_id(self) -> bytes:
        """Tells two keys apart."""
        return blake2b(b"key id" + self._key, digest_size=8).digest()

    def salt(self, text: str) -> str:
        """The hash of a cache salt; the empty one stays empty."""
        if not text:
            return ""
        return blake2b(b"salt" + self._key + text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def begin(self, token_ids: bytes) -> tuple[TokenChain, bytes]:
        """Hash the tokens that a request comes with.

        Args:
            token_ids: int32.

        Returns:
            The chain to go on with, and the marks as int32, in order.
        """
        chain = TokenChain(bytes(16))
        size = self._block_size * _TOKEN_BYTES
        key, digest = self._key, chain.digest
        marks: array[int] = array("i")
        num_full = len(token_ids) // size
        for begin in range(0, num_full * size, size):
            last = begin + size - _TOKEN_BYTES
            if last > begin:
                digest = blake2b(key + digest + token_ids[begin:last], digest_size=16).digest()
                marks.append(int.from_bytes(digest[:4], "little") & _MASK)
            digest = blake2b(key + digest + token_ids[last : last + _TOKEN_BYTES], digest_size=16).digest()
            marks.append(int.from_bytes(digest[:4], "little") & _MASK)
        chain.digest = digest
        rest = token_ids[num_full * size :]
        chain.position = len(rest) // _TOKEN_BYTES
        chain.block = rest
        if chain.position and chain.position == self._block_size - 1:
            marks.append(self._absorb(chain))
        return chain, marks.tobytes()

    def extend(self, chain: TokenChain, token_id: int) -> int:
        """Hash one more token of a request; return what stands for it."""
        chain.block += token_id.to_bytes(_TOKEN_BYTES, "little", signed=True)
        position = chain.position = chain.position + 1
        if position < self._block_size - 1:
            return 0
        if position == self._block_size:
            chain.position = 0
        return self._absorb(chain)

    def _absorb(self, chain: TokenChain) -> int:
        digest = chain.digest = blake2b(self._key + chain.digest + chain.block, digest_size=16).digest()
        chain.block = b""
        return int.from_bytes(digest[:4], "little") & _MASK

    def disguise(self, token_ids: bytes) -> bytes:
        """All tokens of a sequence in disguise, int32."""
        return expand_marks(self.begin(token_ids)[1], len(token_ids) // _TOKEN_BYTES, self._block_size)


def num_mark_bytes(num_tokens: int, block_size: int) -> int:
    """Length of the marks of a sequence."""
    num_full, rest = divmod(num_tokens, block_size)
    per_block = min(block_size, 2)
    return _TOKEN_BYTES * (num_full * per_block + (rest > 0 and rest == block_size - 1))


def expand_marks(marks: bytes, num_tokens: int, block_size: int) -> bytes:
    """The disguised tokens, int32, that these marks belong to.

    Raises:
        ValueError: the marks are not those of so many tokens.
    """
    if len(marks) != num_mark_bytes(num_tokens, block_size):
        raise ValueError(f"{len(marks)} bytes of marks are not those of {num_tokens} tokens")
    per_block = _TOKEN_BYTES * min(block_size, 2)
    zeros = bytes(_TOKEN_BYTES * block_size - per_block)
    num_full, rest = divmod(num_tokens, block_size)
    parts = []
    for begin in range(0, num_full * per_block, per_block):
        parts.append(zeros)
        parts.append(marks[begin : begin + per_block])
    if rest:
        tail = marks[num_full * per_block :]
        parts.append(bytes(_TOKEN_BYTES * rest - len(tail)))
        parts.append(tail)
    return b"".join(parts)
