from __future__ import annotations

import msgspec

from octavo.gateway.lost_steps import LOST_NS, LostStepWatch
from octavo.messages.processes import EngineReport
from octavo.messages.system import Beat

REPORT = EngineReport(
    incarnation=1,
    num_running=1,
    num_waiting=0,
    num_held_blocks=1,
    num_blocks=9,
    num_preemptions=0,
    prefix_cache_queries=0,
    prefix_cache_hits=0,
    prompt_tokens=0,
    generation_tokens=0,
    num_steps=7,
    num_steps_in_flight=2,
    num_dropped_messages=0,
    num_executor_losses=0,
    step_age_ns=LOST_NS + 1,
)
LATE = 3 * LOST_NS


def is_lost(watch: LostStepWatch, *, is_ready: bool = True, now_ns: int = LATE, **changes: int) -> bool:
    return watch.is_lost(msgspec.structs.replace(REPORT, **changes), is_ready=is_ready, now_ns=now_ns)


def test_a_step_is_lost_if_it_is_waited_for_and_nobody_is_at_it() -> None:
    watch = LostStepWatch()
    watch.note_beat(Beat("executor 0", 1, progress=5), 1)
    assert is_lost(watch)
    assert not is_lost(watch, num_steps_in_flight=0), "nothing was planned"
    assert not is_lost(watch, step_age_ns=LOST_NS), "one has ended lately"


def test_it_is_not_while_an_executor_works_or_gets_on() -> None:
    watch = LostStepWatch()
    watch.note_beat(Beat("executor 0", 1, progress=5), 1)
    watch.note_beat(Beat("executor 0", 1, progress=5, busy_ns=9), LATE - 1)
    assert not is_lost(watch)
    watch.note_beat(Beat("executor 0", 1, progress=6), LATE + LOST_NS)
    assert not is_lost(watch, now_ns=LATE + 2 * LOST_NS)
    assert is_lost(watch, now_ns=LATE + 2 * LOST_NS + 1)


def test_an_executor_that_is_being_replaced_has_its_time() -> None:
    watch = LostStepWatch()
    assert not is_lost(watch, is_ready=False)
    assert not is_lost(watch, now_ns=LATE + LOST_NS)
    assert is_lost(watch, now_ns=LATE + LOST_NS + 1)
