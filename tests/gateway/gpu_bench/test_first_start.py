"""A start to a first token, of an engine that answers at once."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from octavo.gateway.gpu_bench import first_start
from octavo.gateway.gpu_bench.goals import START
from octavo.gateway.gpu_bench.workload import EngineRun


def test_the_first_start_finds_nothing_compiled_and_the_second_what_the_first_has_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "warm")
    caches: list[str] = []
    answers = [EngineRun(engine="octavo", load_s=30.0, first_token_s=31.5), EngineRun(engine="octavo", left_out="lost")]

    def run_engines(names: list[str], options: Any, requests: Any, **given: Any) -> list[EngineRun]:
        assert names == ["octavo"] and given["repeats"] == 1 and given["all_within_s"] <= 90.0
        assert options.engine_fields["model"] == "folder" and len(requests) == 1
        caches.append(os.environ["TRITON_CACHE_DIR"])
        return [answers[len(caches) - 1]]

    monkeypatch.setattr(first_start, "run_engines", run_engines)
    first, second = first_start.rows(torch.device("cpu"), model="folder", name="qwen3-8b", all_within_s=90.0)
    assert caches[0] == caches[1] != "warm"
    assert (first["kernel"], first["shape"], first["ms"]) == (START, "qwen3-8b, nothing compiled before", 31_500.0)
    assert second["shape"] == "qwen3-8b, compiled before"
    assert second["note"] == "failed: lost" and "ms" not in second
