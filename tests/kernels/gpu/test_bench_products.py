"""The benchmark of the products, in Triton's interpreter, on tiny sizes and without a clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from octavo.kernels.gpu import bench_products
from octavo.kernels.gpu.bench_products import MATRICES, MIXTURES, MixtureShape, rows
from octavo.kernels.gpu.device_time import Timed

# The interpreter turns a loop's bounds from arrays of one element into numbers.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def run(*calls: Callable[[], object]) -> Timed:
    for call in calls:
        call()
    return Timed(7.0)


def tiny_rows(**options: Any) -> list[dict[str, Any]]:
    sizes: dict[str, Any] = {
        "matrices": {"small": (40, 128)},
        "mixtures": {"tiny": MixtureShape(4, 2, 32, 16, (1, 9), in_mxfp4=True)},
        "dtype": torch.float16,
        "skinny_rows": (2,),
        "quantized_rows": (3,),
        "fp8_rows": (3, 66),
        "beyond_l2": 12_000,
        "timer": run,
    }
    return list(rows(torch.device("cpu"), **{**sizes, **options}))


def test_every_kernel_is_right_and_stands_beside_torch() -> None:
    found = tiny_rows()
    assert all(row["us"] == 7.0 and "note" not in row for row in found), found
    assert all(row["bytes"] > 0 and row["flops"] > 0 for row in found)
    kinds = {(row["kernel"], row["engine"]) for row in found}
    linears = {"skinny linear", "W4A16 linear", "W8A16 linear", "fp8 linear", "fp8 linear by rows"}
    assert {kernel for kernel, _ in kinds} == {*linears, "mixture", "MXFP4 mixture"}
    for kernel in linears:
        assert len([1 for kind, _ in kinds if kind == kernel]) == 2
    shapes = [(row["kernel"], row["shape"], row["engine"]) for row in found]
    assert len(shapes) == len(set(shapes))
    halved = {row["shape"]: row["flops"] // row["flops_at_16_bits"] for row in found if "flops_at_16_bits" in row}
    assert halved == {"small M=3": 1, "small M=66": 2}  # where 8 bits are multiplied by 8
    four, eight = (next(row for row in found if row["kernel"] == f"W{bits}A16 linear") for bits in (4, 8))
    assert eight["bytes"] - four["bytes"] == 40 * 128 // 2


def test_a_wrong_or_failing_kernel_has_no_time_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_products, "linear_skinny", lambda x, weight: x @ weight.T * 3)
    monkeypatch.setattr(bench_products, "linear_fp8", lambda x, _weight, quick: x[:, :40] * quick)
    monkeypatch.setattr(bench_products, "linear_codes", lambda x, weight: x[:, :40] * math.nan)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(bench_products, "mixture", broken)
    ours = [row for row in tiny_rows() if row["engine"] == "octavo"]
    assert {row["us"] for row in ours} == {0.0}
    notes = {row["kernel"]: row["note"] for row in ours}
    assert notes["skinny linear"].startswith("WRONG: off by 2.00e+00")
    assert notes["W4A16 linear"] == "WRONG: off by nan of the norm"
    assert notes["fp8 linear"].startswith("WRONG: off by")
    assert notes["mixture"] == "failed: RuntimeError: no such instruction"


def test_the_sizes_are_those_of_the_models_they_are_named_after() -> None:
    hidden, heads, kv_heads, width, inner = 4096, 32, 8, 128, 12288
    assert MATRICES["8B qkv"] == ((heads + 2 * kv_heads) * width, hidden)
    assert MATRICES["8B o"] == (hidden, heads * width)
    assert MATRICES["8B gate_up"] == (2 * inner, hidden) and MATRICES["8B down"] == (hidden, inner)
    moe = MIXTURES["Qwen3-30B-A3B"]
    assert moe.num_experts * 3 * moe.hidden_size * moe.inner * 48 == pytest.approx(29e9, rel=0.01)


def test_cases_are_numbered_and_may_be_begun_in_the_middle() -> None:
    begun: list[tuple[int, int, str]] = []
    found = tiny_rows(first_case=5, on_case=lambda number, of, what: begun.append((number, of, what["shape"])))
    assert begun == [(5, 8, "tiny B=9"), (6, 8, "tiny B=1"), (7, 8, "tiny B=9")]
    assert {row["kernel"] for row in found} == {"mixture", "MXFP4 mixture"}
