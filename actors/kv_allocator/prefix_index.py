"""Which block holds the KV of which token history."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

from ...messages.ids import BlockId

NO_BLOCK = BlockId(-1)


def chain_digest(data: bytes) -> bytes:
    """Return the 128-bit digest of one link of a hash chain.

    Neither keyed nor personalised: blake2b takes twice the time for it, and a collision does no harm here.
    """
    return hashlib.blake2b(data, digest_size=16).digest()


class PrefixLink:
    """One full block of tokens after a given history: a link of a hash chain.

    The history is the chain of parents up to a root, which stands for cache salt and adapter. A link outlives its place
    in the index as long as a longer chain or a running request refers to it.

    Attributes:
        digest: of the parent's digest and this block's tokens.
        token_ids: int32, little endian, exactly one block (salt and adapter for a root).
        parent: None for a root.
        block_id: the block that holds the KV while the link is indexed, else -1.
    """

    __slots__ = ("block_id", "digest", "parent", "token_ids")

    def __init__(
        self, digest: bytes, token_ids: bytes, parent: PrefixLink | None, block_id: BlockId = NO_BLOCK
    ) -> None:
        self.digest = digest
        self.token_ids = token_ids
        self.parent = parent
        self.block_id = block_id


def _is_same_history(left: PrefixLink | None, right: PrefixLink | None) -> bool:
    """Compare two chains token by token; they meet early unless a parent was evicted and computed again."""
    while left is not right:
        if left is None or right is None or left.token_ids != right.token_ids:
            return False
        left, right = left.parent, right.parent
    return True


class PrefixIndex:
    """Finds the block of a token history by its hash, and never by its hash alone.

    Digests say where to look; tokens and history are compared as well, so a collision costs a hit and never shares
    a wrong block. All operations take constant time per block.

    Args:
        digest: hash of one link; tests weaken it.
    """

    def __init__(self, digest: Callable[[bytes], bytes] = chain_digest) -> None:
        self._digest = digest
        self._links: dict[bytes, PrefixLink] = {}

    def __len__(self) -> int:
        return len(self._links)

    def root(self, cache_salt: str, adapter: str) -> PrefixLink:
        """Return the start of all chains of this salt and adapter."""
        salt = cache_salt.encode("utf-8", "surrogatepass")
        name = struct.pack("<Q", len(salt)) + salt + adapter.encode("utf-8", "surrogatepass")
        return PrefixLink(self._digest(name), name, None)

    def follow(self, parent: PrefixLink, token_ids: bytes) -> PrefixLink | None:
        """Return the indexed link of these tokens after `parent`, or None."""
        link = self._links.get(self._digest(parent.digest + token_ids))
        if link is None or link.token_ids != token_ids:
            return None
        if link.parent is not parent:
            if not _is_same_history(link.parent, parent):
                return None
            link.parent = parent  # the same history: let the next comparison meet at once
        return link

    def extend(self, parent: PrefixLink, token_ids: bytes, block_ids: list[BlockId]) -> list[PrefixLink]:
        """Return the links of these blocks of tokens, one behind the other after `parent`.

        Each of `block_ids` is indexed under its link if the place is free; else the link names the block that has it,
        or none if another history's hash collides.
        """
        digest, links = self._digest, self._links
        size = len(token_ids) // len(block_ids)
        begin = 0
        extended = []
        for block_id in block_ids:
            end = begin + size
            tokens = token_ids[begin:end]
            begin = end
            key = digest(parent.digest + tokens)
            link = links.get(key)
            if link is None:
                link = links[key] = PrefixLink(key, tokens, parent, block_id)
            elif link.token_ids != tokens or not _is_same_history(link.parent, parent):
                link = PrefixLink(key, tokens, parent)
            extended.append(link)
            parent = link
        return extended

    def forget(self, links: list[PrefixLink]) -> None:
        """Take indexed links out of the index."""
        for link in links:
            del self._links[link.digest]
            link.block_id = NO_BLOCK

    def check(self) -> None:
        """Assert that each link is indexed under its own digest and names a block of its own."""
        seen: dict[BlockId, bytes] = {}
        for digest, link in self._links.items():
            assert link.digest == digest
            assert link.block_id >= 0
            assert link.block_id not in seen
            seen[link.block_id] = digest
