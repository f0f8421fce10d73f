from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import aiohttp
import msgspec
import pytest
from fake_engine import FakeEngine, answer_for
from http_client import serving
from tqdm import tqdm

from octavo.gateway.chaos.cli import add_chaos
from octavo.gateway.chaos.faults import FaultKind, FaultNotDeliveredError
from octavo.gateway.chaos.report import ChaosReport
from octavo.gateway.chaos.run import (
    ChaosPlan,
    ChaosRun,
    Totals,
    can_crash_by_request,
    connected,
    parse_totals,
    scrape_totals,
)
from octavo.gateway.chaos.workload import ask_served_model, make_recipes
from octavo.gateway.flag_parser import Parser
from octavo.messages.errors import OctavoError


class ScriptedInjector:
    """Calls a function instead of killing anybody."""

    def __init__(self, fault: Callable[[], None], *, recovers: bool = True) -> None:
        self._fault = fault
        self._recovers = recovers
        self.hit: list[tuple[str, str]] = []
        self.is_closed = False

    async def inject(self, actor: str, kind: FaultKind) -> str:
        self._fault()
        self.hit.append((actor, kind))
        return actor

    async def has_recovered(self) -> bool:
        return self._recovers or not self.hit

    async def close(self) -> None:
        self.is_closed = True


PLAN = ChaosPlan(
    victims=("executor", "engine"),
    kinds=("KILL", "STOP"),
    num_streams=6,
    times=5,
    for_s=0.0,
    seed=3,
    every_s=0.01,
    give_up_s=120.0,
)


async def run_chaos(session: aiohttp.ClientSession, injector: ScriptedInjector, plan: ChaosPlan = PLAN) -> ChaosReport:
    model = await ask_served_model(session)
    run = ChaosRun(session, plan, make_recipes(model, plan.num_streams, seed=plan.seed, max_output_len=60))
    with tqdm(disable=True) as bar:
        await run.record(bar)
        await run.disturb(injector, bar)
    assert injector.is_closed
    return run.report(Totals(), await scrape_totals(session), 1.0)


def run_against(
    engine: FakeEngine, fault: Callable[[], None], **options: object
) -> tuple[ChaosReport, ScriptedInjector]:
    plan = msgspec.structs.replace(PLAN, **options)
    injector = ScriptedInjector(fault)

    async def run() -> ChaosReport:
        async with serving(engine) as client:
            async with connected(client.url, None) as session:
                return await run_chaos(session, injector, plan)

    return asyncio.run(run()), injector


def test_a_server_that_loses_nothing_passes_and_every_fault_is_counted() -> None:
    report, injector = run_against(FakeEngine(), lambda: None)
    assert report.is_passed and report.failures == report.problems == []
    assert report.num_started == report.num_finished == report.num_identical >= PLAN.num_streams
    assert report.num_faults == 5 == sum(report.faults.values()) == len(injector.hit)
    assert {actor for actor, _ in injector.hit} <= {"executor", "engine"}
    assert report.stall.num_streams > 0 and report.num_unstable_recipes == 0


def test_the_same_seed_hits_the_same_victims() -> None:
    (_, first), (_, second) = (run_against(FakeEngine(), lambda: None) for _ in range(2))
    assert first.hit == second.hit


def test_one_altered_token_fails_the_run() -> None:
    state = {"shift": 0}

    def answer(prompt_ids: Sequence[int], index: int) -> bytes:
        text = answer_for(prompt_ids, index)
        if state["shift"] == 1:
            state["shift"] = 2
            return text[:5] + bytes((text[5] ^ 1,)) + text[6:]
        return text

    def alter() -> None:
        state["shift"] = max(1, state["shift"])

    report, _ = run_against(FakeEngine(answer=answer), alter)
    assert not report.is_passed
    assert report.num_finished == report.num_started
    assert report.num_identical == report.num_started - 1
    assert len(report.failures) == 1


def test_one_stream_that_ends_with_an_error_fails_the_run() -> None:
    engine = FakeEngine()

    def break_one() -> None:
        engine.fail_after = 0
        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(heal))

    def heal() -> None:
        engine.fail_after = None

    report, _ = run_against(engine, break_one)
    assert not report.is_passed
    assert report.num_finished < report.num_started
    assert any("request_failed" in failure for failure in report.failures)


