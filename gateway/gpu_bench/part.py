"""One part of the benchmark in a process of its own: prints each figure as a line of JSON.

python -m octavo.gateway.gpu_bench.part NAME [OPTIONS AS JSON]

A process for each part, so that a crash costs its own figures alone, and no engine finds the GPU's memory or caches as
another has left them. Parts are imported by name: what computes on a device lies in packages that the gateway does not
know.

Beside figures it says of parts that consist of cases which one it begins, so that after a crash another process can go
on behind it: {"case": 3, "of": 10, "what": {...}}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TextIO

_ATTENTION = "kernels.gpu.bench_attention_peers"

# Name -> module, from octavo's own package on. Each has `rows(device, ...) -> iterable of dicts`.
PARTS: dict[str, str] = {
    "compile": "kernels.gpu.compile_checks",
    "checks": "kernels.gpu.device_checks",
    "tokens": "gateway.gpu_bench.check_tokens",
    "start": "gateway.gpu_bench.first_start",
    "ceilings": "kernels.gpu.bench_ceilings",
    "attention": "kernels.gpu.bench_paged_attention",
    "small_ops": "kernels.gpu.bench_small_ops",
    "products": "kernels.gpu.bench_products",
    "steps": "actors.executor.gpu.bench_steps",
    "octavo": _ATTENTION,
    "torch_attention": _ATTENTION,
    "cudnn": _ATTENTION,
    "flex_attention": _ATTENTION,
    "flashinfer": _ATTENTION,
    "fa3": _ATTENTION,
}
PEER_PARTS = ("octavo", "fa3", "flashinfer", "cudnn", "torch_attention", "flex_attention")
"""Attention at the same shapes, by ourselves and by others."""
CHECK_PARTS = ("checks", "tokens")
"""What has to be right before it is worth timing."""
KERNEL_PARTS = ("attention", "small_ops", "products")
"""The kernels' own benchmarks."""
CASE_PARTS = ("checks", "ceilings", "steps", *KERNEL_PARTS, *PEER_PARTS)
"""Whose `rows` take `first_case` and `on_case`, see `kernels.gpu.cases`."""


def main(argv: list[str]) -> int:
    """Run one part; 1 if it fails, with the error as the last line of standard error."""
    name, options = argv[0], json.loads(argv[1]) if len(argv) > 1 else {}
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no figure
    try:
        for row in found_rows(name, options, lambda mark: say(answers, mark)):
            say(answers, row)
    except Exception as error:  # noqa: BLE001,RUF100 - whatever a part raises is its result
        traceback.print_exc()
        said = str(error).strip()  # CUDA's errors have advice behind the first line
        print(f"{type(error).__name__}: {said.splitlines()[0] if said else 'no word'}", file=sys.stderr)
        return 1
    return 0


def found_rows(
    name: str, options: dict[str, Any], say_mark: Callable[[dict[str, Any]], None] = lambda _mark: None
) -> Iterable[dict[str, Any]]:
    """The figures of a part.

    Args:
        say_mark: hears of each case that it begins.
    """
    import torch

    device = torch.device(options.pop("device", "cuda"))
    package = __package__.rsplit(".", 2)[0]
    module = importlib.import_module(f"{package}.{PARTS[name]}")
    if name in PEER_PARTS:
        options["peer"] = name
    if name in CASE_PARTS:
        options["on_case"] = lambda number, of, what: say_mark({"case": number, "of": of, "what": normalised(what)})
    found: Iterable[dict[str, Any]] = module.rows(device, **options)
    return map(normalised, found)


def normalised(row: dict[str, Any]) -> dict[str, Any]:
    """A row by the names that `rows.kernel_row` reads, whatever else it has."""
    row = dict(row)
    for theirs, ours in (("name", "kernel"), ("implementation", "engine"), ("failed", "note")):
        if theirs in row:
            row.setdefault(ours, row.pop(theirs))
    for theirs, ours, factor in (("gbytes", "bytes", 1e9), ("tflop", "flops", 1e12)):
        if theirs in row:
            row.setdefault(ours, row.pop(theirs) * factor)
    if isinstance(row.get("error"), float) and "ok" not in row:
        row.setdefault("note", f"error {row['error']:.1e}")
    return row


def say(answers: TextIO, row: dict[str, Any]) -> None:
    """Print one figure at once: what comes later may crash."""
    answers.write(json.dumps(row) + "\n")
    answers.flush()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # what holds on to a device that is lost would end this with words of its own
