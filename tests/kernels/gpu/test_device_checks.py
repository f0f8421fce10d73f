"""The checks that a device gets, in the interpreter: they pass, and they would not if a kernel were wrong."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels.gpu import device_checks, rms_norm
from octavo.kernels.gpu.check_setting import Random, Setting, error_of
from octavo.kernels.gpu.device_checks import CHECKS, rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_kernel_passes_its_check(name: str) -> None:
    found = list(rows(CPU, dtypes=("float32",), small=True, only=(name,)))
    assert found
    assert [row["shape"] for row in found if not row["ok"] or row["failures"]] == []


def test_a_wrong_kernel_is_found_and_the_others_are_checked_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rms_norm.rms_norm

    def biased(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return right(x, weight, eps) * 1.01

    monkeypatch.setattr(device_checks.gpu_rms_norm, "rms_norm", biased)
    monkeypatch.setitem(CHECKS, "embedding", lambda setting: 1 / 0)
    found = list(rows(CPU, dtypes=("float32",), small=True, only=("rms_norm", "embedding", "logprobs")))
    assert {row["kernel"] for row in found if row["ok"]} >= {"logprobs"}
    wrong = {row["shape"] for row in found if not row["ok"] and row["kernel"] == "rms_norm"}
    assert {"3x64, float32", "5x100, float32"} <= wrong
    (broken,) = [row for row in found if row["kernel"] == "embedding"]
    assert "ZeroDivisionError" in broken["failures"][0]


def test_what_was_not_written_never_passes() -> None:
    exact = torch.ones(3)
    assert error_of(torch.tensor([1.0, float("nan"), 1.0]), exact) == float("inf")
    assert error_of(torch.ones(4), exact) == float("inf")


def test_other_seeds_are_other_inputs() -> None:
    one, other = (Random(Setting(CPU, torch.float32, seed, True)).randn(4) for seed in (0, 1))
    assert not torch.equal(one, other)
