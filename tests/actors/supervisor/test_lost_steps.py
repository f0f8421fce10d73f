from __future__ import annotations

import msgspec

from octavo.actors.supervisor.lost_steps import LOST_NS, LostStepWatch
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
BEAT_NS = 250_000_000
IDLE = Beat("executor 0", 1, progress=5)


def is_lost(watch: LostStepWatch, *, is_ready: bool = True, now_ns: int = LATE, **changes: int) -> bool:
    return watch.is_lost(msgspec.structs.replace(REPORT, **changes), is_ready=is_ready, now_ns=now_ns)


def beats(watch: LostStepWatch, beat: Beat, since_ns: int, until_ns: int) -> None:
    """The same one, from one moment to another, both included."""
    for now_ns in range(since_ns, until_ns, BEAT_NS):
        watch.note_beat(beat, now_ns)
    watch.note_beat(beat, until_ns)


def test_a_step_is_lost_if_it_is_waited_for_and_nobody_is_at_it() -> None:
    watch = LostStepWatch()
    beats(watch, IDLE, 1, LATE)
    assert is_lost(watch)
    assert not is_lost(watch, num_steps_in_flight=0), "nothing was planned"
    assert not is_lost(watch, step_age_ns=LOST_NS), "one has ended lately"


def test_it_is_not_while_an_executor_works_or_gets_on() -> None:
    watch = LostStepWatch()
    beats(watch, IDLE, 1, LATE)
    watch.note_beat(msgspec.structs.replace(IDLE, busy_ns=9), LATE)
    assert not is_lost(watch)
    got_on = msgspec.structs.replace(IDLE, progress=6)
    beats(watch, got_on, LATE, LATE + LOST_NS)
    assert not is_lost(watch, now_ns=LATE + LOST_NS)
    assert is_lost(watch, now_ns=LATE + LOST_NS + 1)


def test_an_executor_that_is_being_replaced_has_its_time() -> None:
    watch = LostStepWatch()
    beats(watch, IDLE, 1, LATE)
    assert not is_lost(watch, is_ready=False)
    beats(watch, IDLE, LATE, LATE + LOST_NS)
    assert not is_lost(watch, now_ns=LATE + LOST_NS)
    assert is_lost(watch, now_ns=LATE + LOST_NS + 1)


def test_silence_is_not_idleness_an_executor_without_a_processor_may_not_have_read_of_the_step() -> None:
    watch = LostStepWatch()
    watch.note_beat(IDLE, 1)
    assert not is_lost(watch), "it has not been heard since"
    watch.note_beat(IDLE, LATE)
    assert not is_lost(watch), "and what it was at meanwhile, it does not say"
    beats(watch, IDLE, LATE, LATE + LOST_NS)
    assert is_lost(watch, now_ns=LATE + LOST_NS + 1)


def test_of_several_executors_each_must_have_said_so() -> None:
    watch = LostStepWatch()
    other = msgspec.structs.replace(IDLE, child="executor 1")
    watch.note_beat(other, LATE - LOST_NS)
    beats(watch, IDLE, 1, LATE)
    assert not is_lost(watch)
