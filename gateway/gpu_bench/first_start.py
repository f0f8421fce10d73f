"""How long an engine takes from the start of its process to a first token: the first time, and once more."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from .goals import COMPILED, NOT_COMPILED, START
from .requests_256 import GeneratedRequest
from .workload import load_options, run_engines

_REQUEST = GeneratedRequest([7, 8, 9, 10], 1)


def rows(
    device: torch.device,
    *,
    model: str,
    name: str,
    engine: str = "octavo",
    load_format: str = "dummy",
    all_within_s: float = 600.0,
) -> Iterator[dict[str, Any]]:
    """A row for each of two starts; for a process of its own, whose cache of compiled kernels is a new one.

    Args:
        model: folder.
        name: of the model, for the rows.
    """
    deadline = time.monotonic() + all_within_s
    with tempfile.TemporaryDirectory(prefix="octavo-triton-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # of the engine's processes as well
        for state in (NOT_COMPILED, COMPILED):
            left_s = deadline - time.monotonic()
            (run,) = run_engines(
                [engine],
                load_options(model, load_format, [_REQUEST], device=device.type),
                [_REQUEST],
                repeats=1,
                timeout_s=left_s,
                all_within_s=left_s,
                say=lambda _what: None,
            )
            row: dict[str, Any] = {"kernel": START, "shape": f"{name}, {state}", "engine": engine}
            if run.left_out:
                yield {**row, "note": f"failed: {run.left_out}"}
            else:
                yield {**row, "ms": run.first_token_s * 1e3, "note": f"ready in {run.load_s:.1f} s"}
