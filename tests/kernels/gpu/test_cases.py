"""Cases go on behind one that fails, and end with one that takes the device with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from octavo.kernels.gpu.cases import Case, DeviceLostError, rows_of, worded

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def fails() -> Iterator[dict[str, Any]]:
    yield {"us": 1.0}
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand advice")


CASES = (
    Case({"kernel": "a"}, lambda: [{"us": 5.0}, {"us": 6.0, "shape": "s"}]),
    Case({"kernel": "b", "shape": "t"}, fails),
    Case({"kernel": "c"}, lambda: [{}]),
)
WHY = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"


def test_rows_have_what_their_case_has_and_a_failure_is_a_row() -> None:
    begun: list[tuple[int, int, str]] = []
    found = list(rows_of(CASES, CPU, on_case=lambda number, of, what: begun.append((number, of, what["kernel"]))))
    assert found == [
        {"kernel": "a", "us": 5.0},
        {"kernel": "a", "us": 6.0, "shape": "s"},
        {"kernel": "b", "shape": "t", "us": 1.0},
        {"kernel": "b", "shape": "t", "note": WHY},
        {"kernel": "c"},
    ]
    assert begun == [(0, 3, "a"), (1, 3, "b"), (2, 3, "c")]
    assert list(rows_of(CASES, CPU, first=2)) == [{"kernel": "c"}]
    assert list(rows_of(CASES, CPU, first=3)) == []


def test_a_device_that_no_longer_answers_ends_them_behind_the_row_that_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emptied: list[bool] = []

    def broken(_device: Any = None) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device=None: None)
    assert len(list(rows_of(CASES, GPU))) == 5  # want of memory, say
    assert emptied == [True]
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    rows = rows_of(CASES, GPU)
    assert [next(rows)["kernel"] for _ in range(4)] == ["a", "a", "b", "b"]
    with pytest.raises(DeviceLostError, match="RuntimeError: CUDA error: an illegal memory access"):
        next(rows)


def test_an_error_is_told_by_its_first_line() -> None:
    assert worded(ValueError("one\ntwo")) == "ValueError: one"
    assert worded(KeyError()) == "KeyError"
