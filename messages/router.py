"""Between the front end, the router and the replicas of an engine."""

from __future__ import annotations

from .base import Message
from .ids import RequestId
from .request import SubmitRequest


class RouteRequest(Message, frozen=True):
    """Router -> one replica's scheduler: this request is yours until its `RequestEnded`."""

    replica: int
    submit: SubmitRequest


class RequestLeft(Message, frozen=True):
    """Replica -> router: a routed request ended there, whatever its end, or goes elsewhere; unknown ids are ignored."""

    request_id: RequestId


class ReplicaDown(Message, frozen=True):
    """Supervisor -> router: send nothing more to this replica for now; what it has stays until its `RequestLeft`."""

    replica: int


class ReplicaUp(Message, frozen=True):
    """Supervisor -> router: this replica takes requests (again)."""

    replica: int
