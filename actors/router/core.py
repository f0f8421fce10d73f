"""Decides which replica serves a request."""

from __future__ import annotations

from typing import assert_never

from ...messages.ids import RequestId
from ...messages.request import SubmitRequest
from ...messages.router import ReplicaDown, ReplicaUp, RequestLeft, RouteRequest
from .config import RouterConfig
from .least_loaded import LoadTable
from .prefix_map import PrefixMap

__all__ = ["RouterConfig", "RouterCore", "RouterInbox"]

RouterInbox = SubmitRequest | RequestLeft | ReplicaDown | ReplicaUp


class RouterCore:
    """Spreads requests over replicas; knows of each only what was sent there and has not ended.

    Siblings (`fork_of`) follow the one whose prompt they share. While no replica is up, requests go to the least
    loaded one of those that will come back: a request is never lost here, only late.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._config = config
        self._policy = config.policy
        self._next = 0
        self._loads = LoadTable(config.num_replicas)
        self._prefixes = PrefixMap(config.num_replicas, config.chunk_tokens, config.max_chunks)
        self._open: dict[RequestId, tuple[int, int]] = {}  # replica, load

    @property
    def num_open(self) -> int:
        """Requests routed and not ended."""
        return len(self._open)

    def handle(self, message: RouterInbox, now_ns: int) -> list[RouteRequest]:
        """Take one message; return where its request goes. `now_ns` is not used: time decides nothing here."""
        match message:
            case SubmitRequest():
                replica, load = self._choose(message)
                self._open[message.request_id] = (replica, load)
                self._loads.add(replica, load)
                return [RouteRequest(replica, message)]
            case RequestLeft(request_id):
                left = self._open.pop(request_id, None)
                if left is not None:
                    self._loads.add(left[0], -left[1])
            case ReplicaDown(replica):
                self._loads.set_up(replica, is_up=False)
                self._prefixes.forget(replica)
            case ReplicaUp(replica):
                self._loads.set_up(replica, is_up=True)
            case _:
                assert_never(message)
        return []

    def _choose(self, submit: SubmitRequest) -> tuple[int, int]:
        """The replica for a request, and what the request adds to its load."""
        leader = self._open.get(submit.fork_of)
        if leader is not None and self._loads.is_up(leader[0]):
            return leader[0], 1 if self._policy != "prefix_aware" else self._config.request_tokens
        if self._policy == "round_robin":
            return self._next_in_turn(), 1
        if self._policy == "least_loaded":
            return self._least(), 1
        return self._least_work(submit)

    def _next_in_turn(self) -> int:
        num_replicas = self._config.num_replicas
        for i in range(num_replicas):
            replica = (self._next + i) % num_replicas
            if self._loads.is_up(replica):
                self._next = replica + 1
                return replica
        self._next += 1
        return (self._next - 1) % num_replicas

    def _least(self) -> int:
        replica = self._loads.least()
        if replica >= 0:
            return replica
        return min(range(self._config.num_replicas), key=lambda replica: (self._loads[replica], replica))

    def _least_work(self, submit: SubmitRequest) -> tuple[int, int]:
        """The replica with the least prompt work before this request's first token."""
        tokens, salt = submit.prompt_token_ids, submit.cache_salt.encode("utf-8", "surrogatepass")
        num_tokens = len(tokens) // 4
        best, num_saved = self._least(), 0
        seen = self._prefixes.match(tokens, salt)
        for replica in sorted(seen):
            # Of equal work, where more of the prompt is cached; then the lowest number.
            cost = (self._loads[replica] - seen[replica], -seen[replica])
            if self._loads.is_up(replica) and cost < (self._loads[best] - num_saved, -num_saved):
                best, num_saved = replica, seen[replica]
        self._prefixes.add(tokens, salt, best)
        return best, num_tokens - num_saved + self._config.request_tokens

    def check(self) -> None:
        """Assert that each replica's load is the sum of its open requests'."""
        loads = [0] * self._config.num_replicas
        for replica, load in self._open.values():
            loads[replica] += load
        assert loads == [self._loads[replica] for replica in range(self._config.num_replicas)]
