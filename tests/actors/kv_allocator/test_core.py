"""The allocator alone: identities, sharing, eviction."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from core_ring import pack
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.kv_allocator.core import KVAllocatorCore
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.kv import BlocksFreed, MatchPrefix, PrefixMatched, ReleaseMatch, ResetBlocks, ResetPrefixCache
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import ExecuteStep, PlanStep, StartRequest

E0 = Epoch(0)
PARAMS = SamplingParams()


class Driver:
    """Starts and releases whole requests on an allocator, a step each."""

    def __init__(self, num_blocks: int = 16, block_size: int = 4, **options) -> None:
        caching = options.pop("enable_prefix_caching", True)
        self.block_size = block_size
        self.core = KVAllocatorCore(
            AllocatorConfig(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=caching), **options
        )
        self.step_id = 0

    def match(self, request_id: int, tokens: list[int], **fields) -> PrefixMatched:
        (answer,) = self.core.handle(MatchPrefix(E0, RequestId(request_id), pack(tokens), **fields), 0)
        assert isinstance(answer, PrefixMatched)
        self.core.check()
        return answer

    def plan(self, **fields) -> list:
        plan = PlanStep(E0, StepId(self.step_id), fields.pop("request_ids", ()), fields.pop("num_tokens", ()), **fields)
        self.step_id += 1
        answers = self.core.handle(plan, 0)
        self.core.check()
        return answers

    def start(self, request_id: int, tokens: list[int], cached: int, computed: int | None = None) -> ExecuteStep:
        num_blocks = -(-len(tokens) // self.block_size) - cached // self.block_size
        (step,) = self.plan(
            request_ids=(request_id,),
            num_tokens=(len(tokens) - cached,),
            start=(StartRequest(RequestId(request_id), pack(tokens), len(tokens), cached, PARAMS),),
            grow=((request_id, num_blocks),),
            computed_prompt_tokens=((request_id, len(tokens) if computed is None else computed),),
        )
        return step

    def run(self, request_id: int, tokens: list[int], **fields) -> tuple[int, ...]:
        """Match and compute a prompt; return its block table."""
        matched = self.match(request_id, tokens, **fields)
        step = self.start(request_id, tokens, matched.num_cached_tokens)
        return step.block_tables[0] + step.append_blocks[0][1]

    def release(self, request_id: int, tokens: list[int]) -> BlocksFreed:
        step, freed = self.plan(release=((request_id, pack(tokens)),))
        assert step.drop == (request_id,)
        return freed


TOKENS = list(range(100, 130))


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:8])
    assert driver.match(2, TOKENS[:8]).num_cached_tokens == 4
    assert driver.match(3, TOKENS[:9]).num_cached_tokens == 8
    assert driver.match(4, TOKENS[:4]).num_cached_tokens == 0


def test_a_prompt_is_shared_from_the_step_that_computes_it() -> None:
    driver = Driver()
    table = driver.run(1, TOKENS[:10])
    assert driver.match(2, TOKENS[:10]) == PrefixMatched(E0, RequestId(2), 8, 0)  # held already: nothing is taken
    step = driver.start(2, TOKENS[:10], 8)
    assert step.block_tables == (table[:2],)
    assert driver.release(1, TOKENS[:10]).num_blocks == 1  # the partly filled one
    assert driver.release(2, TOKENS[:10]) == BlocksFreed(E0, 3, 2, 1)


def test_outputs_are_findable_after_release() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:6])
    driver.plan(grow=((1, 1),))
    driver.release(1, TOKENS[:12])
    assert driver.match(2, TOKENS[:20]).num_cached_tokens == 12


def test_released_without_tokens_its_blocks_are_not_found() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:9])
    assert driver.release(1, []) == BlocksFreed(E0, 3, 0, 1)
    assert driver.match(2, TOKENS[:20]).num_cached_tokens == 0


def test_a_failed_request_leaves_the_prefix_that_it_found() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:9])
    driver.run(2, TOKENS[:17])
    driver.release(2, [])
    assert driver.match(3, TOKENS[:20]).num_cached_tokens == 8


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({"cache_salt": "a"}, {}),
        ({"adapter": "a"}, {}),
        ({"cache_salt": "a"}, {"adapter": "a"}),
        ({"cache_salt": "ab", "adapter": "c"}, {"cache_salt": "a", "adapter": "bc"}),
    ],
)
def test_other_salts_and_adapters_never_hit(first: dict, second: dict) -> None:
    driver = Driver()
    driver.run(1, TOKENS[:9], **first)
    assert driver.match(2, TOKENS[:9], **second).num_cached_tokens == 0
    assert driver.match(3, TOKENS[:9], **first).num_cached_tokens == 8


def test_skip_cache_pins_nothing_but_what_it_computes_is_found() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:9])
    assert driver.match(2, TOKENS[:9], skip_cache=True).num_cached_tokens == 0


def test_a_fork_shares_without_the_prefix_cache() -> None:
    driver = Driver(enable_prefix_caching=False)
    table = driver.run(1, TOKENS[:10])
    assert driver.match(2, TOKENS[:10]).num_cached_tokens == 0
    assert driver.match(3, TOKENS[:10], fork_of=RequestId(1)).num_cached_tokens == 8
    assert driver.start(3, TOKENS[:10], 8).block_tables == (table[:2],)
    assert driver.match(4, [*TOKENS[:5], 7, 7, 7, 7], fork_of=RequestId(1)).num_cached_tokens == 4
    assert driver.release(1, TOKENS[:10]) == BlocksFreed(E0, 1, 0, 1)


def test_a_fork_shares_only_what_the_leader_has_computed() -> None:
    driver = Driver(enable_prefix_caching=False)
    driver.match(1, TOKENS[:12])
    driver.plan(
        start=(StartRequest(RequestId(1), pack(TOKENS[:12]), 12, 0, PARAMS),),
        grow=((1, 2),),
        computed_prompt_tokens=((1, 6),),
    )
    assert driver.match(2, TOKENS[:12], fork_of=RequestId(1)).num_cached_tokens == 4


def test_free_blocks_are_used_before_cached_ones_are_evicted() -> None:
    driver = Driver(num_blocks=6)
    driver.run(1, TOKENS[:8])
    driver.release(1, TOKENS[:8])
    driver.run(2, list(range(16)))
    assert driver.core.stats().num_evicted == 0
    assert driver.match(3, TOKENS[:9]).num_cached_tokens == 8


def test_of_a_released_prefix_the_end_is_evicted_first() -> None:
    driver = Driver(num_blocks=4)
    driver.run(1, TOKENS[:16])
    driver.release(1, TOKENS[:16])
    driver.run(2, [1, 2, 3, 4])
    assert driver.match(3, TOKENS[:17]).num_cached_tokens == 12


@given(st.integers(0, 2**32), st.integers(2, 8))
def test_eviction_follows_a_reference_model_of_least_recent_use(seed: int, num_blocks: int) -> None:
    rng = random.Random(seed)
    driver = Driver(num_blocks=num_blocks, block_size=1)
    cached: OrderedDict[int, None] = OrderedDict()  # one-token prompts: each caches one block
    for request_id in range(40):
        token = rng.randrange(num_blocks + 3)
        matched = driver.match(request_id, [token, 999])
        assert matched.num_cached_tokens == (token in cached)
        assert matched.num_blocks_taken == (token in cached)
        cached.pop(token, None)
        driver.start(request_id, [token, 999], matched.num_cached_tokens, computed=1)
        while len(cached) + 2 > num_blocks:
            cached.popitem(last=False)
        driver.release(request_id, [token])  # the last token's block is free at once
        cached[token] = None
        assert driver.core.stats().num_cached == len(cached)


def test_equal_tokens_after_another_history_are_another_block() -> None:
    driver = Driver(block_size=1)
    driver.run(1, [5, 6, 7])
    assert driver.match(2, [4, 6, 7]).num_cached_tokens == 0
    assert driver.match(3, [5, 6, 7]).num_cached_tokens == 2
    driver.run(4, [4, 6, 7])
    assert driver.match(5, [4, 6, 7]).num_cached_tokens == 2
    assert driver.match(6, [6, 7, 7]).num_cached_tokens == 0


def test_a_chain_whose_start_was_evicted_and_computed_again_is_found_whole() -> None:
    driver = Driver(num_blocks=6, block_size=1)
    driver.run(1, [1, 2, 3])  # 1 and 2 are cached under request 1
    driver.run(2, [1, 2, 3])
    driver.release(1, [1, 2])
    driver.release(2, [1, 2])
    assert driver.match(3, [1, 2, 9]).num_cached_tokens == 2


def test_resetting_the_prefix_cache_forgets_also_what_running_requests_will_release() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:9])
    driver.run(2, TOKENS[9:20])
    driver.release(2, TOKENS[9:20])
    driver.core.handle(ResetPrefixCache(), 0)
    driver.core.check()
    assert driver.core.stats().num_cached == 0
    assert driver.match(3, TOKENS[:9]).num_cached_tokens == 0
    driver.run(4, TOKENS[:9])
    driver.release(1, TOKENS[:12])
    assert driver.match(5, TOKENS[:13]).num_cached_tokens == 8  # computed after the reset, and not a block more


def test_a_released_match_gives_back_what_it_pinned() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:9])
    driver.release(1, TOKENS[:9])
    assert driver.match(2, TOKENS[:9]).num_blocks_taken == 2
    assert driver.core.stats().num_held == 2
    assert driver.core.handle(ReleaseMatch(E0, RequestId(2)), 0) == [BlocksFreed(E0, 2, 2, 1)]
    assert driver.core.stats().num_held == 0


def test_after_a_reset_nothing_is_held_or_found_and_older_messages_are_dropped() -> None:
    driver = Driver()
    driver.run(1, TOKENS[:9])
    assert driver.core.handle(ResetBlocks(Epoch(1)), 0) == []
    driver.core.check()
    stats = driver.core.stats()
    assert (stats.num_held, stats.num_cached, stats.num_free) == (0, 0, 16)
    assert driver.core.handle(MatchPrefix(E0, RequestId(2), pack(TOKENS)), 0) == []
    assert driver.core.handle(PlanStep(E0, StepId(5), (), (), release=((RequestId(1), b""),)), 0) == []
    assert driver.core.handle(ReleaseMatch(E0, RequestId(2)), 0) == []
    assert driver.core.handle(ResetBlocks(E0), 0) == []
    assert driver.core.stats().num_dropped_messages == 4
    (answer,) = driver.core.handle(MatchPrefix(Epoch(1), RequestId(3), pack(TOKENS)), 0)
    assert answer.num_cached_tokens == 0


def test_asking_for_more_blocks_than_exist_is_a_broken_invariant() -> None:
    driver = Driver(num_blocks=2)
    with pytest.raises(AssertionError, match="promised"):
        driver.run(1, TOKENS[:12])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (4, 257)])
def test_a_config_out_of_range_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        AllocatorConfig(num_blocks=num_blocks, block_size=block_size)


def test_a_fork_of_a_request_with_another_salt_shares_nothing() -> None:
    core = KVAllocatorCore(AllocatorConfig(num_blocks=16, block_size=2))
    prompt = pack([1, 2, 3, 4, 5])
    core.handle(MatchPrefix(Epoch(0), RequestId(1), prompt, cache_salt="a"), 0)
    start = StartRequest(RequestId(1), prompt, 5, 0, SamplingParams())
    plan = PlanStep(
        Epoch(0),
        StepId(0),
        (RequestId(1),),
        (5,),
        start=(start,),
        grow=((RequestId(1), 3),),
        computed_prompt_tokens=((RequestId(1), 5),),
    )
    core.handle(plan, 0)
    for number, (salt, num_cached) in enumerate([("b", 0), ("a", 4)]):
        (matched,) = core.handle(
            MatchPrefix(Epoch(0), RequestId(2 + number), prompt, cache_salt=salt, fork_of=RequestId(1)), 0
        )
        assert matched.num_cached_tokens == num_cached
    core.check()
