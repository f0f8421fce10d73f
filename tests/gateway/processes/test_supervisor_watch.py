from __future__ import annotations

from octavo.gateway.processes.supervisor_watch import MAX_GAP_NS, MAX_STANDSTILL_NS, MAX_STOPPED_NS, SupervisorWatch

EVERY_NS = 250_000_000
HOUR_NS = 3600 * 10**9


class Rig:
    """A watch, and a clock that goes on from look to look."""

    def __init__(self) -> None:
        self.watch = SupervisorWatch()
        self.now_ns = 0
        self.progress = 0

    def looks(self, for_ns: int, *, waiting: int = 3, stopped: bool = True, steps: int = 0) -> int:
        """Look for so long; returns after how many nanoseconds the supervisor has to end, or -1."""
        begun_ns = self.now_ns
        while self.now_ns - begun_ns < for_ns:
            self.now_ns += EVERY_NS
            self.progress += steps
            if self.watch.look(self.now_ns, num_waiting=waiting, progress=self.progress, is_stopped=lambda: stopped):
                return self.now_ns - begun_ns
        return -1


def test_a_stopped_supervisor_is_left_alone_while_engines_get_on_without_it() -> None:
    assert Rig().looks(HOUR_NS, steps=1) == -1


def test_or_while_nobody_waits() -> None:
    assert Rig().looks(HOUR_NS, waiting=0) == -1


def test_a_supervisor_that_is_not_stopped_is_never_ended_however_long_others_wait() -> None:
    assert Rig().looks(HOUR_NS, stopped=False) == -1


def test_one_that_is_missed_ends_once_both_have_lasted_long_enough() -> None:
    rig = Rig()
    rig.looks(10 * EVERY_NS, steps=1)
    assert MAX_STANDSTILL_NS <= rig.looks(HOUR_NS) <= MAX_STANDSTILL_NS + 2 * EVERY_NS


def test_time_in_which_it_was_not_stopped_does_not_count() -> None:
    rig = Rig()
    assert rig.looks(2 * MAX_STANDSTILL_NS, stopped=False) == -1
    assert MAX_STOPPED_NS <= rig.looks(HOUR_NS) <= MAX_STOPPED_NS + 2 * EVERY_NS
    rig = Rig()
    for _ in range(100):
        assert rig.looks(MAX_STOPPED_NS - EVERY_NS) == -1
        assert rig.looks(EVERY_NS, stopped=False) == -1


def test_f_48_whoever_stood_still_himself_knows_nothing_of_others() -> None:
    rig = Rig()
    rig.looks(MAX_STANDSTILL_NS - EVERY_NS)
    rig.now_ns += MAX_GAP_NS
    assert rig.looks(MAX_STANDSTILL_NS - EVERY_NS) == -1
