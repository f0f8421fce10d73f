"""The index against a dictionary of whole histories."""

from __future__ import annotations

import random

import pytest
from core_ring import pack
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.kv_allocator.prefix_index import PrefixIndex, root_of
from octavo.messages.ids import BlockId

NUM_BLOCKS = 40


class History:
    """The index, and beside it each indexed block's whole history, token by token."""

    def __init__(self, rng: random.Random, block_size: int) -> None:
        self.rng = rng
        self.block_size = block_size
        self.index = PrefixIndex(NUM_BLOCKS, 4 * block_size)
        self.block_at: dict[tuple[bytes, tuple[int, ...]], int] = {}
        self.unused = list(range(NUM_BLOCKS))
        self.roots = [root_of("", ""), root_of("a", "")]

    def random_history(self) -> tuple[bytes, list[int]]:
        """Known tokens followed by a few new ones, of an alphabet of two, so that histories often fork."""
        root, tokens = self.rng.choice(self.roots), []
        if self.block_at and self.rng.random() < 0.7:
            root, known = self.rng.choice(list(self.block_at))
            tokens = list(known)[: self.rng.randrange(len(known) + 1)]
        return root, tokens + [self.rng.randrange(2) for _ in range(self.rng.randrange(1, 4 * self.block_size))]

    def add(self) -> None:
        root, tokens = self.random_history()
        num_blocks = len(tokens) // self.block_size
        num_new = min(self.rng.randint(0, num_blocks), len(self.unused))
        if not num_new:
            return
        self.rng.shuffle(self.unused)
        block_ids, self.unused = self.unused[:num_new], self.unused[num_new:]
        self.index.add(root, pack(tokens[: num_blocks * self.block_size]), [BlockId(i) for i in block_ids])
        for i, block_id in enumerate(block_ids, num_blocks - num_new + 1):
            if self.block_at.setdefault((root, tuple(tokens[: i * self.block_size])), block_id) != block_id:
                self.unused.append(block_id)

    def forget(self) -> None:
        places = self.rng.sample(list(self.block_at), min(len(self.block_at), self.rng.randrange(1, 6)))
        block_ids = [self.block_at.pop(place) for place in places]
        self.index.forget([BlockId(i) for i in block_ids])
        self.unused += block_ids

    def forget_end(self) -> None:
        """What eviction asks for: the last blocks of a history, the last one first; then some of another."""
        block_ids = []
        for _ in range(self.rng.randint(1, 2)):
            if self.block_at:
                root, tokens = self.rng.choice(list(self.block_at))
                num_left = self.rng.choice([0, 0, self.rng.randrange(len(tokens) // self.block_size)])
                ends = [tokens[: i * self.block_size] for i in range(len(tokens) // self.block_size, num_left, -1)]
                block_ids += [self.block_at.pop((root, end)) for end in ends if (root, end) in self.block_at]
        self.index.forget([BlockId(i) for i in block_ids])
        self.unused += block_ids

    def compare(self) -> None:
        self.index.check()
        indexed = {i for i, node in enumerate(self.index.node_of) if node is not None}
        assert indexed == set(self.block_at.values())
        root, tokens = self.random_history()
        max_blocks = self.rng.randint(0, len(tokens) // self.block_size)
        expected = []
        while len(expected) < max_blocks:
            block_id = self.block_at.get((root, tuple(tokens[: (len(expected) + 1) * self.block_size])))
            if block_id is None:
                break
            expected.append(block_id)
        assert self.index.find(root, pack(tokens), max_blocks) == expected


@given(st.integers(0, 2**32), st.integers(1, 3))
def test_f_59_it_finds_exactly_the_blocks_of_equal_histories(seed: int, block_size: int) -> None:
    history = History(random.Random(seed), block_size)
    for _ in range(80):
        history.rng.choice([history.add, history.add, history.forget, history.forget_end])()
        history.compare()
    history.index.forget([BlockId(i) for i in history.block_at.values()])
    history.block_at.clear()
    history.compare()
    assert history.index.find(history.roots[0], pack([0] * 9), 9 // block_size) == []


@pytest.mark.parametrize("num_forgotten", [1, 31, 32, 33, 64, 99, 100])
def test_a_long_history_loses_its_end(num_forgotten: int) -> None:
    index, root = PrefixIndex(100, 4), root_of("", "")
    tokens = list(range(100))
    index.add(root, pack(tokens), [BlockId(i) for i in tokens])
    index.forget([BlockId(i) for i in reversed(tokens[100 - num_forgotten :])])
    index.check()
    assert index.find(root, pack(tokens), 100) == tokens[: 100 - num_forgotten]


def test_nothing_is_kept_of_a_history_without_blocks() -> None:
    index = PrefixIndex(4, 4)
    index.add(root_of("salt", ""), pack([1, 2, 3]), [BlockId(0), BlockId(1), BlockId(2)])
    index.add(root_of("salt", ""), pack([1, 2, 4]), [BlockId(3)])
    for block_id in (0, 1, 3, 2):
        index.forget([BlockId(block_id)])
        index.check()
    assert not index._top.children


@pytest.mark.parametrize("pair", [("b", "a"), ("", "ab"), ("ab", ""), ("a", "")])
def test_each_pair_of_salt_and_adapter_has_a_root_of_its_own(pair: tuple[str, str]) -> None:
    assert root_of(*pair) != root_of("a", "b")
