"""Code that an engine's processes run before anything else, to break what no flag breaks."""

from __future__ import annotations

from pathlib import Path

import pytest


def run_first(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every Python that is started from here on run `code` at its start.

    Args:
        folder: for it; made here.
    """
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))  # the nursery looks where this process looks
