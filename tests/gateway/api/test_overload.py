from __future__ import annotations

import asyncio

import msgspec
from fake_engine import FakeEngine
from http_client import http_post, serving
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.api.overload import MAX_RETRY_AFTER_S, AdmissionCore, OverloadLimits
from octavo.gateway.config import EngineConfig
from octavo.gateway.stats import EngineStats

S = 1_000_000_000
IDLE = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__[:12], 0))


class Queue:
    """What the engine would say, of all edges together but for `num_live`."""

    def __init__(self, num_waiting: int = 0) -> None:
        self.num_waiting = num_waiting
        self.num_ended = 0
        self.num_live = 0

    def core(self, **limits: int) -> AdmissionCore:
        return AdmissionCore(
            OverloadLimits(**limits),
            lambda: msgspec.structs.replace(
                IDLE, num_waiting=self.num_waiting, num_live=self.num_live, num_completed=self.num_ended
            ),
        )


def run_saturated(queue: Queue, core: AdmissionCore, *, seconds: int, ends_per_s: int) -> int:
    """Let time go by while the queue stays; returns the time, ns."""
    now_ns = 0
    for tenth in range(seconds * 10 + 1):
        now_ns = tenth * S // 10
        queue.num_ended = tenth * ends_per_s // 10
        core.admit(now_ns, 0)
    return now_ns


def test_requests_and_bytes_are_bounded_and_come_back_with_their_release() -> None:
    core = Queue().core(max_requests=3, max_bytes=100)
    assert [core.admit(0, 50), core.admit(0, 50)] == [None, None]
    refusal = core.admit(0, 1)
    assert refusal is not None and refusal.bound == "bytes"
    core.release(50)
    assert core.admit(0, 10) is None and core.admit(0, 10) is None
    refusal = core.admit(0, 10)
    assert refusal is not None and refusal.bound == "requests" and refusal.retry_after_s == 1
    assert core.num_refused == {"requests": 1, "bytes": 1, "wait": 0, "memory": 0}


def test_a_body_longer_than_the_bound_is_let_in_when_it_comes_alone() -> None:
    core = Queue().core(max_bytes=100)
    assert core.admit(0, 1000) is None
    assert core.admit(0, 1) is not None
    core.release(1000)
    assert core.admit(0, 1000) is None


