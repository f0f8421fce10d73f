"""Between edge 0 and the nodes: other hosts, which lend it processes for executors."""

from __future__ import annotations

from .base import Message


class NodeJoined(Message, frozen=True):
    """Node -> edge 0: it is there; its first message.

    Attributes:
        name, incarnation: of the node; each time that it joins it is a new incarnation.
        endpoint: where it listens.
        server_key: its CURVE public key, which its executors have as well; empty on plain loopback.
        num_slots: executors that it takes; 0 for any number.
        rank: among the nodes, for a launcher that numbers them; -1 if none does.
        world_size: nodes that the launcher starts; 0 if there is none.
    """

    name: str
    incarnation: int
    endpoint: str
    server_key: str
    num_slots: int
    rank: int = -1
    world_size: int = 0


class PrepareNode(Message, frozen=True):
    """Edge 0 -> node: welcome; find this model.

    Attributes:
        model, revision: as edge 0 was asked for them.
        digest: of the checkpoint; the node's must be the same.
    """

    model: str | None
    revision: str | None
    digest: str


class NodePrepared(Message, frozen=True):
    """Node -> edge 0: it has the model, and starts what it is told to."""

    incarnation: int


class NodeUnfit(Message, frozen=True):
    """Node -> edge 0: it cannot serve this model, and ends.

    Attributes:
        why: for people.
    """

    incarnation: int
    why: str


class NodeLeft(Message, frozen=True):
    """Node -> edge 0: it was told to end; its executors end with it."""

    incarnation: int


class JoinAgain(Message, frozen=True):
    """Edge 0 -> node: you were taken for dead, and your executors replaced; end them and join as a new incarnation."""

    incarnation: int


class StartOnNode(Message, frozen=True):
    """Edge 0 -> node: start an executor.

    Attributes:
        child, incarnation: which.
        spec: an `ExecutorProcessSpec`, msgpack; what depends on the host (paths, addresses, keys) is the node's to add.
    """

    child: str
    incarnation: int
    spec: bytes


class KillOnNode(Message, frozen=True):
    """Edge 0 -> node: end an executor at once."""

    child: str
    incarnation: int
    signum: int


class StartedOnNode(Message, frozen=True):
    """Node -> edge 0: an executor runs."""

    child: str
    incarnation: int
    pid: int


class ExitedOnNode(Message, frozen=True):
    """Node -> edge 0: an executor has ended, or could not be started.

    Attributes:
        is_innocent: as of `ProcessExited`.
    """

    child: str
    incarnation: int
    why: str
    is_innocent: bool = False


class Listening(Message, frozen=True):
    """Engine or executor -> edge 0: where it listens to other hosts.

    Attributes:
        child, incarnation: which.
        endpoint: `tcp://host:port`; empty of an executor that listens to its own host alone.
        meet_at: of the first rank of a group on several hosts: where the others meet it.
    """

    child: str
    incarnation: int
    endpoint: str
    meet_at: str = ""


class MeetAt(Message, frozen=True):
    """Edge 0 -> executor: where the ranks of its group meet.

    Attributes:
        init_method: `tcp://host:port` of the first rank.
    """

    init_method: str