def test_clients_that_hear_nothing_any_more_fail_the_run() -> None:
    engine = FakeEngine()

    def hang() -> None:
        engine._by_hand = True

    report, _ = run_against(engine, hang, give_up_s=1.0)
    assert not report.is_passed and report.num_faults < 5
    assert any("heard nothing" in problem for problem in report.problems)


def test_who_has_recovered_by_the_last_moment_counts_though_nobody_had_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    async def slow_at_first(injector: ScriptedInjector) -> bool:
        looks.append(len(injector.hit))
        if looks.count(2) == 1 and looks[-1] == 2:
            for _ in range(2000):  # in which every seat hears something
                await asyncio.sleep(0)
            raise TimeoutError  # as when the time has come to give it up
        return True

    monkeypatch.setattr(ScriptedInjector, "has_recovered", slow_at_first)
    report, _ = run_against(FakeEngine(), lambda: None)
    assert report.is_passed and report.problems == [] and report.num_faults == 5
    assert looks.count(2) == 2


def test_a_fault_that_hits_nobody_fails_the_run() -> None:
    def miss() -> None:
        raise FaultNotDeliveredError("nobody there")

    report, _ = run_against(FakeEngine(), miss)
    assert not report.is_passed and report.problems == ["nobody there"] and report.num_faults == 0


def test_a_run_by_time_ends_and_passes() -> None:
    report, injector = run_against(FakeEngine(), lambda: None, times=None, for_s=0.3)
    assert report.is_passed and report.num_faults == len(injector.hit) > 0


def test_restarts_and_requeues_are_read_from_metrics() -> None:
    totals = parse_totals(
        "# TYPE octavo:actor_restarts counter\n"
        'octavo:actor_restarts_total{actor="executor",model_name="m",engine="0"} 3.0\n'
        'octavo:actor_restarts_total{actor="executor",model_name="m",engine="1"} 1.0\n'
        'octavo:actor_restarts_total{actor="engine",model_name="m",engine="0"} 0.0\n'
        "# TYPE octavo:requests_requeued counter\n"
        'octavo:requests_requeued_total{model_name="m",engine="0"} 64.0\n'
        "# TYPE octavo:messages_dropped counter\n"
        'octavo:messages_dropped_total{reason="late"} 2.0\n'
        'octavo:messages_dropped_total{reason="repeated"} 5.0\n'
    )
    assert totals == Totals({"executor": 4, "engine": 0}, 64, 7, 0)


class CrashableEngine(FakeEngine):
    def __init__(self) -> None:
        super().__init__()
        self.crashed: list[str] = []

    def crash_actor(self, actor: str) -> None:
        self.crashed.append(actor)


def test_actors_are_failed_by_request_only_where_the_server_was_started_for_it() -> None:
    async def run() -> None:
        engine = CrashableEngine()
        async with serving(engine) as client:
            assert (await client.post("/debug/crash", {"actor": "tokenizer"})).status == 404
        async with serving(engine, enable_fault_injection=True) as client:
            assert (await client.post("/debug/crash", {"actor": "tokenizer"})).json == {"crashed": "tokenizer"}
            for wrong in ({"actor": "gateway"}, {"actor": 1}, {}):
                assert (await client.post("/debug/crash", wrong)).status == 400
            async with connected(client.url, None) as session:
                assert await can_crash_by_request(session)
        assert engine.crashed == ["tokenizer"]
        async with serving(FakeEngine(), enable_fault_injection=True) as client:
            answer = await client.post("/debug/crash", {"actor": "tokenizer"})
            assert (answer.status, answer.error["code"]) == (501, "not_implemented")
        async with serving(engine, enable_fault_injection=True, api_keys=("secret",)) as client:
            assert (await client.post("/debug/crash", {"actor": "tokenizer"})).status == 401

    asyncio.run(run())


def test_without_a_server_the_command_says_so() -> None:
    parser = Parser(prog="octavo")
    add_chaos(parser.add_subparsers(parser_class=Parser))
    arguments = parser.parse_args(["chaos", "--url", "http://127.0.0.1:9", "--kill", "engine", "--times", "1"])
    with pytest.raises(OctavoError, match="start one with"):
        arguments.run(arguments)
