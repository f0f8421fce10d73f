"""Which goals a run has reached, by rows as the parts give them."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.gateway.gpu_bench.goals import COMPILED, GOALS, NOT_COMPILED, START, goals_table, verdicts
from octavo.gateway.gpu_bench.rows import Row


def row(what: str, shape: str, ms: float, **more: Any) -> Row:
    return Row(section=more.pop("section", "kernels"), what=what, shape=shape, ms=ms, **more)


def found(rows: list[Row]) -> dict[tuple[str, str], tuple[float | None, str]]:
    return {(each.goal.name, each.goal.what): (each.value, each.reached) for each in verdicts(rows)}


def test_every_goal_is_named_whether_it_was_measured_or_not() -> None:
    names = {f"{kind}{number}" for kind, last in (("K", 10), ("S", 4), ("E", 8)) for number in range(1, last + 1)}
    assert {goal.name for goal in GOALS} == names
    assert all("goal" in goal.thresholds for goal in GOALS)
    table = goals_table(verdicts([]))
    assert table.count("not measured") == len(GOALS)
    assert "0 of 0 that were measured" in table
    assert len(table) < 6000, "the end of an output is what is seen of it"


def test_a_share_is_the_worst_one_and_short_of_what_must_be_it_is_missed() -> None:
    decode = "decode attention"
    rows = [
        row(decode, "B=64 ctx=1024 32/8 x 128", 1.0, floor_ms=0.93),
        row(decode, "B=256 ctx=8192 32/8 x 128", 1.0, floor_ms=0.86),
        row(decode, "B=8 ctx=4096 32/8 x 128", 1.0, floor_ms=0.1),  # a hard one
        row(decode, "B=64 ctx=1024 32/8 x 128", 1.1, floor_ms=0.9, engine="fa3"),
        row(decode, "B=64 ctx=1024 32/8 x 128", 0.9, floor_ms=0.9, engine="flashinfer"),
        row("K2", "the mix", 1.0, floor_ms=0.9),
    ]
    goals = found(rows)
    assert goals["K1", "paged decode attention, bandwidth"] == (pytest.approx(0.86), "goal")
    assert goals["K1", "beside FA3, FlashInfer"] == (pytest.approx(0.9), "missed")
    assert goals["K2", "hard decodes, the mix of lengths"] == (pytest.approx(0.1), "missed")
    assert goals["K2", "beside FA3"] == (None, "not measured")


def test_eight_rows_are_not_eight_thousand() -> None:
    rows = [
        row("mixture", "Qwen3-30B-A3B B=8", 1.0, floor_ms=0.8),
        row("mixture", "Qwen3-30B-A3B B=8192", 1.0, floor_ms=0.2, values={"tflops": 440.0}),
        row("decode step", "B=1 ctx=1024 graph", 1.0),
    ]
    goals = found(rows)
    assert goals["K9", "experts of 30B-A3B, B=8 to 64"] == (pytest.approx(0.8), "goal")
    assert goals["K9", "the same, 8k tokens"] == (440.0, "goal")


def test_rates_times_and_ratios_are_those_of_the_rows() -> None:
    shape = "8 x 1 new, context 1024, {}"
    rows = [
        row("K1", shape.format("bfloat16"), 1.8),
        row("K3", shape.format("float8_e4m3fn"), 1.0),
        row("prefill attention", "1 x 8192 behind 0, 32/8 x 128", 1.0, values={"tflops": 390.0}),
        row("prefill attention", "1 x 2048 behind 6144, 32/8 x 128", 1.0, values={"tflops": 351.0}),
        row("prefill attention", "1 x 8192 behind 0, 32/8 x 128", 0.7, engine="cudnn"),
        row("skinny linear", "8B head M=1", 1.0, floor_ms=0.76),
        row("skinny linear", "8B head M=1", 1.2, engine="torch"),
        row("W4A16 linear", "8B o M=16", 1.0),
        row("W4A16 linear", "8B o M=16", 3.1, engine="torch, 16 bits"),
        row("fp8 linear", "8B o M=2048", 1.0),
        row("fp8 linear", "8B o M=2048", 1.8, engine="torch, 16 bits"),
        row("fp8 linear", "8B qkv M=8192", 1.0),
        row("fp8 linear", "8B qkv M=8192", 1.5, engine="torch, 16 bits"),
        row("fp8 linear", "8B o M=256", 1.0),
        row("fp8 linear", "8B o M=256", 0.5, engine="torch, 16 bits"),
        row("fp8 linear by rows", "8B o M=2048", 1.0),
        row("fp8 linear by rows", "8B o M=2048", 1.9, engine="torch, 16 bits"),
        row("fp8 linear by rows", "8B o M=2048", 0.9, engine="torch, codes alone"),
        row("sample top_k 50 top_p 0.9", "256x151936 flat", 0.2),
        row("sample top_k 50 top_p 0.9", "256x151936 peaked", 0.1),
        row("qwen3-0.6b decode step", "B=1 ctx=1024 graph", 0.7, section="steps"),
        row("qwen3-0.6b decode step", "B=1 ctx=1024 no graph", 9.0, section="steps"),
        row("qwen3-8b decode step", "B=64 ctx=1024 graph", 6.0, section="steps", values={"idle": 0.04}),
        row("qwen3-8b decode step", "B=1 ctx=1024 graph", 4.9, section="steps", values={"idle": 0.9}),
    ]
    goals = found(rows)
    assert goals["K3", "fp8 KV over bfloat16"] == (pytest.approx(1.8), "goal")
    assert goals["K4", "causal prefill of 8k"] == (390.0, "missed")
    assert goals["K4", "beside FA3, cuDNN"] == (pytest.approx(0.7), "missed")
    assert goals["K5", "2k new behind 6k, of K4's rate"] == (pytest.approx(0.9), "must")
    assert goals["K6", "skinny linears of 8B"] == (pytest.approx(0.76), "must")
    assert goals["K6", "beside cuBLAS"] == (pytest.approx(1.2), "goal")
    assert goals["K7", "W4A16 over bfloat16, M=16"] == (pytest.approx(3.1), "goal")
    assert goals["K7", "W4A16 over bfloat16, M=32"][1] == "not measured"
    assert goals["K8", "fp8 linears over bfloat16, blocks, M >= 2k"] == (pytest.approx(1.5), "must")
    assert goals["K8", "fp8 linears over bfloat16, rows, M >= 2k"] == (pytest.approx(1.9), "stretch")
    assert goals["K10", "256 rows, top-k, top-p"] == (pytest.approx(200), "must")
    assert goals["S1", "decode step 0.6B, B=1, 1k"] == (0.7, "goal")
    assert goals["S2", "decode step 8B, B=1, 1k"] == (4.9, "missed")
    assert goals["S4", "device idle 8B, B >= 32"] == (0.04, "must")
    table = goals_table(verdicts(rows))
    assert "MISSED, not what must be" in table and "met" in table


def test_engines_are_compared_with_the_best_other_one_and_a_start_that_was_measured_counts_first() -> None:
    def engine(name: str, seconds: float, shape: str = "qwen3-0.6b", **values: float) -> Row:
        return row("256 requests", shape, seconds * 1e3, section="workload", engine=name, values=values)

    rows = [
        engine("octavo", 4.8, tokens_per_s=27_900.0),
        engine("slow", 40.0, tokens_per_s=3_350.0),
        engine("other", 6.0, tokens_per_s=22_000.0),
        engine("octavo", 13.0, "qwen3-8b", tokens_per_s=10_300.0, first_token_s=25.0),
    ]
    goals = found(rows)
    assert goals["E1", "256 requests, 0.6B"] == (27_900.0, "goal")
    assert goals["E1", "beside the best other engine"] == (pytest.approx(1.25), "goal")
    assert goals["E2", "256 requests, 8B"] == (10_300.0, "goal")
    assert goals["E7", "start to first token, 8B"] == (25.0, "must")
    rows += [row(START, f"qwen3-8b, {state}", ms) for state, ms in ((NOT_COMPILED, 31e3), (COMPILED, 15e3))]
    goals = found(rows)
    assert goals["E7", "start to first token, 8B"] == (15.0, "goal")
    assert goals["E7", "the same, nothing compiled"] == (31.0, "must")
