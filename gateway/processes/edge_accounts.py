"""What the edges of `--gateways N` count, each for itself, as one account of the whole service.

Every further edge sends its own account to edge 0 now and then, and before it asks for the whole. Whoever asks any edge
for metrics hears edge 0's sum, in which the counters of edges that have ended stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from ...messages.processes import AccountAsked, AccountTold, EdgeAccount
from ...messages.samples import SampleFamily, SampleKey

if TYPE_CHECKING:
    from ..api.service_account import OwnAccount
    from ..stats import EngineStats

ASK_S: Final = 0.5
"""How long an edge waits for edge 0 to tell; then it tells what it knows itself."""


class AccountSum:
    """At edge 0: the accounts of the other edges.

    Attributes:
        edge: whose place this is.
        is_whole: there is no other place where more is known.
    """

    edge: Final = "0"
    is_whole: Final = True

    def __init__(self) -> None:
        self._own: OwnAccount | None = None
        self._latest: dict[str, EdgeAccount] = {}
        self._ended: dict[str, int] = {}  # the latest incarnation of each edge that has ended
        self._earlier: dict[str, dict[SampleKey, float]] = {}  # by family, of edges that have ended

    def attach(self, own: OwnAccount) -> None:
        """The server of this process tells for all."""
        self._own = own

    def note(self, account: EdgeAccount) -> None:
        """Take the latest account of another edge."""
        name = account.name
        if account.incarnation <= self._ended.get(name, 0):
            return
        known = self._latest.get(name)
        if known is not None and known.incarnation != account.incarnation:
            if account.incarnation < known.incarnation:
                return
            self.forget(name, known.incarnation)
        self._latest[name] = account

    def forget(self, name: str, incarnation: int) -> None:
        """An edge has ended: what it had counted stays, what it had open does not."""
        self._ended[name] = max(incarnation, self._ended.get(name, 0))
        known = self._latest.get(name)
        if known is None or known.incarnation > incarnation:
            return
        del self._latest[name]
        _add(self._earlier, (family for family in known.families if family.only_grows))

    def of_others(self) -> tuple[SampleFamily, ...]:
        """The sum over all other edges."""
        totals = {family: dict(samples) for family, samples in self._earlier.items()}
        _add(totals, (family for account in self._latest.values() for family in account.families))
        return tuple(
            SampleFamily(family, tuple((*key, value) for key, value in samples.items()))
            for family, samples in totals.items()
        )

    @property
    def num_live_of_others(self) -> int:
        """Sequences that clients of other edges wait for."""
        return sum(account.num_live for account in self._latest.values())

    def answer(self, asked: AccountAsked) -> AccountTold | None:
        """The whole account; None before there is a server that has one."""
        if self._own is None:
            return None
        return AccountTold(asked.number, self._own.render_whole(), self._own.num_live_of_all())

    async def ask(self) -> AccountTold | None:
        return self.answer(AccountAsked(0))


class AccountLine:
    """At a further edge: tells edge 0 what it counts, and asks it for the whole.

    Args:
        name, incarnation: of this edge.
        send: says something to edge 0.
        own_stats: what this edge counts of an engine's account, without what engines told.

    Attributes:
        edge: this edge's number.
    """

    is_whole: Final = False

    def __init__(
        self,
        name: str,
        incarnation: int,
        send: Callable[[EdgeAccount | AccountAsked], object],
        own_stats: Callable[[], EngineStats],
    ) -> None:
        self._own_stats = own_stats
        self.edge = name.removeprefix("edge ")
        self._name = name
        self._incarnation = incarnation
        self._send = send
        self._own: OwnAccount | None = None
        self._number = 0
        self._asking: dict[int, asyncio.Future[AccountTold]] = {}

    def attach(self, own: OwnAccount) -> None:
        """The server of this process is the one to tell of."""
        self._own = own

    def of_others(self) -> tuple[SampleFamily, ...]:
        return ()

    @property
    def num_live_of_others(self) -> int:
        return 0

    def tell(self) -> None:
        """Have edge 0 know what this edge has counted until now."""
        if self._own is not None:
            stats = self._own_stats()
            families = self._own.own_families(stats)
            self._send(EdgeAccount(self._name, self._incarnation, stats.num_live, families))

    async def ask(self) -> AccountTold | None:
        """The account of all edges; None if edge 0 does not tell in time."""
        self._number += 1
        number = self._number
        told: asyncio.Future[AccountTold] = asyncio.get_running_loop().create_future()
        self._asking[number] = told
        try:
            self.tell()
            self._send(AccountAsked(number))
            async with asyncio.timeout(ASK_S):
                return await told
        except TimeoutError:
            return None
        finally:
            del self._asking[number]

    def take(self, told: AccountTold) -> None:
        """Edge 0 has told."""
        waiting = self._asking.get(told.number)
        if waiting is not None and not waiting.done():
            waiting.set_result(told)


def _add(totals: dict[str, dict[SampleKey, float]], families: Iterable[SampleFamily]) -> None:
    for family in families:
        samples = totals.setdefault(family.name, {})
        for name, labels, value in family.samples:
            samples[name, labels] = samples.get((name, labels), 0.0) + value
