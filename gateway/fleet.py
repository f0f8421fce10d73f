"""The replicas of a model as their edge sees them: which of them serves which request."""

from __future__ import annotations

from collections.abc import Sequence

from ..actors.router.config import RoutingPolicy
from ..actors.router.core import RouterConfig, RouterCore
from ..messages.base import Message
from ..messages.ids import RequestId
from ..messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from ..messages.router import ReplicaDown, ReplicaUp, RequestLeft
from .engine_link import EngineLink


class Fleet:
    """The edge's carrier for the addresses "scheduler" and "kv_allocator": one engine, or several behind a router."""

    def __init__(self, links: Sequence[EngineLink], policy: RoutingPolicy) -> None:
        self.links = links
        self._router = RouterCore(RouterConfig(num_replicas=len(links), policy=policy))
        self._is_up = [True] * len(links)
        self._owners: dict[RequestId, EngineLink] = {}

    def post(self, message: Message) -> None:
        """Carry a message to the engine that it is about; one about no request goes to every engine."""
        if len(self.links) == 1:
            self.links[0].post(message)
        elif isinstance(message, SubmitRequest):
            self._submit(message)
        elif isinstance(message, CancelRequest | StopMatched):
            if (owner := self._owners.get(message.request_id)) is not None:
                owner.post(message)
        else:
            for link in self.links:
                link.post(message)

    def note_end(self, ended: RequestEnded) -> None:
        """A request has ended; to be told of every end."""
        if self._owners.pop(ended.request_id, None) is not None:
            self._router.handle(RequestLeft(ended.request_id), 0)

    def set_up(self, index: int, *, is_up: bool) -> None:
        """Whether new requests may go to a replica."""
        if self._is_up[index] != is_up:
            self._is_up[index] = is_up
            self._router.handle(ReplicaUp(index) if is_up else ReplicaDown(index), 0)

    def abandon(self, index: int) -> bool:
        """A replica is gone for good: what it had goes on elsewhere. False if there is nowhere."""
        self.set_up(index, is_up=False)
        if not any(self._is_up):
            return False
        lost = self.links[index]
        lost.is_up = False
        for recipe in lost.ledger.recipes():
            if self._owners.get(recipe.request_id) is lost:
                self._router.handle(RequestLeft(recipe.request_id), 0)
                self._submit(recipe)
        return True

    def _submit(self, submit: SubmitRequest) -> None:
        for route in self._router.handle(submit, 0):
            owner = self._owners[submit.request_id] = self.links[route.replica]
            owner.post(submit)
