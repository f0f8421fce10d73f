from __future__ import annotations

import json

import pytest

from octavo.gateway.bench_streams import main


def test_the_benchmark_loses_no_stream_and_prints_what_one_costs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--streams", "20", "--tokens", "10", "--interval-ms", "0"])
    printed = json.loads(capsys.readouterr().out)
    assert (printed["streams"], printed["lost"], printed["events"], printed["cancelled"]) == (20, 0, 200, 0)
    assert printed["us_per_token_ours"] >= 0 and printed["kib_per_stream"] > -1000
    assert printed["us_per_token"] > 0 and printed["us_per_token_floor"] > 0
