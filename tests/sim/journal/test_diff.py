from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from journaled_ring import CONFIG, record_ring
from journaled_run import run_live

from octavo.messages.errors import InvalidJournalError
from octavo.messages.step import PlanStep
from octavo.sim.journal.diff import diff


def test_a_run_and_its_repetition_are_the_same(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    record_ring(left, seed=4)
    record_ring(right, seed=4)
    assert left.read_bytes() == right.read_bytes()
    report = diff(left, right)
    assert report.is_same
    assert report.left is None
    assert report.num_same > 500


def test_journals_with_and_without_tokens_of_one_run_are_the_same(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    record_ring(left, seed=4)
    record_ring(right, seed=4, has_tokens=True)
    report = diff(left, right)
    assert report.is_same
    assert not report.has_compared_tokens


def test_live_journals_under_different_keys_can_be_compared(tmp_path: Path) -> None:
    path = tmp_path / "j"
    run_live(path, num_requests=60, num_losses=0)
    report = diff(path, path)
    assert report.is_same
    assert report.has_compared_tokens


def test_the_first_message_that_differs_is_named_with_its_step(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    _, said = record_ring(left, seed=5)

    def change_request_9(ring: Any) -> None:
        real = ring.submit

        def submit_other(request: Any) -> None:
            if request.request_id == 9:
                params = msgspec.structs.replace(request.params, max_tokens=11)
                request = msgspec.structs.replace(request, params=params)
            real(request)

        ring.submit = submit_other

    record_ring(right, seed=5, break_ring=change_request_9)
    report = diff(left, right)
    assert not report.is_same
    assert report.core == "scheduler"
    assert report.kind == "heard"
    assert report.left is not None
    assert report.right is not None
    assert report.left.message.startswith("SubmitRequest(request 9")
    assert "max_tokens=11" in report.right.message
    assert report.left.step == report.right.step
    assert any(isinstance(message, PlanStep) and message.step_id == report.left.step for _, message in said)


def test_a_journal_that_goes_on_is_longer_than_one_that_stopped(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    record_ring(left, seed=6, num_steps=3000)
    record_ring(right, seed=6, num_steps=1000, break_ring=lambda ring: None)
    report = diff(left, right)
    assert not report.is_same
    assert report.left is not None
    assert report.right is not None
    assert report.left.message
    assert report.right.message == ""


def test_configurations_are_compared_field_by_field(tmp_path: Path) -> None:
    left, right = tmp_path / "left", tmp_path / "right"
    record_ring(left, seed=4)
    record_ring(right, seed=4, config=msgspec.structs.replace(CONFIG, max_num_seqs=3))
    report = diff(left, right)
    assert report.config == {"scheduler.max_num_seqs": ("4", "3")}
    assert not report.is_same


def test_a_damaged_journal_is_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "j"
    record_ring(path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(InvalidJournalError, match="frame"):
        diff(path, tmp_path / "damaged")
