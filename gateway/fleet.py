"""The replicas of a model as their edge sees them: which of them serves which request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..actors.router.config import RoutingPolicy
from ..actors.router.core import RouterConfig, RouterCore
from ..messages.base import Message
from ..messages.ids import RequestId
from ..messages.processes import RememberQuarantined
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
        for link in links:
            link.on_convicted = partial(self._warn_others, link)

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
        is_up = is_up and not self.links[index].is_gone
        if self._is_up[index] != is_up:
            self._is_up[index] = is_up
            self._router.handle(ReplicaUp(index) if is_up else ReplicaDown(index), 0)

    def abandon(self, index: int) -> bool:
        """A replica is gone for good: what it had goes on elsewhere. False if there is nowhere."""
        lost = self.links[index]
        if lost.is_gone:
            return True
        messages = lost.give_up()
        if all(link.is_gone for link in self.links):
            return False
        self.set_up(index, is_up=False)
        for message in messages:
            if isinstance(message, SubmitRequest):
                self._router.handle(RequestLeft(message.request_id), 0)
            self.post(message)
        return True

    def _warn_others(self, convicting: EngineLink, entry: RememberQuarantined) -> None:
        """A client that asks again is sent to another replica, whose executor dies of it as well.

        An engine that is not up hears of it when it is given what it had.
        """
        for link in self.links:
            if link is not convicting:
                link.send(entry)

    def _submit(self, submit: SubmitRequest) -> None:
        for route in self._router.handle(submit, 0):
            owner = self.links[route.replica]
            if owner.is_gone:  # none is up: whichever comes back takes it
                owner = next(link for link in self.links if not link.is_gone)
            self._owners[submit.request_id] = owner
            owner.post(submit)
