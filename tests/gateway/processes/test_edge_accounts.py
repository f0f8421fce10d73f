from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from octavo.gateway.processes import edge_accounts
from octavo.gateway.processes.edge_accounts import AccountLine, AccountSum
from octavo.gateway.stats import EngineStats
from octavo.messages.processes import AccountAsked, AccountTold, EdgeAccount
from octavo.messages.samples import SampleFamily

OWN = EngineStats(**{**dict.fromkeys(EngineStats.__struct_fields__[:11], 0), "num_live": 7})


def account(
    name: str, incarnation: int, *, asked: float = 0.0, gaps: Sequence[float] = (), num_open: float = 0.0
) -> EdgeAccount:
    """Of requests, of a histogram's two buckets, and of what is open."""
    families = [SampleFamily("asked", (("asked_total", (("path", "/v1"),), asked),))]
    if gaps:
        bounds = zip(("1.0", "+Inf"), gaps, strict=True)
        samples = tuple(("gap_bucket", (("le", bound),), value) for bound, value in bounds)
        families.append(SampleFamily("gap", samples))
    families.append(SampleFamily("open", (("open", (), num_open),), only_grows=False))
    return EdgeAccount(name, incarnation, int(num_open), tuple(families))


def values(accounts: AccountSum) -> dict[str, list[float]]:
    return {family.name: [value for _, _, value in family.samples] for family in accounts.of_others()}


def test_the_sum_is_of_the_latest_account_of_each_edge() -> None:
    accounts = AccountSum()
    accounts.note(account("edge 1", 1, asked=3, gaps=(1, 2), num_open=2))
    accounts.note(account("edge 1", 1, asked=5, gaps=(1, 4), num_open=1))
    accounts.note(account("edge 2", 1, asked=10, num_open=4))
    assert values(accounts) == {"asked": [15], "gap": [1, 4], "open": [5]}
    assert accounts.num_live_of_others == 5


def test_what_an_edge_had_counted_outlives_it_and_what_it_had_open_does_not() -> None:
    accounts = AccountSum()
    accounts.note(account("edge 1", 1, asked=5, gaps=(1, 4), num_open=3))
    accounts.forget("edge 1", 1)
    assert values(accounts) == {"asked": [5], "gap": [1, 4]}
    accounts.note(account("edge 1", 1, asked=6, num_open=9))  # it was on its way
    assert values(accounts) == {"asked": [5], "gap": [1, 4]} and accounts.num_live_of_others == 0
    accounts.note(account("edge 1", 2, asked=2, num_open=1))
    accounts.forget("edge 1", 1)  # said again
    assert values(accounts) == {"asked": [7], "gap": [1, 4], "open": [1]}
    accounts.note(account("edge 1", 3, asked=1))  # that the one before has ended was not said
    assert values(accounts)["asked"] == [8]
    accounts.note(account("edge 1", 2, asked=100))
    assert values(accounts)["asked"] == [8]


class Server:
    """Of an edge."""

    def own_families(self, own_stats: EngineStats) -> tuple[SampleFamily, ...]:
        return account("edge 1", 4, asked=own_stats.num_live).families

    def render_whole(self) -> bytes:
        return b"all of it"

    def num_live_of_all(self) -> int:
        return 12


def test_an_edge_that_asks_is_told_of_all_and_has_told_of_itself_before() -> None:
    async def main() -> None:
        accounts = AccountSum()
        sent: list[Any] = []
        line = AccountLine("edge 1", 4, sent.append, lambda: OWN)
        line.attach(Server())
        asking = asyncio.ensure_future(line.ask())
        await asyncio.sleep(0)
        told_of_itself, asked = sent
        accounts.note(told_of_itself)
        assert accounts.answer(asked) is None, "edge 0 does not serve yet"
        accounts.attach(Server())
        line.take(AccountTold(asked.number + 1, b"not asked", 0))
        answer = accounts.answer(asked)
        assert answer is not None
        line.take(answer)
        assert await asking == AccountTold(asked.number, b"all of it", 12)
        assert values(accounts)["asked"] == [7] and accounts.num_live_of_others == 7
        line.take(answer)  # once more, and too late
        assert accounts.is_whole and not line.is_whole and (accounts.edge, line.edge) == ("0", "1")

    asyncio.run(main())


def test_an_edge_that_is_not_told_in_time_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_accounts, "ASK_S", 0.0)

    async def main() -> None:
        sent: list[Any] = []
        line = AccountLine("edge 1", 4, sent.append, lambda: OWN)
        assert await line.ask() is None
        assert sent == [AccountAsked(1)], "there is no server to tell of"
        line.take(AccountTold(1, b"late", 0))

    asyncio.run(main())
