"""Whether an engine on a GPU gives the tokens that the same engine gives on a CPU in float32, prompts of all lengths.

Two checkpoints: the shipped one, and random weights in the shape of a larger one, read from a file. Sampled requests
have seeds, so their draws are the same. Long prompts are computed in chunks, beside others that decode.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...messages.sampling import SamplingParams
from ..llm import LLM

_LENGTHS = (1, 2, 15, 16, 17, 40, 100, 250, 3, 400)
_NUM_OUTPUT = 24
_MIN_EQUAL = {"float32": 0.9, "bfloat16": 0.0}
"""Share of tokens, up to each request's first difference. In float32 a product may be done in tf32, and two logits that
are nearly equal may change places; in bfloat16 that is what one expects of any two engines, so it is only told."""


def rows(
    device: torch.device,
    *,
    shape: str = "qwen3-0.6b",
    num_layers: int = 2,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
) -> Iterator[dict[str, Any]]:
    """A row for each checkpoint and dtype: which share of tokens is the same."""
    yield from _compared("shipped model", None, device, ("float32",))
    if shape:
        with tempfile.TemporaryDirectory(prefix="octavo-check-") as folder:
            _make_checkpoint(shape, num_layers, folder)
            yield from _compared(f"{shape}, {num_layers} layers", folder, device, dtypes)


def _make_checkpoint(shape: str, num_layers: int, folder: str) -> None:
    module = f"{__package__.rsplit('.', 2)[0]}.models.make_checkpoint"
    command = [sys.executable, "-m", module, "--like", shape, "--out", folder, "--num-layers", str(num_layers)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - as above
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no word")
        raise RuntimeError(f"no checkpoint of random weights: {last}")


def _compared(name: str, model: str | None, device: torch.device, dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    expected = _tokens(model, "cpu", "float32")
    for dtype in dtypes:
        found = _tokens(model, device.type, dtype)
        share = equal_share(expected, found)
        yield {
            "kernel": "tokens",
            "shape": f"{name}, {dtype}",
            "ok": share >= _MIN_EQUAL[dtype],
            "error": 1.0 - share,
            "bound": 1.0 - _MIN_EQUAL[dtype],
            "worst": f"{100 * share:.1f} % of the CPU's tokens",
            "failures": [] if share >= _MIN_EQUAL[dtype] else [f"{100 * share:.1f} % equal"],
        }


def _tokens(model: str | None, device: str, dtype: str) -> list[list[int]]:
    chance = random.Random(1)  # noqa: S311  # a workload, not a secret
    with LLM(
        model,
        device=device,
        dtype=dtype,
        max_model_len=512,
        max_num_seqs=8,  # fewer than requests: some wait, and join those that decode
        max_num_batched_tokens=128,
        kv_cache_memory_bytes=256 * 1024**2,
    ) as llm:
        prompts = [[chance.randrange(200, 4000) for _ in range(length)] for length in _LENGTHS]
        params = [
            SamplingParams(
                temperature=0.8 if index % 2 else 0.0,
                top_p=0.95 if index % 4 == 1 else 1.0,
                seed=index,
                max_tokens=_NUM_OUTPUT,
                ignore_eos=True,
            )
            for index in range(len(prompts))
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def equal_share(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are the same, counted up to each request's first difference."""
    total = sum(len(tokens) for tokens in expected)
    same = 0
    for one, other in zip(expected, found, strict=True):
        for left, right in zip(one, other, strict=False):
            if left != right:
                break
            same += 1
    return same / total if total else 1.0
