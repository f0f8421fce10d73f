import tracemalloc
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.router.config import chunks_worth_remembering
from octavo.actors.router.core import RouterConfig, RouterCore
from octavo.actors.router.prefix_map import PrefixMap
from octavo.messages.ids import RequestId
from octavo.messages.request import SubmitRequest
from octavo.messages.router import ReplicaDown, ReplicaUp, RequestLeft
from octavo.messages.sampling import SamplingParams


def submit(request_id: int, tokens=(1, 2, 3), **fields) -> SubmitRequest:
    return SubmitRequest(RequestId(request_id), array("i", tokens).tobytes(), SamplingParams(), **fields)


def route(router: RouterCore, request_id: int, tokens=(1, 2, 3), **fields) -> int:
    (routed,) = router.handle(submit(request_id, tokens, **fields), 0)
    assert routed.submit.request_id == request_id
    return routed.replica


def test_round_robin_takes_turns_and_skips_who_is_down() -> None:
    router = RouterCore(RouterConfig(num_replicas=3, policy="round_robin"))
    assert [route(router, i) for i in range(4)] == [0, 1, 2, 0]
    router.handle(ReplicaDown(1), 0)
    assert [route(router, i) for i in range(4, 8)] == [2, 0, 2, 0]
    router.handle(ReplicaUp(1), 0)
    assert [route(router, i) for i in range(8, 10)] == [1, 2]


def test_least_loaded_counts_open_requests_and_breaks_ties_by_number() -> None:
    router = RouterCore(RouterConfig(num_replicas=3))
    assert [route(router, i) for i in range(5)] == [0, 1, 2, 0, 1]
    router.handle(RequestLeft(RequestId(0)), 0)
    router.handle(RequestLeft(RequestId(3)), 0)
    assert route(router, 5) == 0
    router.check()


def test_prefix_aware_sends_a_prompt_where_its_beginning_is_unless_that_costs_more() -> None:
    router = RouterCore(RouterConfig(num_replicas=2, policy="prefix_aware", chunk_tokens=4, request_tokens=2))
    shared = tuple(range(100, 180))
    assert route(router, 0, shared) == 0
    assert route(router, 1, tuple(range(80))) == 1
    router.handle(RequestLeft(RequestId(0)), 0)
    router.handle(RequestLeft(RequestId(1)), 0)
    assert route(router, 2, (*shared, 5)) == 0  # 1 token to compute
    assert route(router, 3, (*shared, 6)) == 0
    assert route(router, 4, (*shared[:4], *range(500, 560))) == 1  # little is shared, and replica 0 is busy
    router.check()


def test_prompts_with_different_salts_share_nothing() -> None:
    router = RouterCore(RouterConfig(num_replicas=2, policy="prefix_aware", chunk_tokens=4, request_tokens=2))
    prompt = tuple(range(40))
    assert route(router, 0, (77,)) == 0
    assert route(router, 1, prompt, cache_salt="a") == 1
    router.handle(RequestLeft(RequestId(0)), 0)
    router.handle(RequestLeft(RequestId(1)), 0)
    assert route(router, 2, prompt, cache_salt="b") == 0, "of two idle ones the first: the other's cache is of no use"
    router.handle(RequestLeft(RequestId(2)), 0)
    assert route(router, 3, prompt, cache_salt="a") == 1


def test_of_equal_work_it_goes_where_more_is_cached() -> None:
    router = RouterCore(RouterConfig(num_replicas=2, policy="prefix_aware", chunk_tokens=4, request_tokens=2))
    prompt = tuple(range(8))
    assert route(router, 0, (77,)) == 0
    assert route(router, 1, prompt) == 1
    router.handle(RequestLeft(RequestId(0)), 0)
    router.handle(RequestLeft(RequestId(1)), 0)
    # Eight tokens of work on 0, and none to find there; six on 1 beside two for the request itself, and eight to find.
    assert route(router, 2, range(100, 106)) == 0
    assert route(router, 3, range(200, 214)) == 1
    router.check()
    assert (router._loads[0], router._loads[1]) == (8, 16)
    assert route(router, 4, prompt) == 1


def test_beginnings_that_are_used_are_remembered_longer() -> None:
    router = RouterCore(RouterConfig(num_replicas=2, policy="prefix_aware", chunk_tokens=1, max_chunks=3))
    for i, tokens in enumerate([(1,), (2,), (1,), (3,), (4,)]):
        route(router, i, tokens)
    seen = [token for token in range(1, 5) if router._prefixes.match(array("i", (token,)).tobytes(), b"")]
    assert seen == [1, 3, 4]


def test_a_replica_that_was_lost_has_seen_nothing() -> None:
    router = RouterCore(RouterConfig(num_replicas=2, policy="prefix_aware", chunk_tokens=4, request_tokens=2))
    prompt = tuple(range(40))
    assert route(router, 0, (77,)) == 0
    assert route(router, 1, prompt) == 1
    router.handle(RequestLeft(RequestId(0)), 0)
    router.handle(RequestLeft(RequestId(1)), 0)
    router.handle(ReplicaDown(1), 0)
    router.handle(ReplicaUp(1), 0)
    assert route(router, 2, prompt) == 0


def test_forgetting_a_replica_costs_nothing_and_what_nobody_has_seen_any_more_goes_when_it_is_met() -> None:
    prefixes = PrefixMap(3, 1, 100)
    prompt = array("i", range(10)).tobytes()
    prefixes.add(prompt, b"", 0)
    prefixes.add(prompt[:20], b"", 1)
    assert prefixes.match(prompt, b"") == {0: 10, 1: 5}
    prefixes.forget(0)
    assert prefixes.match(prompt, b"") == {1: 5}
    prefixes.add(prompt[:8], b"", 0)  # again, and less of it
    assert prefixes.match(prompt, b"") == {0: 2, 1: 5}
    prefixes.forget(1)
    prefixes.forget(0)
    num_chunks = len(prefixes)
    assert prefixes.match(prompt, b"") == {}
    assert len(prefixes) < num_chunks
    prefixes.add(prompt, b"", 2)
    assert prefixes.match(prompt, b"") == {2: 10}


