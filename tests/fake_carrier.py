"""A stand-in for an edge's port: remembers what was sent, and to whom it was connected."""

from __future__ import annotations

from octavo.actors.runtime.port import UnsendableError
from octavo.messages.base import Message


class FakeCarrier:
    """Has what an `EngineLink` uses of an `AsyncioPort`, and of its port.

    Attributes:
        sent: `(peer, incarnation, message)`, in order.
        is_full: whether `send` refuses.
        unsendable: messages at which `send` raises.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, Message]] = []
        self.is_full = False
        self.unsendable: list[Message] = []
        self.port = self
        self.incarnations: dict[str, int] = {}

    def connect(self, peer: str, incarnation: int, endpoint: str, *, server_key: bytes = b"") -> None:
        self.incarnations[peer] = incarnation

    def vouch(self, peer: str, key: str) -> None:
        """Whoever speaks for a peer is who the test says."""

    def expect(self, peer: str, incarnation: int) -> None:
        """Which incarnations may speak is for the test to say."""

    def disconnect(self, peer: str) -> None:
        self.incarnations.pop(peer, None)

    def send(self, peer: str, message: Message) -> bool:
        if message in self.unsendable:
            raise UnsendableError("it is too long")
        if self.is_full or peer not in self.incarnations:
            return False
        self.sent.append((peer, self.incarnations[peer], message))
        return True

    def take_sent(self, peer: str) -> list[Message]:
        """What was sent to a peer since the last look."""
        taken = [message for name, _, message in self.sent if name == peer]
        self.sent = [entry for entry in self.sent if entry[0] != peer]
        return taken
