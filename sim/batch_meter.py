"""What a step's batch looks like to the step-time model, kept up by the changes between steps."""

from __future__ import annotations

from collections.abc import Container

import msgspec

from ..messages.ids import RequestId
from ..messages.step import ExecuteStep, PlanStep
from .step_time.interface import StepShape


class Batch(msgspec.Struct, gc=False):
    """One step's batch.

    Attributes:
        is_new: it is not just the rows of the step before, each computing one more token.
        sampled: rows that sample, in the order of the step; the same object while nothing changes.
        firsts: rows whose known tokens are all computed with this step.
        num_recomputed: tokens that were computed before, and lost.
    """

    shape: StepShape
    is_new: bool
    sampled: tuple[RequestId, ...]
    firsts: tuple[RequestId, ...]
    num_recomputed: int


class BatchMeter:
    """Follows contexts in time proportional to what changes, not to the batch."""

    def __init__(self) -> None:
        self._rows: tuple[RequestId, ...] = ()  # decoding rows of the last plan
        self._num_laps = 0  # plans with these rows
        self._contexts: dict[RequestId, int] = {}  # of all that decode, before these laps
        self._kv_tokens = 0
        self._max_kv = 0
        self._num_known: dict[RequestId, int] = {}  # tokens of a request when it started
        self._num_computed: dict[RequestId, int] = {}  # while its known tokens are being computed
        self._num_lost: dict[RequestId, int] = {}  # computed once, and given up

    def take(self, step: ExecuteStep, plan: PlanStep, is_open: Container[RequestId]) -> Batch:
        """Follow one planned step.

        Args:
            is_open: requests that have not ended: what leaves the batch and is open was preempted.
        """
        rows = sampled = step.request_ids
        firsts: list[RequestId] = []
        prefills: tuple[tuple[int, int], ...] = ()
        num_recomputed = 0
        is_new = bool(step.drop or step.start or plan.computed_prompt_tokens)
        if is_new:
            for request_id in step.drop:
                self._drop(request_id, is_preempted=request_id in is_open)
            for start in step.start:
                self._num_known[start.request_id] = len(start.token_ids) // 4
                self._num_computed[start.request_id] = start.num_computed_tokens
                num_recomputed += max(0, self._num_lost.pop(start.request_id, 0) - start.num_computed_tokens)
            prefills, firsts, unfinished = self._prefill(plan)
            if prefills:
                computing = dict(plan.computed_prompt_tokens)
                rows = tuple([request_id for request_id in rows if request_id not in computing])
                if unfinished:
                    sampled = tuple([request_id for request_id in sampled if request_id not in unfinished])
        if rows != self._rows:
            is_new = True
            self._change_rows(rows)
        elif not prefills:
            sampled = self._rows
        self._num_laps += 1
        self._kv_tokens += len(rows)
        self._max_kv += 1
        for request_id in firsts:
            self._contexts[request_id] = self._num_known[request_id]
        shape = StepShape(len(rows), self._kv_tokens, self._max_kv if rows else 0, prefills, len(sampled))
        return Batch(shape, is_new, sampled, tuple(firsts), num_recomputed)

    def skip(self, num_laps: int) -> None:
        """Follow so many plans that only decode on."""
        self._num_laps += num_laps
        self._kv_tokens += num_laps * len(self._rows)
        self._max_kv += num_laps

    def forget_all(self) -> None:
        """The executor was lost, and every request's KV with it."""
        self._change_rows(())
        self._num_lost.update(self._contexts)
        self._num_lost.update(self._num_computed)
        self._contexts.clear()
        self._num_computed.clear()

    def _prefill(self, plan: PlanStep) -> tuple[tuple[tuple[int, int], ...], list[RequestId], dict[RequestId, None]]:
        """Chunks as `(new, history)`, the rows that are complete with them, and the rows that are not."""
        prefills, firsts = [], []
        unfinished: dict[RequestId, None] = {}
        for request_id, num_computed in plan.computed_prompt_tokens:
            num_before = self._num_computed[request_id]
            prefills.append((num_computed - num_before, num_before))
            if num_computed == self._num_known[request_id]:
                firsts.append(request_id)
                del self._num_computed[request_id]
            else:
                unfinished[request_id] = None
                self._num_computed[request_id] = num_computed
        return tuple(prefills), firsts, unfinished

    def _drop(self, request_id: RequestId, *, is_preempted: bool) -> None:
        num_computed = self._num_computed.pop(request_id, 0)
        context = self._contexts.pop(request_id, None)
        if context is not None:
            num_computed = context + (self._num_laps if request_id in self._rows else 0)
        if is_preempted:
            self._num_lost[request_id] = num_computed
        else:
            self._num_lost.pop(request_id, None)
            del self._num_known[request_id]

    def _change_rows(self, rows: tuple[RequestId, ...]) -> None:
        contexts = self._contexts
        if self._num_laps:
            for request_id in self._rows:
                if request_id in contexts:
                    contexts[request_id] += self._num_laps
        self._rows = rows
        self._num_laps = 0
        lengths = [contexts[request_id] for request_id in rows]
        self._kv_tokens = sum(lengths)
        self._max_kv = max(lengths, default=0)
