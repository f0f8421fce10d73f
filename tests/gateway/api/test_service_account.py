from __future__ import annotations

import asyncio

import msgspec
from fake_engine import FakeEngine
from http_client import serving
from prometheus_client.parser import text_string_to_metric_families

from octavo.gateway.api.context import GatewayContext
from octavo.gateway.api.service_account import OwnAccount
from octavo.gateway.api.settings import ServerSettings
from octavo.messages.processes import AccountTold
from octavo.messages.samples import SampleFamily

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Account:
    """What an edge knows of others."""

    def __init__(self, edge: str, *, is_whole: bool, told: AccountTold | None = None) -> None:
        self.edge = edge
        self.is_whole = is_whole
        self.others: tuple[SampleFamily, ...] = ()
        self.num_live_of_others = 0
        self.own: OwnAccount | None = None
        self._told = told

    def attach(self, own: OwnAccount) -> None:
        self.own = own

    def of_others(self) -> tuple[SampleFamily, ...]:
        return self.others

    async def ask(self) -> AccountTold | None:
        return self._told


class EngineOfMany(FakeEngine):
    """Serves beside others."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self.service_account = account


def values_of(text: bytes) -> Values:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def http_requests(found: Values) -> dict[str, float]:
    """By handler."""
    return {dict(labels)["handler"]: value for (name, labels), value in found.items() if name == "http_requests_total"}


async def account_of_an_edge() -> tuple[SampleFamily, ...]:
    """What an edge has to tell that has answered two completions and a list of models."""
    account = Account("1", is_whole=False)
    engine = EngineOfMany(account)
    async with serving(engine) as client:
        for _ in range(2):
            assert (await client.complete(max_tokens=4)).status == 200
        assert (await client.get("/v1/models")).status == 200
        assert account.own is not None
        return account.own.own_families(msgspec.structs.replace(engine.stats(), generation_tokens=0))


def test_edge_0_tells_the_sum_with_what_only_others_have_seen_and_each_process_by_itself() -> None:
    async def main() -> None:
        account = Account("0", is_whole=True)
        account.num_live_of_others = 3
        async with serving(EngineOfMany(account)) as client:
            assert (await client.complete(max_tokens=4)).status == 200
            alone = values_of((await client.get("/metrics")).body)
            account.others = await account_of_an_edge()
            whole = values_of((await client.get("/metrics")).body)
            assert (await client.get("/load")).json == {"server_load": 3}
        labels = (("engine", "0"), ("model_name", "fake/bytes"))
        assert http_requests(alone) == {"/v1/completions": 1.0}
        assert http_requests(whole) == {"/v1/completions": 3.0, "/v1/models": 1.0, "/metrics": 1.0}
        for name, each in {
            "vllm:e2e_request_latency_seconds_count": 1,
            "vllm:inter_token_latency_seconds_count": 3,
            "vllm:request_generation_tokens_sum": 4,
        }.items():
            assert (alone[name, labels], whole[name, labels]) == (each, 3 * each)
        buckets = [value for (name, _), value in whole.items() if name == "vllm:request_generation_tokens_bucket"]
        assert buckets == sorted(buckets) and buckets[-1] == 3.0
        # The engine's own account is of all edges already.
        assert whole["vllm:generation_tokens_total", labels] == alone["vllm:generation_tokens_total", labels]
        assert whole["vllm:engine_healthy", labels] == 1.0
        assert ("vllm:kv_cache_usage_perc", labels) in whole
        of_processes = {name: set() for name, _ in whole if name.startswith(("process_", "python_info"))}
        for name, labels in whole:
            if name in of_processes:
                of_processes[name].add(dict(labels)["edge"])
        assert of_processes and all(edges == {"0", "1"} for edges in of_processes.values())

    asyncio.run(main())


def test_another_edge_passes_on_what_edge_0_tells() -> None:
    async def main() -> None:
        account = Account("1", is_whole=False, told=AccountTold(1, b"all of it", 12))
        async with serving(EngineOfMany(account)) as client:
            assert (await client.get("/metrics")).body == b"all of it"
            assert (await client.get("/load")).json == {"server_load": 12}

    asyncio.run(main())


def test_another_edge_that_hears_nothing_tells_what_it_knows_and_that_it_is_one_edge_of_several() -> None:
    async def main() -> None:
        async with serving(EngineOfMany(Account("1", is_whole=False))) as client:
            assert (await client.complete(max_tokens=4)).status == 200
            found = values_of((await client.get("/metrics")).body)
            assert http_requests(found) == {"/v1/completions": 1.0}
            assert {dict(labels)["edge"] for _, labels in found} == {"1"}
            assert (await client.get("/load")).json == {"server_load": 0}

    asyncio.run(main())


def test_the_only_edge_has_no_label_of_its_own() -> None:
    async def main() -> None:
        async with serving(FakeEngine()) as client:
            found = values_of((await client.get("/metrics")).body)
            assert not any("edge" in dict(labels) for _, labels in found)
        assert isinstance(GatewayContext(FakeEngine(), ServerSettings()).render_whole(), bytes)

    asyncio.run(main())
