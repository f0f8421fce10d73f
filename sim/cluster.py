"""A workload on a cluster: the production router, schedulers and allocators under virtual time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from ..actors.router.core import RouterConfig, RouterCore
from ..messages.ids import RequestId
from ..messages.request import RequestEnded, SubmitRequest
from ..messages.router import ReplicaDown, ReplicaUp, RequestLeft
from ..messages.sampling import SamplingParams
from .agenda import Agenda
from .config import Outage, SimConfig
from .event_log import NumberStream
from .replica import Replica
from .results import Outcome, RequestRecord
from .slo_watch import SloWatch
from .step_time.interface import StepTimeModel
from .timeline import Timeline
from .workload.request import TraceRequest, Workload

_OUTAGE_RANK, _CANCEL_RANK, _ARRIVAL_RANK, _TIMELINE_RANK = ((1 << 30) + i for i in range(1, 5))
_OUTCOMES: dict[str, Outcome] = {"stop": "done", "length": "done", "refused": "refused", "error": "failed"}


class Cluster:
    """Replicas behind a router, and the clients that use them.

    Args:
        config: how many, and how each is set.
        workload: what arrives.
        model: how long a step of a replica takes.
        watch: if given, asked whether to go on.
    """

    def __init__(
        self, config: SimConfig, workload: Workload, model: StepTimeModel, watch: SloWatch | None = None
    ) -> None:
        self._config = config
        self._workload = workload
        self._watch = watch
        self.agenda = Agenda()
        self.records: list[RequestRecord] = []
        self.num_ended = 0
        self.refused_because: dict[str, int] = {}
        self._open: dict[RequestId, TraceRequest] = {}
        self._left: dict[RequestId, None] = {}  # clients that went away, and whose request has not ended
        self._routes = NumberStream()
        self._ends = NumberStream()
        self._router = RouterCore(RouterConfig(num_replicas=config.num_replicas, policy=config.routing))
        self.replicas = [
            Replica(
                i,
                config.scheduler,
                model,
                self.agenda,
                on_first_token=self._on_first_token,
                on_ended=self._on_ended,
                fast_forward=config.fast_forward,
            )
            for i in range(config.num_replicas)
        ]
        self._arrivals: Iterator[TraceRequest] = workload.arrivals()
        self.timeline = Timeline(self.agenda, _TIMELINE_RANK, self.replicas, config.scheduler.num_blocks)
        self._num_arrivals_due = 0
        for outage in config.outages:
            self._add_outage(outage)
        self._await_next()

    @property
    def is_done(self) -> bool:
        """Whether nothing arrives any more and everything has ended."""
        return not self._open and not self._num_arrivals_due

    @property
    def is_lost(self) -> bool:
        """Whether the service level cannot be met any more."""
        return self._watch is not None and self._watch.is_lost

    def digest(self) -> str:
        """SHA-256, in hex, of every decision and every time."""
        sha = hashlib.sha256(self._routes.digest() + self._ends.digest())
        for replica in self.replicas:
            sha.update(replica.log.digest())
        return sha.hexdigest()

    # -- clients ------------------------------------------------------------------------------------------------------

    def _await_next(self) -> None:
        """Write down the next arrival that the workload knows beforehand; one at a time, however many there are."""
        trace = next(self._arrivals, None)
        if trace is not None:
            self._add_arrival(trace, is_known=True)

    def _add_arrival(self, trace: TraceRequest, *, is_known: bool) -> None:
        self._num_arrivals_due += 1

        def arrive() -> None:
            self._num_arrivals_due -= 1
            self._arrive(trace)
            if is_known:
                self._await_next()

        self.agenda.add(max(trace.arrival_ns, self.agenda.now_ns), _ARRIVAL_RANK, arrive)

    def _arrive(self, trace: TraceRequest) -> None:
        request_id = RequestId(len(self.records))
        now_ns = self.agenda.now_ns
        self._open[request_id] = trace
        self.records.append(
            RequestRecord(
                index=request_id,
                replica=-1,
                tenant=trace.tenant,
                outcome="failed",
                num_prompt_tokens=trace.num_prompt_tokens,
                num_output_tokens=0,
                num_cached_tokens=0,
                num_preemptions=0,
                arrival_ns=now_ns,
                scheduled_ns=-1,
                first_token_ns=-1,
                last_token_ns=-1,
                ended_ns=-1,
            )
        )
        if trace.cancel_after_ns:
            self.agenda.add(now_ns + trace.cancel_after_ns, _CANCEL_RANK, lambda: self._leave(request_id))
        if self._config.ingress_ns:
            self.agenda.add(now_ns + self._config.ingress_ns, _ARRIVAL_RANK, lambda: self._submit(request_id))
        else:
            self._submit(request_id)

    def _submit(self, request_id: RequestId) -> None:
        """The request has passed gateway and tokenizer: route it."""
        trace = self._open.get(request_id)
        if trace is None:
            return  # its client left meanwhile
        now_ns = self.agenda.now_ns
        submit = SubmitRequest(
            request_id=request_id,
            prompt_token_ids=trace.prompt_token_ids(),
            params=SamplingParams(max_tokens=trace.num_output_tokens, ignore_eos=True),
            arrival_ns=self.records[request_id].arrival_ns,
            priority=trace.priority,
            deadline_ns=self.records[request_id].arrival_ns + trace.timeout_ns if trace.timeout_ns else 0,
        )
        for route in self._router.handle(submit, now_ns):
            self.records[request_id].replica = route.replica
            self._routes.extend((now_ns, request_id, route.replica))
            self.replicas[route.replica].submit(route.submit, trace.answer_id)

    def _leave(self, request_id: RequestId) -> None:
        """The client goes away, unless it has its answer."""
        if request_id not in self._open:
            return
        self._left[request_id] = None
        replica = self.records[request_id].replica
        if replica >= 0:
            self.replicas[replica].cancel(request_id)
        else:
            self._on_ended(RequestEnded(request_id, "abort"))

    def _on_first_token(self, request_id: RequestId, end_ns: int) -> None:
        record = self.records[request_id]
        record.first_token_ns = end_ns + self._config.egress_ns
        if self._watch is not None:
            self._watch.see("ttft", record.first_token_ns - record.arrival_ns)

    def _on_ended(self, ended: RequestEnded) -> None:
        request_id = ended.request_id
        trace = self._open.pop(request_id)
        now_ns = self.agenda.now_ns
        record = self.records[request_id]
        record.ended_ns = now_ns
        record.num_output_tokens = ended.num_output_tokens
        record.num_cached_tokens = ended.num_cached_tokens
        record.num_preemptions = ended.num_preemptions
        was_scheduled = ended.first_scheduled_ns > 0 or record.first_token_ns >= 0
        record.scheduled_ns = ended.first_scheduled_ns if was_scheduled else -1
        if ended.reason == "abort":
            record.outcome = "cancelled" if self._left.pop(request_id, 0) is None else "timeout"
        else:
            record.outcome = _OUTCOMES[ended.reason]
            if record.outcome == "refused":
                self.refused_because[ended.error_code] = self.refused_because.get(ended.error_code, 0) + 1
            elif record.outcome == "done":
                record.last_token_ns = now_ns + self._config.egress_ns
                if self._watch is not None:
                    self._watch.see("e2e", record.last_token_ns - record.arrival_ns)
                    if record.num_output_tokens > 1:
                        self._watch.see("tpot", round(record.tpot_s * 1e9))
        self._ends.extend((now_ns, request_id, ended.num_output_tokens, ended.num_cached_tokens))
        self._left.pop(request_id, None)
        self.num_ended += 1
        self._router.handle(RequestLeft(request_id), now_ns)
        for follower in self._workload.followers(trace, now_ns + self._config.egress_ns):
            self._add_arrival(follower, is_known=False)

    # -- faults -------------------------------------------------------------------------------------------------------

    def _add_outage(self, outage: Outage) -> None:
        replica = self.replicas[outage.replica]

        def begin() -> None:
            self._router.handle(ReplicaDown(outage.replica), self.agenda.now_ns)
            replica.lose_executor(outage.end_ns)

        def end() -> None:
            self._router.handle(ReplicaUp(outage.replica), self.agenda.now_ns)

        self.agenda.add(outage.begin_ns, _OUTAGE_RANK, begin)
        self.agenda.add(outage.end_ns, _OUTAGE_RANK, end)