def test_a_burst_on_a_server_whose_speed_nobody_knows_is_let_in() -> None:
    core = Queue(num_waiting=4000).core(max_wait_ns=10 * S, min_waiting=256)
    assert all(core.admit(index * S // 1000, 0) is None for index in range(1900))


def test_a_queue_that_would_take_too_long_is_closed_and_opens_again_as_it_shrinks() -> None:
    queue = Queue(num_waiting=500)
    core = queue.core(max_wait_ns=10 * S, min_waiting=256)
    now_ns = run_saturated(queue, core, seconds=20, ends_per_s=40)
    refusal = core.admit(now_ns, 0)
    assert (refusal is not None and refusal.bound == "wait" and " 12 s" in refusal.text) or " 13 s" in refusal.text
    queue.num_waiting = 300
    assert core.admit(now_ns + S // 10, 0) is None
    queue.num_waiting = 500
    assert core.admit(now_ns + S // 5, 0) is not None
    queue.num_waiting = 255  # fewer than may always wait, were they ever so slow
    assert core.admit(now_ns + S, 0) is None


def test_an_edge_among_four_measures_the_queue_of_all_by_what_ends_for_all() -> None:
    queue = Queue(num_waiting=300)  # 7.5 s of work for the service: by this edge's own quarter of the ends, 30 s
    core = queue.core(max_wait_ns=10 * S, min_waiting=256)
    refused = 0
    for tenth in range(300):
        queue.num_ended = tenth * 4
        if tenth % 4 == 0 and core.num_open:
            core.release(0)  # its own
        refused += core.admit(tenth * S // 10, 0) is not None
    assert refused == 0
    assert core.retry_after_s(300 * S // 10) == 1
    queue.num_waiting = 600  # 15 s
    assert core.admit(31 * S, 0) is not None


def test_an_edge_that_joins_late_does_not_take_all_that_ended_before_for_work_of_this_moment() -> None:
    queue = Queue(num_waiting=500)
    core = queue.core(max_wait_ns=10 * S, min_waiting=256)
    refused = []
    for tenth in range(40):
        queue.num_ended = 1_000_000 + tenth * 4
        refused.append(core.admit(tenth * S // 10, 0) is not None)
    assert not any(refused[:20]) and all(refused[25:])


def test_clients_who_are_refused_are_told_times_at_which_places_come_free() -> None:
    queue = Queue(num_waiting=500)
    core = queue.core(max_requests=1)
    core.admit(0, 0)
    now_ns = run_saturated(queue, core, seconds=20, ends_per_s=10)
    told = [core.retry_after_s(now_ns) for _ in range(100)]
    assert told == sorted(told)
    # Ten places a second: ten clients for each second, not all of them for the next one.
    assert max(told.count(second) for second in set(told)) <= 12
    assert [core.retry_after_s(now_ns) for _ in range(2000)][-1] == MAX_RETRY_AFTER_S
    # Those who were told have had their time.
    assert core.retry_after_s(now_ns + 60 * S) <= 2


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=80))
def test_what_is_open_never_exceeds_its_bounds(script: list[tuple[bool, int]]) -> None:
    core = Queue().core(max_requests=5, max_bytes=100)
    held: list[int] = []
    for comes, num_bytes in script:
        if comes:
            if core.admit(0, num_bytes) is None:
                held.append(num_bytes)
        elif held:
            core.release(held.pop(0))
        assert core.num_open == len(held) <= 5
        assert sum(held) <= 100


def test_the_server_refuses_before_it_reads_a_body_and_says_when_to_come_back() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        engine.config = EngineConfig(max_num_seqs=1, max_num_queued_requests=1)
        async with serving(engine) as client:
            open_ones = [asyncio.ensure_future(client.complete(max_tokens=5)) for _ in range(2)]
            while engine.num_live < 2:
                await asyncio.sleep(0)
            # The body never comes: the answer does not wait for it.
            head = http_post("/v1/completions", {"prompt": "x"}).partition(b"\r\n\r\n")[0]
            reader, writer = await client.connect(
                head.replace(b"Content-Length: 15", b"Content-Length: 100000") + b"\r\n\r\n"
            )
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), 30)
            assert answer.startswith(b"HTTP/1.1 429 ") and b"Retry-After: 1" in answer and b'"queue_full"' in answer
            writer.close()
            assert (await client.get("/v1/models")).status == 200
            engine.step(5)
            assert [(await each).status for each in open_ones] == [200, 200]
            metrics = (await client.get("/metrics")).body.decode()
            assert 'octavo:requests_shed_total{bound="requests",engine="0",model_name="fake/bytes"} 1.0' in metrics
            late = asyncio.ensure_future(client.complete(max_tokens=1))
            while not engine.num_live:
                await asyncio.sleep(0)
            engine.step(1)
            assert (await late).status == 200

    asyncio.run(run())


def test_requests_that_fail_or_whose_client_leaves_make_room_again() -> None:
    async def run() -> None:
        engine = FakeEngine(by_hand=True)
        engine.config = EngineConfig(max_num_seqs=1, max_num_queued_requests=1)
        async with serving(engine) as client:
            for _ in range(5):
                assert (await client.complete(n=0)).status == 400
                _, writer = await client.connect(http_post("/v1/completions", {"prompt": "x"}))
                engine.was_cancelled.clear()
                await asyncio.wait_for(engine.was_submitted.wait(), 30)
                engine.was_submitted.clear()
                writer.transport.abort()
                await asyncio.wait_for(engine.was_cancelled.wait(), 30)

    asyncio.run(run())


def overloaded(queue: Queue, core: AdmissionCore, *, offered: int, ends_per_s: int, seconds: int = 20) -> int:
    """Offer so many requests a second to an engine that ends so many, and return when that was over, ns."""
    now_ns = 0
    for index in range(seconds * offered):
        now_ns = index * S // offered
        num_ended = index * ends_per_s // offered
        while queue.num_ended < num_ended and core.num_open:
            queue.num_ended += 1
            core.release(0)
        queue.num_live = core.num_open
        queue.num_waiting = max(0, queue.num_live - 256)
        core.admit(now_ns, 0)
    return now_ns


LIMITS = {"max_wait_ns": 5 * S, "min_waiting": 256, "min_waiting_overloaded": 32, "max_running": 256}


def test_f_58_under_overload_no_more_is_open_than_is_done_soon_and_places_never_stand_empty() -> None:
    queue = Queue()
    core = queue.core(**LIMITS)
    overloaded(queue, core, offered=250, ends_per_s=50)
    # The batch is full, the few who wait fill its next places, and all of it takes little more than the bound.
    assert 256 < core.num_open <= 256 + 32 + 1
    slow = Queue()
    core = slow.core(**LIMITS)
    overloaded(slow, core, offered=100, ends_per_s=20, seconds=60)
    assert 256 < core.num_open <= 256 + 32 + 1
    fast = Queue()
    core = fast.core(**LIMITS)
    overloaded(fast, core, offered=1000, ends_per_s=200)
    assert 950 <= core.num_open <= 1050  # five seconds of its work


def test_clients_who_wait_for_their_answers_are_no_overload_however_many_they_are() -> None:
    queue = Queue()
    core = queue.core(**LIMITS)
    assert all(core.admit(0, 0) is None for _ in range(500))
    refused = 0
    for index in range(1, 60 * 40):
        now_ns = index * S // 40
        queue.num_ended += 1
        core.release(0)
        queue.num_live = core.num_open
        queue.num_waiting = max(0, queue.num_live - 256)
        refused += core.admit(now_ns, 0) is not None
    assert refused == 0


def test_a_queue_that_is_empty_for_a_moment_is_not_a_queue_that_has_ended() -> None:
    queue = Queue(num_waiting=300)
    core = queue.core(max_requests=1)
    core.admit(0, 0)
    now_ns = run_saturated(queue, core, seconds=10, ends_per_s=10)
    queue.num_waiting = 0
    core.admit(now_ns + S // 10, 0)
    told = [core.retry_after_s(now_ns + S // 10) for _ in range(50)]
    assert max(told) >= 4  # it is still known how fast places come free
    core.admit(now_ns + 2 * S, 0)
    assert core.retry_after_s(now_ns + 2 * S) == 1
