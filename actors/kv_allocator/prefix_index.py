"""Which block holds the KV of which token history."""

from __future__ import annotations

import struct

from ...messages.ids import BlockId

NO_BLOCK = BlockId(-1)

_RUN = 32  # blocks forgotten together; what does not end a node's blocks was compared in vain


class PrefixNode:
    """A run of full blocks behind each other, after the history that its ancestors spell.

    Attributes:
        parent: None for the top of the tree alone.
        key: this node's place among its parent's children: the tokens of its first block (a root's: salt and adapter).
        token_ids: int32, little endian; of its blocks, and perhaps of some that were taken off its end.
        block_ids: what holds their KV; `NO_BLOCK` where it was evicted while a block further on was not. A node
            without children ends with a block.
        num_missing: how many `NO_BLOCK` there are.
        children: by their keys.
    """

    __slots__ = ("block_ids", "children", "key", "num_missing", "parent", "token_ids")

    def __init__(self, parent: PrefixNode | None, key: bytes, token_ids: bytes, block_ids: list[BlockId]) -> None:
        self.parent = parent
        self.key = key
        self.token_ids = token_ids
        self.block_ids = block_ids
        self.num_missing = block_ids.count(NO_BLOCK)
        self.children: dict[bytes, PrefixNode] = {}

    def count_equal(self, token_ids: bytes, begin: int, block_bytes: int) -> int:
        """Return how many of its blocks `token_ids` spells from byte `begin` on; the first one is known to be equal."""
        own = self.token_ids
        num_bytes = len(self.block_ids) * block_bytes
        if len(own) > num_bytes:
            self.token_ids = own = own[:num_bytes]
        if token_ids.startswith(own, begin):
            return len(self.block_ids)
        least = 1
        most = min(len(self.block_ids), (len(token_ids) - begin) // block_bytes)
        while least < most:
            middle = (least + most + 1) // 2
            if token_ids.startswith(own[: middle * block_bytes], begin):
                least = middle
            else:
                most = middle - 1
        return least


class PrefixIndex:
    """Finds the blocks of a token history: a radix tree whose edges are runs of whole blocks.

    A block's place is its whole history: salt and adapter at the root, then all tokens up to its end. Python's hash
    tables lead from node to node by the next block's tokens and compare them, and the rest of a run is compared byte by
    byte; so nothing rests on a hash being unique. What is computed in one go is one node, so that finding it and adding
    it cost next to nothing a block.

    Source: the radix tree of SGLang (Zheng et al., NeurIPS 2024), section 3, in whole blocks.

    Args:
        num_blocks: block ids are below this, until there are more.
        block_bytes: bytes of one block's tokens.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._top = PrefixNode(None, b"", b"", [])
        self.node_of: list[PrefixNode | None] = [None] * num_blocks  # to be read: where a block is, if it is found

    def add_blocks(self, num_blocks: int) -> None:
        """Let there be so many more block ids."""
        self.node_of.extend([None] * num_blocks)

    def find(self, root: bytes, token_ids: bytes, max_blocks: int) -> list[BlockId]:
        """Return the blocks of the longest indexed prefix of `token_ids`, at most `max_blocks`."""
        size = self._block_bytes
        found: list[BlockId] = []
        node = self._top.children.get(root)
        while node is not None and len(found) < max_blocks:
            begin = len(found) * size
            node = node.children.get(token_ids[begin : begin + size])
            if node is None:
                break
            num_equal = min(node.count_equal(token_ids, begin, size), max_blocks - len(found))
            block_ids = node.block_ids[:num_equal]
            if node.num_missing and NO_BLOCK in block_ids:
                found += block_ids[: block_ids.index(NO_BLOCK)]
                break
            found += block_ids
            if num_equal < len(node.block_ids):
                break
        return found

    def add(self, root: bytes, token_ids: bytes, block_ids: list[BlockId]) -> None:
        """Index the last blocks of a history, each whose place is free.

        Args:
            token_ids: the whole history, in full blocks.
            block_ids: of its last blocks, at least one; nobody may find the ones before through this call.
        """
        size = self._block_bytes
        num_blocks = len(token_ids) // size
        first = num_blocks - len(block_ids)
        node = self._top.children.get(root)
        if node is None:
            node = self._top.children[root] = PrefixNode(self._top, root, b"", [])
        at = 0
        while at < num_blocks:
            child = node.children.get(token_ids[at * size : (at + 1) * size])
            if child is None:
                self._append(node, token_ids[at * size :], [NO_BLOCK] * (first - at) + block_ids[max(0, at - first) :])
                return
            num_equal = child.count_equal(token_ids, at * size, size)
            if child.num_missing:
                self._fill(child, at, at + num_equal, first, block_ids)
            at += num_equal
            if num_equal < len(child.block_ids) and at < num_blocks:
                self._split(child, num_equal)
            node = child

    def _append(self, node: PrefixNode, token_ids: bytes, block_ids: list[BlockId]) -> None:
        """Put blocks behind a node: into it if nothing else is behind it and it is no root, else into a new child."""
        if node.block_ids and not node.children:
            node.token_ids += token_ids
            node.block_ids += block_ids
            node.num_missing += block_ids.count(NO_BLOCK)
        else:
            key = token_ids[: self._block_bytes]
            child = node.children[key] = PrefixNode(node, key, token_ids, block_ids)
            node = child
        node_of = self.node_of
        for block_id in block_ids:
            if block_id != NO_BLOCK:
                node_of[block_id] = node

    def _fill(self, node: PrefixNode, at: int, end: int, first: int, block_ids: list[BlockId]) -> None:
        """Put blocks where a node, which begins with the history's block `at`, has none."""
        for i in range(max(at, first), end):
            if node.block_ids[i - at] == NO_BLOCK:
                block_id = node.block_ids[i - at] = block_ids[i - first]
                node.num_missing -= 1
                self.node_of[block_id] = node

    def _split(self, node: PrefixNode, num_kept: int) -> None:
        """Move all but the first blocks of a node to a new child, which takes over its children."""
        size = self._block_bytes
        rest = node.token_ids[num_kept * size :]
        lower = PrefixNode(node, rest[:size], rest, node.block_ids[num_kept:])
        lower.children = node.children
        for child in lower.children.values():
            child.parent = lower
        for block_id in lower.block_ids:
            if block_id != NO_BLOCK:
                self.node_of[block_id] = lower
        node.children = {lower.key: lower}
        node.token_ids = node.token_ids[: num_kept * size]
        del node.block_ids[num_kept:]
        node.num_missing -= lower.num_missing

    def forget(self, block_ids: list[BlockId]) -> None:
        """Take indexed blocks out of the index."""
        node_of = self.node_of
        at = 0
        while at < len(block_ids):
            node = node_of[block_ids[at]]
            assert node is not None
            held = node.block_ids
            # Blocks are evicted as they were released: the last one of a history first, then those before it.
            run = block_ids[at : at + min(_RUN, len(held))]
            if node.children or run != held[: -len(run) - 1 : -1]:
                run = run[:1]
            at += len(run)
            for block_id in run:
                node_of[block_id] = None
            if held[-1] == run[0] and not node.children:
                del held[-len(run) :]
                if not held or node.num_missing:
                    self._prune(node)
            else:
                held[held.index(run[0])] = NO_BLOCK
                node.num_missing += 1

    def _prune(self, node: PrefixNode) -> None:
        """Take off what no longer leads to a block: the missing end of a node without children, and empty nodes."""
        while node.parent is not None and not node.children:
            held = node.block_ids
            while held and held[-1] == NO_BLOCK:
                held.pop()
                node.num_missing -= 1
            if held:
                return
            del node.parent.children[node.key]
            node = node.parent

    def check(self) -> None:
        """Assert that the tree and `node_of` agree, and that every branch leads to a block."""
        num_found = 0
        nodes = list(self._top.children.values())
        while nodes:
            node = nodes.pop()
            is_root = node.parent is self._top
            assert is_root == (not node.block_ids)
            assert is_root or node.key == node.token_ids[: self._block_bytes]
            assert len(node.token_ids) >= len(node.block_ids) * self._block_bytes
            assert node.children or node.block_ids[-1] != NO_BLOCK
            assert node.num_missing == node.block_ids.count(NO_BLOCK)
            for block_id in node.block_ids:
                if block_id != NO_BLOCK:
                    num_found += 1
                    assert self.node_of[block_id] is node
            for key, child in node.children.items():
                assert child.key == key
                assert child.parent is node
            nodes.extend(node.children.values())
        assert num_found == sum(node is not None for node in self.node_of)


def root_of(cache_salt: str, adapter: str) -> bytes:
    """Return the root of all histories of this salt and adapter: no two pairs have the same."""
    salt = cache_salt.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(salt)) + salt + adapter.encode("utf-8", "surrogatepass")
