"""The replicas of a model as their edge sees them: which of them serves which request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec
import structlog

from ...actors.router.config import RoutingPolicy, chunks_worth_remembering
from ...actors.router.core import RouterConfig, RouterCore
from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.processes import RememberQuarantined
from ...messages.request import CancelRequest, RequestEnded, StopMatched, SubmitRequest
from ...messages.router import ReplicaDown, ReplicaUp, RequestLeft
from .engine_link import EngineLink

RELIEF_S = 0.5
"""A replica that is down for no longer keeps its requests: it has their prefixes, and is soon back."""

log = structlog.get_logger("octavo.fleet")


class Timer(Protocol):
    """What a loop's `call_later` returns."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


class Fleet:
    """The edge's carrier for the addresses "scheduler" and "kv_allocator": one engine, or several behind a router.

    Args:
        links: to the engines.
        policy: which of them takes a request.
        call_later: the loop's, if not given.
    """

    def __init__(
        self, links: Sequence[EngineLink], policy: RoutingPolicy, *, call_later: CallLater | None = None
    ) -> None:
        self.links = links
        self._config = RouterConfig(num_replicas=len(links), policy=policy)
        self._router = RouterCore(self._config)
        self._is_up = [True] * len(links)
        self._call_later = call_later or _call_later
        self._reliefs: dict[int, Timer] = {}  # of replicas that are down
        self._owners: dict[RequestId, EngineLink] = {}
        for link in links:
            link.on_convicted = partial(self._warn_others, link)

    def size_caches(self, num_tokens: int) -> None:
        """How many tokens' KV each replica has room for, known once the model is loaded: before the first request."""
        assert not self._router.num_open
        most = chunks_worth_remembering(
            num_replicas=len(self.links), num_cached_tokens=num_tokens, chunk_tokens=self._config.chunk_tokens
        )
        if most < self._config.max_chunks:
            self._router = RouterCore(msgspec.structs.replace(self._config, max_chunks=most))
            for index, is_up in enumerate(self._is_up):
                if not is_up:
                    self._router.handle(ReplicaDown(index), 0)

    def post(self, message: Message) -> None:
        """Carry a message to the engine that it is about; one about no request goes to every engine.

        A request that cannot be carried ends, and no other with it.
        """
        if isinstance(message, SubmitRequest):
            try:
                self._submit(message)
            except Exception as error:
                log.exception("request.not_submitted", request_id=message.request_id)
                self._owners.get(message.request_id, self.links[0]).refuse(message, error)
        elif len(self.links) == 1:
            self.links[0].post(message)
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
        if self._is_up[index] == is_up:
            return
        self._is_up[index] = is_up
        self._router.handle(ReplicaUp(index) if is_up else ReplicaDown(index), 0)
        if is_up:
            self._cancel_relief(index)
        elif not self.links[index].is_gone and len(self.links) > 1:
            self._reliefs[index] = self._call_later(RELIEF_S, partial(self._relieve, index))

    def close(self) -> None:
        """Move nothing any more."""
        for index in list(self._reliefs):
            self._cancel_relief(index)

    def abandon(self, index: int) -> bool:
        """A replica is gone for good: what it had goes on elsewhere. False if there is nowhere."""
        lost = self.links[index]
        if lost.is_gone:
            return True
        messages = lost.give_up()
        if all(link.is_gone for link in self.links):
            return False
        self.set_up(index, is_up=False)
        self._cancel_relief(index)
        self._move(messages)
        return True

    def _cancel_relief(self, index: int) -> None:
        if (relief := self._reliefs.pop(index, None)) is not None:
            relief.cancel()

    def _relieve(self, index: int) -> None:
        """A replica has been down for a while: what it had goes on elsewhere, and does not wait until it has loaded."""
        if any(self._is_up):
            messages = self.links[index].relieve()
            if messages:
                log.warning("engine.relieved", engine=self.links[index].name, num_messages=len(messages))
            self._move(messages)
        # What comes, or others come back, meanwhile: who is down now may be the one that will be up first.
        self._reliefs[index] = self._call_later(RELIEF_S, partial(self._relieve, index))

    def _move(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, SubmitRequest):
                self._router.handle(RequestLeft(message.request_id), 0)
            self.post(message)

    def _warn_others(self, convicting: EngineLink, entry: RememberQuarantined) -> None:
        """A client that asks again is sent to another replica, whose executor dies of it as well.

        An engine that is not up hears of it when it is given what it had.
        """
        for link in self.links:
            if link is not convicting:
                link.send(entry)

    def _submit(self, submit: SubmitRequest) -> None:
        if len(self.links) == 1:
            self.links[0].post(submit)
            return
        for route in self._router.handle(submit, 0):
            owner = self.links[route.replica]
            if owner.is_gone:  # none is up: whichever comes back takes it
                others = [link for link in self.links if not link.is_gone]
                if not others:  # it was being tokenized when the last one went, and every stream ended
                    self._router.handle(RequestLeft(submit.request_id), 0)
                    return
                owner = others[0]
            self._owners[submit.request_id] = owner
            owner.post(submit)


def _call_later(delay_s: float, callback: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(delay_s, callback)
