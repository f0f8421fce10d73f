from __future__ import annotations

from octavo.actors.engine.report import Reporter
from octavo.actors.kv_allocator.core import AllocatorConfig, KVAllocatorCore
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.actors.scheduler.core import SchedulerCore
from octavo.actors.supervisor.lost_steps import LOST_NS, LostStepWatch
from octavo.messages.ids import RequestId
from octavo.messages.kv import MatchPrefix
from octavo.messages.processes import EngineReport
from octavo.messages.request import CancelRequest, SubmitRequest
from octavo.messages.sampling import SamplingParams
from octavo.messages.step import PlanDue
from octavo.messages.system import Beat

BOOTED_NS = 3_600_000_000_000
"""No clock of a host that has been up for a while is near 0."""
BEAT_NS = 250_000_000


class Engine:
    """Both cores, and who reports of them."""

    def __init__(self) -> None:
        config = SchedulerConfig(num_blocks=8, block_size=4, max_model_len=16)
        self.scheduler = SchedulerCore(config)
        self.allocator = KVAllocatorCore(AllocatorConfig(num_blocks=8, block_size=4))
        self.reporter = Reporter(1)

    def submit(self, request_id: int) -> None:
        """Have a request's first step planned."""
        submit = SubmitRequest(RequestId(request_id), b"\1\0\0\0", SamplingParams(max_tokens=2, seed=0))
        for message in (submit, PlanDue()):
            for answer in self.scheduler.handle(message, BOOTED_NS):
                if isinstance(answer, MatchPrefix):
                    for matched in self.allocator.handle(answer, BOOTED_NS):
                        self.scheduler.handle(matched, BOOTED_NS)  # type: ignore[arg-type]  # it hears no steps
        self.scheduler.handle(PlanDue(), BOOTED_NS)

    def report(self, now_ns: int) -> EngineReport:
        return self.reporter.report(
            self.scheduler, self.allocator, num_edges_shed=0, messages_dropped=(), now_ns=now_ns
        )


def test_an_engine_that_is_asked_for_a_step_before_its_first_report_has_waited_for_none_yet() -> None:
    engine = Engine()
    engine.submit(1)
    first = engine.report(BOOTED_NS)
    assert first.num_steps_in_flight and not first.step_age_ns
    assert engine.report(BOOTED_NS + BEAT_NS).step_age_ns == BEAT_NS


def test_the_first_step_of_all_is_not_lost_however_long_the_executor_had_nothing_to_do_while_it_loaded() -> None:
    engine, watch = Engine(), LostStepWatch()
    for now_ns in range(BOOTED_NS - 2 * LOST_NS, BOOTED_NS, BEAT_NS):
        watch.note_beat(Beat("executor 0", 1), now_ns)
    engine.submit(1)
    assert not watch.is_lost(engine.report(BOOTED_NS), is_ready=True, now_ns=BOOTED_NS)


def test_a_step_that_nobody_wants_any_more_is_waited_for_like_any_other() -> None:
    engine = Engine()
    engine.report(BOOTED_NS)
    engine.submit(1)
    engine.scheduler.handle(CancelRequest(RequestId(1)), BOOTED_NS)
    report = engine.report(BOOTED_NS + BEAT_NS)
    assert (report.num_running, report.num_waiting) == (0, 0)
    assert report.num_steps_in_flight and report.step_age_ns == BEAT_NS


def test_who_was_accepted_is_over_or_runs_or_waits_in_every_report() -> None:
    engine = Engine()
    for request_id in range(3):
        engine.submit(request_id)
    engine.scheduler.handle(CancelRequest(RequestId(1)), BOOTED_NS)
    report = engine.report(BOOTED_NS)
    assert (report.num_accepted, report.num_completed, report.num_failed, report.num_cancelled) == (3, 0, 0, 1)
    assert report.num_running + report.num_waiting == 2
