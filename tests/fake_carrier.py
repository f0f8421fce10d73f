"""A stand-in for an edge's port: remembers what was sent, and to whom it was connected."""

from __future__ import annotations

from octavo.actors.runtime.port import UnsendableError
from octavo.messages.base import Message


class FakeCarrier:
    """Has what an `EngineLink` uses of an `AsyncioPort`, and of its port.

    Attributes:
        sent: `(peer, incarnation, message)`, in order.
        expected: the incarnation of each peer that was expected last.
        vouched: the key of each peer that was vouched for, and the incarnation that was expected of it then.
        is_full: whether `send` refuses.
        unsendable: messages at which `send` raises.
        forgotten: peers of which nothing is to be kept.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, Message]] = []
        self.is_full = False
        self.unsendable: list[Message] = []
        self.forgotten: list[str] = []
        self.port = self
        self.incarnations: dict[str, int] = {}
        self.expected: dict[str, int] = {}
        self.vouched: dict[str, tuple[str, int]] = {}

    def connect(self, peer: str, incarnation: int, endpoint: str, *, server_key: bytes = b"") -> None:
        self.incarnations[peer] = incarnation

    def vouch(self, peer: str, key: str) -> None:
        """Whoever speaks for a peer is who the test says."""
        self.vouched[peer] = (key, self.expected.get(peer, 0))

    def expect(self, peer: str, incarnation: int) -> None:
        """Which incarnations may speak is for the test to say."""
        self.expected[peer] = incarnation

    def forget(self, peer: str) -> bool:
        self.disconnect(peer)
        self.forgotten.append(peer)
        return True

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
