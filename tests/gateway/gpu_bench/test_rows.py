"""Figures, their shares of the roofline, and the table."""

from __future__ import annotations

import pytest

from octavo.gateway.gpu_bench.ceilings import H200_NOTED, Ceilings
from octavo.gateway.gpu_bench.part import normalised
from octavo.gateway.gpu_bench.rows import Row, ceilings_of, kernel_row, rate_of, ratios, table_of

CEILINGS = Ceilings(read_bytes_per_s=4e12, flops=800e12)


def test_a_kernel_is_a_share_of_the_larger_of_its_two_floors() -> None:
    by_bytes = kernel_row({"kernel": "a", "us": 1000.0, "bytes": 2e9, "flops": 1e9}, CEILINGS)
    assert by_bytes.share == pytest.approx(0.5)
    assert by_bytes.figure == "2.00 TB/s"
    by_flops = kernel_row({"kernel": "a", "ms": 1.0, "bytes": 1e6, "flops": 400e9}, CEILINGS)
    assert by_flops.share == pytest.approx(0.5)
    assert by_flops.figure == "400 TFLOP/s"
    assert by_flops.values["tflops"] == pytest.approx(400)
    of_8_bits = {"kernel": "a", "ms": 1.0, "bytes": 1e6, "flops": 400e9, "flops_at_16_bits": 200e9}
    assert kernel_row(of_8_bits, CEILINGS).share == pytest.approx(0.25)
    assert kernel_row(of_8_bits, CEILINGS).figure == "400 TFLOP/s"
    spread = kernel_row({"kernel": "a", "us": 1000.0, "low_us": 900.0, "high_us": 1100.0}, None)
    assert (spread.low_ms, spread.high_ms) == (0.9, 1.1)
    assert "0.900 1.100" in table_of([spread], "t")


def test_without_time_or_work_there_is_no_share() -> None:
    assert kernel_row({"kernel": "a", "note": "crashed"}, CEILINGS).share is None
    assert kernel_row({"kernel": "a", "us": 5.0}, CEILINGS).share is None
    assert kernel_row({"kernel": "a", "us": 5.0, "bytes": 10}, None).share is None
    assert rate_of(1e9, 0, 0.0) == ""


def test_ceilings_are_the_better_of_their_rounds_and_all_there() -> None:
    found = [
        {"kernel": "read", "us": 1000.0, "bytes": 3.9e9, "flops": 0},
        {"kernel": "read", "us": 1000.0, "bytes": 4.1e9, "flops": 0},
        {"kernel": "copy", "us": 1000.0, "bytes": 4.0e9, "flops": 0},
        {"kernel": "product", "us": 1000.0, "bytes": 1, "flops": 780e9},
    ]
    ceilings = ceilings_of(found, "a GPU")
    assert ceilings.read_bytes_per_s == pytest.approx(4.1e12)
    assert ceilings.flops == pytest.approx(780e12)
    assert "a GPU" in ceilings.source


def test_a_ceiling_that_could_not_be_measured_is_the_noted_one_and_says_so() -> None:
    copied = [{"kernel": "read", "note": "failed"}, {"kernel": "copy", "us": 1000.0, "bytes": 4.0e9, "flops": 0}]
    ceilings = ceilings_of(copied, "a GPU")
    assert ceilings.read_bytes_per_s == pytest.approx(4.0e12)
    assert ceilings.flops == H200_NOTED.flops
    assert ceilings.source.startswith("measured in this run on a GPU; product not measured")
    assert ceilings_of([], "a GPU").source.startswith("bandwidth and product not measured")


def test_ours_is_compared_with_the_best_other_at_the_same_shape_only() -> None:
    def row(engine: str, ms: float, shape: str = "s") -> Row:
        return Row(section="kernels", what="w", shape=shape, engine=engine, ms=ms)

    rows = [row("octavo", 2.0), row("one", 3.0), row("other", 2.5), row("gone", 0.0), row("one", 1.0, "t")]
    assert ratios(rows) == {("kernels", "w", "s"): 1.25}
    table = table_of(rows, "title")
    lines = table.splitlines()
    assert lines[0] == "title"
    assert len(lines) == 2 + len(rows)
    assert "1.25x" in lines[2]
    assert "1.25x" not in "".join(lines[3:])


def test_rows_of_other_spellings_are_read_as_well() -> None:
    row = normalised({"name": "K1", "implementation": "sdpa", "gbytes": 2.0, "us": 1.0, "error": 1e-3})
    assert (row["kernel"], row["engine"], row["bytes"]) == ("K1", "sdpa", 2e9)
    assert row["note"] == "error 1.0e-03"
    assert normalised({"name": "K4", "tflop": 1.5})["flops"] == 1.5e12
    assert normalised({"name": "K4", "failed": "no such thing"})["note"] == "no such thing"
    kept = {"kernel": "a", "engine": "b", "bytes": 5, "note": "n"}
    assert normalised(kept) == kept
