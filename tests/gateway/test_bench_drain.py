from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engines import save_servable

from octavo.gateway.bench_drain import DrainPlan, _reserved_port, _Seen, drain, print_drain, report_of
from octavo.gateway.chaos.workload import ChoiceOutput, StreamOutput
from octavo.messages.errors import OctavoError

FLAGS = ("--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "4096", "--block-size", "4")
NUM_STREAMS = 24
PLAN = DrainPlan(num_streams=2, num_tokens=8, limit_s=30.0)
SEEN = _Seen(unready_s=0.01, is_refused_in_words=True, exit_s=5.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder, max_position_embeddings=8192)
    return folder


def test_a_port_is_nobody_elses_until_a_server_listens_there_or_several_do() -> None:
    with _reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port)):
            pass
        with socket.create_server(("127.0.0.1", port), reuse_port=True):
            socket.create_server(("127.0.0.1", port), reuse_port=True).close()


@pytest.mark.parametrize("flags", [("--max-num-seqs", "16"), ("--gateways", "2")], ids=["one edge", "two edges"])
def test_a_server_that_is_told_to_stop_lets_all_streams_end_and_leaves_no_process(
    model: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    plan = DrainPlan(serve_flags=(str(model), *FLAGS, *flags), num_streams=NUM_STREAMS, num_tokens=800, limit_s=120.0)
    report = asyncio.run(drain(plan))
    assert (report.num_finished, report.num_told, report.num_dropped) == (NUM_STREAMS, 0, 0), report.failures
    assert (report.exit_code, report.num_left) == (0, 0)
    assert report.is_refused_in_words is not False
    print_drain(report)
    assert f"{NUM_STREAMS} / 0 / 0" in capsys.readouterr().out


def test_streams_for_which_there_is_no_time_are_told_so_and_none_is_dropped(model: Path) -> None:
    plan = DrainPlan(
        serve_flags=(str(model), *FLAGS, "--max-model-len", "8192", "--in-process"),
        num_streams=NUM_STREAMS,
        num_tokens=8000,
        limit_s=0.5,
    )
    report = asyncio.run(drain(plan))
    assert report.num_told == NUM_STREAMS and report.num_dropped == 0, report.failures
    assert (report.exit_code, report.num_left) == (0, 0)


def test_streams_that_are_refused_prove_nothing_and_are_told_of(model: Path) -> None:
    plan = DrainPlan(
        serve_flags=(str(model), *FLAGS, "--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--in-process"),
        num_streams=NUM_STREAMS,
        num_tokens=2000,
        limit_s=30.0,
    )
    with pytest.raises(OctavoError, match="status 429"):
        asyncio.run(drain(plan))


def test_a_server_that_does_not_start_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(OctavoError, match="did not start"):
        asyncio.run(drain(msgspec.structs.replace(PLAN, serve_flags=(str(tmp_path / "nothing"),))))


def output(error: str = "", num_tokens: int = 8) -> StreamOutput:
    return StreamOutput([ChoiceOutput()], num_output_tokens=num_tokens, error=error)


def test_a_drain_in_which_nobody_loses_anything_is_passed() -> None:
    assert report_of(PLAN, [output(), output()], SEEN).is_passed
    late = msgspec.structs.replace(SEEN, exit_s=30.5)
    assert report_of(PLAN, [output(), output("server_shutdown: ask again")], late).is_passed
    assert report_of(PLAN, [output(), output()], msgspec.structs.replace(SEEN, is_refused_in_words=None)).is_passed


@pytest.mark.parametrize(
    "seen",
    [
        {"unready_s": 0.2},
        {"is_refused_in_words": False},
        {"exit_s": 33.0},
        {"exit_code": 1},
        {"num_left": 1},
    ],
    ids=str,
)
def test_a_server_that_does_not_end_as_it_should_fails_the_run(seen: dict[str, Any]) -> None:
    assert not report_of(PLAN, [output(), output()], msgspec.structs.replace(SEEN, **seen)).is_passed


@pytest.mark.parametrize(
    "lost",
    [output("ClientPayloadError: reset"), output(num_tokens=7), output("server_shutdown: though there was time")],
    ids=["dropped", "short", "cut early"],
)
def test_a_stream_that_lost_anything_within_the_limit_fails_the_run(lost: StreamOutput) -> None:
    report = report_of(PLAN, [output(), lost], SEEN)
    assert not report.is_passed and report.num_finished == 1 and len(report.failures) == 1
