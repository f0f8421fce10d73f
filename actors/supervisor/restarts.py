"""Whether children that were lost start again, and when."""

from __future__ import annotations

from collections.abc import Sequence

from .child import Child
from .config import START_ORDER, ChildKind, SupervisorConfig
from .restart_budget import RestartBudget


class Restarts:
    """What is remembered of starts that failed, and of restarts: by streak and by kind (see `Child.streak`).

    Children that are asked about together share their fate.
    """

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._budgets: dict[ChildKind, RestartBudget] = {
            kind: RestartBudget(
                config.max_restarts if kind == "executor" else config.max_restarts_of_others, config.period_ns
            )
            for kind in START_ORDER
        }
        self._num_unready: dict[str, int] = {}  # losses since the last time that it was ready
        self._refused_since_ns: dict[str, int] = {}  # since when the system has had no room for it

    @property
    def by_kind(self) -> dict[ChildKind, int]:
        """How many there were."""
        return {kind: budget.num_restarts for kind, budget in self._budgets.items()}

    def note_ready(self, child: Child) -> None:
        """A child has become ready: its start was no failure."""
        self._num_unready.pop(child.streak, None)
        self._refused_since_ns.pop(child.streak, None)

    def note_refused(self, child: Child, now_ns: int) -> None:
        """The system has no room for a child: no restart that failed, and no defect of its own."""
        self._refused_since_ns.setdefault(child.streak, now_ns)

    def note_run(self, child: Child) -> None:
        """There was room for a child."""
        self._refused_since_ns.pop(child.streak, None)

    def num_unready(self, child: Child) -> int:
        """Its losses since it was ready the last time, the one after that included."""
        return self._num_unready.get(child.streak, 0)

    def take(self, children: Sequence[Child], now_ns: int, useless_ns: int | None) -> bool:
        """Whether children of one kind (none: the executor) may be started again; counts it.

        Args:
            useless_ns: for how long they had been of no use, if they were ended by a verdict.
        """
        refused_since_ns = self._refused_since_ns.get(children[0].streak, -1) if children else -1
        if refused_since_ns >= 0:  # what counts is how long there has been no room
            return now_ns - refused_since_ns <= self._config.max_start_ns
        is_proven = bool(children) and all(self._is_proven(child, now_ns, useless_ns) for child in children)
        kind: ChildKind = children[0].config.kind if children else "executor"
        is_verdict = useless_ns is not None
        cycle_ns = max((now_ns - child.since_ns for child in children), default=0) if is_verdict else 0
        return self._budgets[kind].take(now_ns, is_proven=is_proven, cycle_ns=cycle_ns)

    def backoff_ns(self, children: Sequence[Child]) -> int:
        """How long their start waits: not at all the first time, longer each time that it was of no use; counts it."""
        streak = children[0].streak
        num_unready = self._num_unready.get(streak, 0)
        self._num_unready[streak] = num_unready + 1
        return self._config.backoff_ns[min(num_unready, len(self._config.backoff_ns) - 1)]

    def _is_proven(self, child: Child, now_ns: int, useless_ns: int | None) -> bool:
        """Whether this incarnation was of use for a while: its death is an accident, and no loop of restarts."""
        if child.ready_ns < 0 or not child.progress:
            return False
        if useless_ns is None:
            return now_ns - child.ready_ns >= self._config.proven_ns
        took_ns = child.ready_ns - child.since_ns
        return now_ns - child.ready_ns - useless_ns >= max(self._config.proven_ns, took_ns)
