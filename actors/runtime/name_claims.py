"""Who may use which name: what was announced, who waits for a name that somebody has, and who had it before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from .envelope import Hello
from .incoming_link import IncomingLink

MAX_PARKED: Final = 4
"""Claims to one name that wait; and links that had it, which may come back where they were."""


class Claim(NamedTuple):
    """A hello, and the connection that it came by.

    Attributes:
        descriptor, inode: of the connection; -1 and 0: not known.
    """

    hello: Hello
    incarnation: int
    routing_id: bytes
    key: str
    descriptor: int
    inode: int


class NameClaims:
    """Keeps apart what is known of names (`announce`) and what peers say of themselves.

    Anybody who may connect can claim any incarnation, the highest of all as well. So a claim makes no older one stale,
    and displaces nobody who is connected: it waits, until it is announced or the other's connection has ended.
    """

    def __init__(self) -> None:
        self._announced: dict[str, int] = {}
        self._parked: dict[str, list[Claim]] = {}
        self._aside: dict[str, list[IncomingLink]] = {}

    def announce(self, name: str, incarnation: int) -> None:
        """From now on a name's older incarnations are stale."""
        if incarnation > self._announced.get(name, -1):
            self._announced[name] = incarnation
            for link in self._aside.pop(name, []):
                if link.incarnation < incarnation:
                    link.is_stale = True
                else:
                    self._aside.setdefault(name, []).append(link)

    def announced(self, name: str) -> int:
        """The newest incarnation that is known of; -1: none."""
        return self._announced.get(name, -1)

    def forget(self, name: str) -> None:
        """Keep nothing of a name but the claims to it that wait."""
        self._announced.pop(name, None)
        for link in self._aside.pop(name, []):
            link.is_stale = True

    @property
    def has_parked(self) -> bool:
        return bool(self._parked)

    def park(self, claim: Claim, is_open: Callable[[Claim], bool]) -> bool:
        """Let a claim wait; False: too many do.

        Args:
            is_open: whether the connection of a claim is there still.
        """
        name = claim.hello.name
        others = [
            other
            for other in self._parked.get(name, [])
            if other.routing_id != claim.routing_id
            and (other.hello.session, other.incarnation) != (claim.hello.session, claim.incarnation)
            and is_open(other)
        ]
        has_room = len(others) < MAX_PARKED
        self._parked[name] = [*others, claim] if has_room else others
        return has_room

    def take_parked(self) -> list[Claim]:
        """All that wait, to be judged again; those that were announced first, then in order of arrival."""
        parked, self._parked = self._parked, {}
        claims = [claim for of_name in parked.values() for claim in of_name]
        return sorted(claims, key=lambda claim: claim.incarnation != self.announced(claim.hello.name))

    def set_aside(self, link: IncomingLink) -> None:
        """A link has lost its name and is not stale: its process may come back, and goes on where it was."""
        links = self._aside.setdefault(link.name, [])
        links.append(link)
        if len(links) > MAX_PARKED:
            links.pop(0).is_stale = True

    def take_aside(self, claim: Claim) -> IncomingLink | None:
        """The link that the same process had before, if there is one."""
        links = self._aside.get(claim.hello.name, [])
        for link in links:
            if (link.session, link.incarnation) == (claim.hello.session, claim.incarnation):
                links.remove(link)
                return link
        return None
