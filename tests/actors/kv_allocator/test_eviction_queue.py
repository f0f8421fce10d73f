"""The queue against an ordered dictionary."""

from __future__ import annotations

import random
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.kv_allocator.eviction_queue import EvictionQueue
from octavo.messages.ids import BlockId

NUM_BLOCKS = 12


@given(st.integers(0, 2**32))
def test_blocks_leave_in_the_order_of_an_ordered_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    queue, model = EvictionQueue(), OrderedDict[BlockId, None]()
    for _ in range(300):
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                block_id = BlockId(rng.randrange(NUM_BLOCKS))
                if block_id in model:
                    queue.remove(block_id)
                    del model[block_id]
                queue.append(block_id)
                model[block_id] = None
            case 4 | 5 if model:
                block_id = rng.choice(list(model))
                queue.remove(block_id)
                del model[block_id]
            case 6:
                num_blocks = rng.randint(0, len(model))
                assert queue.pop(num_blocks) == [model.popitem(last=False)[0] for _ in range(num_blocks)]
            case 7 if rng.random() < 0.05:
                queue.clear()
                model.clear()
        assert list(queue) == list(model)
        assert len(queue) == len(model)
        queue.check()
    assert queue.pop(len(model)) == list(model)
    assert len(queue) == 0


def test_what_is_held_and_released_for_ever_takes_no_more_memory() -> None:
    queue = EvictionQueue()
    for i in range(10):
        queue.append(BlockId(i))
    for i in range(10_000):
        queue.remove(BlockId(i % 10))
        queue.append(BlockId(i % 10))
        assert len(queue._entries) <= 100
    assert queue.pop(10) == list(range(10))
