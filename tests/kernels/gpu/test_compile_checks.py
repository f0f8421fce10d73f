"""What checks and benchmarks launch is found, without a GPU, and compiled before they do so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import octavo.kernels.gpu

# Every part, on the GPU that computes nothing, in a process whose triton does not interpret; some are compiled, twice.
FOUND = """
import json
from collections import Counter
import torch
from octavo.kernels.gpu import compile_checks as ahead
from octavo.kernels.gpu.fake_cuda import GpuFacts

for name in ("msgspec", "structlog", "zmq", "setproctitle"):
    assert name not in __import__("sys").modules, name  # which may be absent where there is a GPU
variants, failures = ahead.find_launches(GpuFacts(), ahead.launches(("bfloat16",)))
few = [each for _, each in variants if each.name in {"_embed_kernel", "_sum_parts_kernel"}]
news = [[each.is_new for each in ahead.compile_variants(few, 2)] for _ in range(2)]

class Broken:
    name = "broken"
    def compile(self):
        raise ValueError("no such layout")

(broken,) = ahead.compile_variants([Broken()], 1)
print(json.dumps({"failures": failures, "parts": Counter(part for part, _ in variants),
                  "kernels": Counter(each.name for _, each in variants), "news": news, "broken": broken.failure}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(
        [sys.executable, "-c", FOUND], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_every_part_is_launched_to_its_end(found: dict[str, Any]) -> None:
    assert found["failures"] == {}
    assert {"ceilings", "octavo", "products", "small_ops", "attention"} <= found["parts"].keys()
    assert found["parts"]["check paged_attention bfloat16"] > 40


def test_no_kernel_is_missing(found: dict[str, Any]) -> None:
    files = Path(octavo.kernels.gpu.__file__).parent.glob("*.py")
    kernels = {name for path in files for name in re.findall(r"@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text())}
    of_steps = {"_apply_diff_kernel", "_gather_step_kernel", "_append_tokens_kernel"}  # a runner's, which compiles them
    assert len(kernels) > 20
    assert kernels - of_steps <= found["kernels"].keys()


def test_what_was_compiled_is_not_compiled_again_and_what_cannot_be_is_told(found: dict[str, Any]) -> None:
    first, again = found["news"]
    assert first and all(first)
    assert not any(again)
    assert found["broken"] == "ValueError: no such layout"
