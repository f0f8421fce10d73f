from __future__ import annotations

from octavo.actors.engine.audit import BUSY_NS, IDLE_NS, Audit
from octavo.actors.kv_allocator.core import AllocatorConfig, KVAllocatorCore
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore


class Clock:
    def __init__(self) -> None:
        self.ns = 0

    def now_ns(self) -> int:
        return self.ns


class Core:
    """Takes a while to check itself."""

    def __init__(self, clock: Clock, took_ns: int) -> None:
        self._clock = clock
        self._took_ns = took_ns
        self.num_checks = 0

    def check(self) -> None:
        self.num_checks += 1
        self._clock.ns += self._took_ns


def audit_of(clock: Clock) -> tuple[Audit, SchedulerCore, KVAllocatorCore]:
    scheduler = SchedulerCore(SchedulerConfig(num_blocks=8, block_size=4, max_model_len=16))
    allocator = KVAllocatorCore(AllocatorConfig(num_blocks=8, block_size=4))
    return Audit((scheduler, allocator), clock), scheduler, allocator


def test_f_22_a_count_of_references_that_is_wrong_is_found_and_one_that_is_right_is_not() -> None:
    clock = Clock()
    audit, _, allocator = audit_of(clock)
    clock.ns = IDLE_NS
    assert audit.find_fault(is_idle=True) == ""
    assert audit.num_done == 1
    allocator._pool.ref_counts.append(1)
    clock.ns += IDLE_NS
    assert audit.find_fault(is_idle=True).startswith("KVAllocatorCore contradicts itself")


def test_f_22_a_request_in_no_place_is_found() -> None:
    clock = Clock()
    audit, scheduler, _ = audit_of(clock)
    scheduler._state.num_accepted += 1
    clock.ns = IDLE_NS
    assert audit.find_fault(is_idle=True).startswith("SchedulerCore contradicts itself")


def test_an_engine_at_work_is_asked_seldom_and_one_without_now_and_then() -> None:
    clock = Clock()
    core = Core(clock, 0)
    audit = Audit((core,), clock)
    for _ in range(120):  # a minute
        clock.ns += 500_000_000
        audit.find_fault(is_idle=False)
    assert core.num_checks == 60_000_000_000 // BUSY_NS
    for _ in range(20):
        clock.ns += 500_000_000
        audit.find_fault(is_idle=True)
    assert core.num_checks == 60_000_000_000 // BUSY_NS + 10


def test_checks_that_take_long_come_more_seldom() -> None:
    clock = Clock()
    core = Core(clock, 1_000_000_000)
    audit = Audit((core,), clock)
    for _ in range(4_000):
        clock.ns += 500_000_000
        audit.find_fault(is_idle=True)
    assert core.num_checks <= 1 + 2_000 // 1_000
