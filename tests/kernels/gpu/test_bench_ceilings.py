"""What the ceilings and the comparison of attention are measured with does what it says."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.gpu import bench_attention_peers, bench_ceilings
from octavo.kernels.gpu.bench_attention_peers import (
    SHAPES,
    Shape,
    checked,
    make_inputs,
    reference,
    relative_error,
    rows,
)
from octavo.kernels.gpu.bench_ceilings import read_all
from octavo.kernels.gpu.device_time import Timed

CPU = torch.device("cpu")
SMALL = (Shape(2, 1, 20, 4, 2, 16), Shape(1, 9, 0, 4, 2, 16), Shape(1, 5, 12, 4, 2, 16))


@pytest.mark.parametrize("num_blocks", [1, 3, 70])
def test_a_read_reads_everything(num_blocks: int) -> None:
    x = torch.randn(num_blocks * 8192, generator=torch.Generator().manual_seed(num_blocks))
    torch.testing.assert_close(read_all(x).sum(), x.sum(), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("peer", ["octavo", "torch_attention"])
def test_attention_of_each_engine_is_the_same(peer: str) -> None:
    for shape in SMALL:
        inputs = make_inputs(shape, CPU, torch.float32)
        out = bench_attention_peers._MAKERS[peer](inputs)()
        assert relative_error(out, reference(inputs)) < 1e-5


def test_of_many_rows_and_queries_a_few_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(3, 5, 12, 4, 2, 16)
    inputs = make_inputs(shape, CPU, torch.float32)
    out, exact = bench_attention_peers._MAKERS["torch_attention"](inputs)(), reference(inputs)
    monkeypatch.setattr(bench_attention_peers, "_CHECKED_ROWS", 2)
    monkeypatch.setattr(bench_attention_peers, "_CHECKED_QUERIES", 3)
    few = reference(inputs)
    assert few.shape == (2 * 3, 4, 16)
    torch.testing.assert_close(few, exact.view(3, 5, 4, 16)[:2, 2:].flatten(0, 1))
    assert relative_error(checked(out, shape), few) < 1e-5


def test_what_takes_turns_is_several_times_the_cache() -> None:
    for shape in SHAPES:
        kv_bytes = 4 * shape.rows * shape.context * shape.num_kv_heads * shape.head_dim
        assert shape.num_new > 1 or shape.turns * kv_bytes >= 256 * 1024**2


def test_work_is_counted_as_defined() -> None:
    decode = Shape(2, 1, 99, 8, 2, 64)
    assert decode.num_bytes == 2 * (2 * 2 * 100 * 2 * 64 + 2 * 2 * 8 * 64)
    prompt = Shape(1, 4, 0, 8, 2, 64)
    assert prompt.flops == 4 * 8 * 64 * 10


def test_a_peer_that_is_absent_is_one_row_and_one_that_fails_a_row_for_each_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(bench_attention_peers.FA3_LIBRARY, raising=False)
    (row,) = rows(CPU, peer="fa3", shapes=SMALL)
    assert "left out" in row["note"]
    assert bench_attention_peers.FA3_LIBRARY in row["note"]

    def broken(inputs: object) -> object:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(bench_attention_peers._MAKERS, "flashinfer", broken)
    monkeypatch.delitem(bench_attention_peers._PROBES, "flashinfer")
    found = list(rows(CPU, peer="flashinfer", shapes=SMALL))
    assert len(found) == len(SMALL)
    assert all("no kernel image" in row["note"] and "us" not in row for row in found)


def test_figures_are_timed_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention_peers, "device_time", lambda *runs: Timed(2000.0, "eager"))
    monkeypatch.setattr(bench_ceilings, "device_time", lambda run: run() is None or Timed(2000.0))
    (row,) = rows(CPU, peer="torch_attention", shapes=SMALL[:1])
    assert row["us"] == 2000.0
    assert row["note"].startswith("error ") and row["note"].endswith("; eager")
    assert "WRONG" not in row["note"]
    found = list(bench_ceilings.rows(CPU, num_bytes=8192 * 4, size=8))
    assert [entry["kernel"] for entry in found] == ["product", "copy", "read"] * 2
    assert found[1]["bytes"] == 2 * found[2]["bytes"] == 2 * 8192 * 4
    assert found[0]["flops"] == 2 * 8**3


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_attention_peers._MAKERS["torch_attention"]
    monkeypatch.setitem(bench_attention_peers._MAKERS, "fa3", lambda inputs: lambda: right(inputs)() * 1.1)
    monkeypatch.delitem(bench_attention_peers._PROBES, "fa3")
    (row,) = rows(CPU, peer="fa3", shapes=SMALL[:1])
    assert row["note"].startswith("WRONG: off by 1.0e-01") and "us" not in row


def test_a_kernel_that_fails_leaves_the_other_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ceilings, "read_all", None)
    monkeypatch.setattr(bench_ceilings, "device_time", lambda run: run() is None or Timed(2000.0))
    found = list(bench_ceilings.rows(CPU, num_bytes=8192 * 4, size=8))
    assert [entry["kernel"] for entry in found if "us" in entry] == ["product", "copy"] * 2
    assert all("failed: TypeError" in entry["note"] for entry in found if entry["kernel"] == "read")