class PlainPrefixMap:
    """What a `PrefixMap` says, said plainly: by the tokens themselves, and never too many."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._seen: dict[tuple[bytes, bytes], set[int]] = {}

    def _beginnings(self, token_ids: bytes) -> list[tuple[int, bytes]]:
        whole = len(token_ids) // 4 // self._chunk_tokens * self._chunk_tokens
        return [(n, token_ids[: 4 * n]) for n in range(self._chunk_tokens, whole + 1, self._chunk_tokens)]

    def match(self, token_ids: bytes, salt: bytes) -> dict[int, int]:
        found: dict[int, int] = {}
        for num_tokens, beginning in self._beginnings(token_ids):
            found.update(dict.fromkeys(self._seen.get((salt, beginning), ()), num_tokens))
        return found

    def add(self, token_ids: bytes, salt: bytes, replica: int) -> None:
        for _, beginning in self._beginnings(token_ids):
            self._seen.setdefault((salt, beginning), set()).add(replica)

    def forget(self, replica: int) -> None:
        for replicas in self._seen.values():
            replicas.discard(replica)


prompts = st.lists(st.integers(0, 1), max_size=9).map(lambda tokens: array("i", tokens).tobytes())
salts = st.sampled_from([b"", b"a"])
steps = st.one_of(
    st.tuples(st.just("add"), prompts, salts, st.integers(0, 2)),
    st.tuples(st.just("match"), prompts, salts),
    st.tuples(st.just("forget"), st.integers(0, 2)),
)


@given(st.integers(1, 3), st.lists(steps, max_size=40))
def test_digests_say_what_the_tokens_themselves_would(chunk_tokens, script) -> None:
    digests, plain = PrefixMap(3, chunk_tokens, 10**6), PlainPrefixMap(chunk_tokens)
    for name, *arguments in script:
        assert getattr(digests, name)(*arguments) == getattr(plain, name)(*arguments)


def test_a_chunk_takes_few_bytes_however_many_tokens_it_has() -> None:
    prefixes = PrefixMap(2, 256, 10**6)
    prompts = [array("i", range(number, number + 256)).tobytes() for number in range(10_000)]
    tracemalloc.start()
    try:
        for prompt in prompts:
            prefixes.add(prompt, b"", 0)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(prefixes) < 400


def test_as_many_chunks_are_remembered_as_the_caches_have_room_for_twice() -> None:
    fields = {"num_replicas": 3, "chunk_tokens": 256}
    assert chunks_worth_remembering(num_cached_tokens=256 * 1000, **fields) == 6000
    assert chunks_worth_remembering(num_cached_tokens=1, **fields) == 1


def test_siblings_follow_the_one_whose_prompt_they_share() -> None:
    for policy in ("round_robin", "least_loaded", "prefix_aware"):
        router = RouterCore(RouterConfig(num_replicas=4, policy=policy))
        route(router, 0)
        leader = route(router, 1)
        assert {route(router, i, fork_of=RequestId(1)) for i in range(2, 5)} == {leader}
        router.check()


def test_while_nobody_is_up_requests_still_go_somewhere() -> None:
    for policy in ("round_robin", "least_loaded", "prefix_aware"):
        router = RouterCore(RouterConfig(num_replicas=2, policy=policy))
        router.handle(ReplicaDown(0), 0)
        router.handle(ReplicaDown(1), 0)
        assert route(router, 0) in (0, 1)
        router.handle(ReplicaUp(1), 0)
        assert {route(router, i) for i in range(1, 4)} == {1}


def test_the_map_of_prefixes_is_bounded() -> None:
    router = RouterCore(RouterConfig(num_replicas=2, policy="prefix_aware", chunk_tokens=1, max_chunks=10))
    for i in range(50):
        route(router, i, range(i * 10, i * 10 + 10))
        assert len(router._prefixes) <= 10


@given(st.sampled_from(["round_robin", "least_loaded", "prefix_aware"]), st.integers(1, 5), st.data())
def test_loads_are_those_of_open_requests_after_any_script(policy, num_replicas, data) -> None:
    router = RouterCore(RouterConfig(num_replicas=num_replicas, policy=policy, chunk_tokens=2, max_chunks=6))
    is_up = [True] * num_replicas
    for i in range(data.draw(st.integers(0, 30))):
        match data.draw(st.sampled_from(["submit", "submit", "left", "down", "up"])):
            case "submit":
                prompt = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
                replica = route(router, i, prompt, fork_of=RequestId(data.draw(st.integers(-1, 5))))
                assert is_up[replica] or not any(is_up)
            case "left":
                router.handle(RequestLeft(RequestId(data.draw(st.integers(0, 30)))), 0)
            case change:
                replica = data.draw(st.integers(0, num_replicas - 1))
                is_up[replica] = change == "up"
                router.handle(ReplicaUp(replica) if is_up[replica] else ReplicaDown(replica), 0)
        router.check()


@pytest.mark.parametrize(
    "bad",
    [
        {"num_replicas": 0},
        {"num_replicas": 1, "policy": "x"},
        {"num_replicas": 1, "chunk_tokens": 0},
        {"num_replicas": 1, "request_tokens": -1},
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="must"):
        RouterCore(RouterConfig(**bad))
