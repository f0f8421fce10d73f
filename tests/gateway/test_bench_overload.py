from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from counting_clock import CountingClock
from fake_engine import FakeEngine
from http_client import serving

from octavo.gateway.bench_overload import Load, OverloadReport, print_overload
from octavo.gateway.lean_client import LeanClient
from octavo.messages.errors import OctavoError


@pytest.fixture(autouse=True)
def by_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.gateway.bench_overload.time", CountingClock())


def measure(engine: FakeEngine, **settings: object) -> OverloadReport:
    async def run() -> OverloadReport:
        async with serving(engine, **settings) as server:
            client = LeanClient(server.url)
            try:
                load = Load(client, 4, 3, seed=1)
                return await load.measure(concurrency=2, peak_s=0.4, factor=2.0, for_s=0.4)
            finally:
                client.close()

    return asyncio.run(run())


def test_every_request_of_the_load_is_answered_or_refused_and_the_report_adds_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = measure(FakeEngine(max_live=2))
    assert report.peak_goodput > 0 and report.num_answered > 0
    assert report.num_failed == report.num_without_retry_after == 0
    assert report.recovery_s is not None
    if report.num_refused:
        at_socket, read = report.refusals, report.refusals_read
        assert at_socket.p50_s is not None and at_socket.max_s is not None and read.max_s is not None
        assert at_socket.p50_s <= at_socket.max_s <= read.max_s
    print_overload(report)
    assert "goodput" in capsys.readouterr().out


def test_an_answer_that_is_neither_a_result_nor_a_refusal_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    submit: Callable[..., object] = engine.submit
    overload = Load._overload
    is_due = False

    async def overload_with_defect(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_due
        is_due = True
        return await overload(*args, **kwargs)

    def fail_once(*args: object, **kwargs: object) -> object:
        nonlocal is_due
        if is_due:
            is_due = False
            raise RuntimeError("a defect")
        return submit(*args, **kwargs)

    engine.submit = fail_once  # type: ignore[method-assign,assignment]  # a defect, for once on purpose
    monkeypatch.setattr(Load, "_overload", overload_with_defect)
    monkeypatch.setattr("octavo.gateway.api.server.log.exception", lambda *args, **kwargs: None)
    report = measure(engine)
    assert not report.is_passed and report.num_failed > 0 and "500" in report.failures[0]


def test_a_server_that_answers_nothing_is_told_of() -> None:
    engine = FakeEngine()
    engine.refuse_with = ("invalid_request", "no")
    with pytest.raises(OctavoError, match="does not answer"):
        measure(engine)
