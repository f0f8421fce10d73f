"""Whether there is a GPU, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from octavo.gateway import accelerator
from octavo.gateway.accelerator import count_gpus, has_gpu, is_hidden, names_cuda, resolve_device


@pytest.mark.parametrize(
    ("visible", "hidden"), [(None, False), ("", True), ("-1", True), ("-1,0", True), ("0", False), ("1,2", False)]
)
def test_a_variable_may_hide_every_gpu(visible: str | None, hidden: bool) -> None:
    assert is_hidden(visible) == hidden


@pytest.mark.parametrize(
    ("text", "built"),
    [
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", True),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", False),
        ("cuda = '12.8'\n", True),
        ("", False),
    ],
)
def test_torch_s_own_version_file_says_what_it_was_built_for(text: str, built: bool) -> None:
    assert names_cuda(text) == built


@pytest.mark.parametrize(
    ("hidden", "built", "count", "found"),
    [(None, True, 1, True), ("", True, 1, False), (None, False, 1, False), (None, True, 0, False)],
)
def test_driver_torch_and_environment_must_all_agree(
    hidden: str | None, built: bool, count: int, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(accelerator, "torch_is_built_for_cuda", lambda: built)
    monkeypatch.setattr(accelerator, "count_gpus", lambda: count)
    assert has_gpu.__wrapped__() == found


def test_auto_is_what_there_is_and_the_others_are_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(accelerator, "has_gpu", lambda found=found: found)
        assert resolve_device("auto") == device
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("cuda") == "cuda"


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_LIBRARY", "libthere-is-none.so")
    assert count_gpus() == 0


def test_it_is_found_out_without_torch() -> None:
    code = "import sys; from octavo.gateway.accelerator import has_gpu; has_gpu(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
