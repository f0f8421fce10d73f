from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.api.readiness import ReadinessConfig, ReadinessCore
from octavo.gateway.stats import EngineStats

S = 1_000_000_000
CONFIG = ReadinessConfig(grace_ns=1 * S, stall_ns=5 * S, max_gap_ns=1_000_000 * S)
WITH_GAPS = ReadinessConfig(grace_ns=1 * S, stall_ns=5 * S)


def stats(num_steps: int, num_live: int = 1) -> EngineStats:
    idle = EngineStats(**dict.fromkeys(EngineStats.__struct_fields__[:12], 0))
    return msgspec.structs.replace(idle, num_steps=num_steps, num_live=num_live)


def look_often(core: ReadinessCore, from_ns: int, duration_ns: int, seen: EngineStats) -> int:
    """Look as often as a server does, finding it ready; returns when that was for the last time."""
    for now_ns in range(from_ns, from_ns + duration_ns + 1, S // 4):
        assert core.observe(now_ns, seen, "") == ""
    return from_ns + duration_ns


def test_idleness_is_no_stall() -> None:
    core = ReadinessCore(CONFIG)
    for second in range(1000):
        assert core.observe(second * S, stats(7, num_live=0), "") == ""
    # Nor is the first moment after it.
    assert core.observe(1000 * S, stats(7), "") == ""


def test_work_without_steps_is_a_stall_and_the_next_step_ends_it() -> None:
    core = ReadinessCore(CONFIG)
    assert core.observe(0, stats(7), "") == ""
    assert core.observe(5 * S - 1, stats(7), "") == ""
    assert "no step has ended for 5 s" in core.observe(5 * S, stats(7), "")
    assert core.observe(6 * S, stats(8), "") == ""
    assert core.observe(7 * S, stats(8), "") == ""


def test_an_engine_that_is_slow_by_nature_gets_more_time() -> None:
    core = ReadinessCore(CONFIG)
    core.observe(0, stats(0), "")
    for step in range(1, 4):
        core.observe(step * 4 * S, stats(step), "")
    assert core.observe(12 * S + 11 * S, stats(3), "") == ""
    assert core.observe(12 * S + 12 * S, stats(3), "") != ""


def test_a_start_counts_at_once_and_a_replacement_after_its_grace() -> None:
    core = ReadinessCore(CONFIG)
    assert core.observe(0, stats(0, 0), "starting") == "starting"
    assert core.observe(1, stats(0, 0), "") == ""
    assert core.observe(10 * S, stats(0, 0), "lost") == ""
    assert core.observe(11 * S - 1, stats(0, 0), "lost") == ""
    assert core.observe(11 * S, stats(0, 0), "lost") == "lost"
    assert core.observe(12 * S, stats(0, 0), "") == ""


def test_an_engine_that_was_replaced_and_counts_from_nothing_has_gone_on() -> None:
    core = ReadinessCore(CONFIG)
    core.observe(0, stats(1000), "")
    assert core.observe(5 * S, stats(3), "") == ""
    assert core.observe(9 * S, stats(3), "") == ""


@pytest.mark.parametrize("pause_s", [2, 5, 60])
def test_f_48_a_pause_of_this_process_is_no_stall_of_the_engine_and_none_is_overlooked_for_it(pause_s: int) -> None:
    core = ReadinessCore(WITH_GAPS)
    core.observe(0, stats(6), "")
    now_ns = look_often(core, S // 4, 4 * S, stats(7))
    now_ns += pause_s * S
    assert core.observe(now_ns, stats(7), "") == "", "what was done meanwhile is not read yet"
    now_ns = look_often(core, now_ns, S // 2, stats(7))
    assert "no step has ended for 5 s" in core.observe(now_ns + S // 4, stats(7), ""), "as it has, beside the pause"
    assert core.observe(now_ns + S // 2, stats(8), "") == ""


def test_a_pause_of_this_process_is_not_learned_as_a_slow_step() -> None:
    core = ReadinessCore(WITH_GAPS)
    now_ns = look_often(core, 0, S, stats(7)) + 60 * S
    core.observe(now_ns, stats(8), "")
    look_often(core, now_ns, 5 * S - S // 4, stats(8))
    assert core.observe(now_ns + 5 * S + S // 4, stats(8), "") != ""


def test_f_48_a_pause_of_this_process_is_no_part_of_the_grace_of_a_replacement() -> None:
    core = ReadinessCore(WITH_GAPS)
    now_ns = look_often(core, 0, S, stats(7))
    assert core.observe(now_ns, stats(7), "lost") == ""
    assert core.observe(now_ns + 60 * S, stats(7), "lost") == ""
    assert core.observe(now_ns + 61 * S, stats(7), "lost") == "lost"


@given(st.lists(st.tuples(st.integers(0, 3 * S), st.booleans(), st.booleans()), max_size=60))
def test_ready_within_two_seconds_after_trouble_is_over_and_never_while_it_lasts_longer_than_the_limits(
    script: list[tuple[int, bool, bool]],
) -> None:
    core = ReadinessCore(CONFIG)
    now_ns = steps = 0
    unready_since: int | None = None
    core.observe(0, stats(0), "")
    for pause_ns, says_ready, went_on in script:
        now_ns += pause_ns
        steps += went_on
        unready_since = None if says_ready else (now_ns if unready_since is None else unready_since)
        why = core.observe(now_ns, stats(steps), "" if says_ready else "lost")
        if says_ready and went_on:
            assert why == ""
        if unready_since is not None and now_ns - unready_since >= CONFIG.grace_ns:
            assert why
