"""One script for a machine with a GPU: builds, checks, times and prints a table, within 8 minutes.

    python3 gateway/gpu_bench/device_check.py --out DIR        from a checkout, nothing installed
    python -m octavo.gateway.gpu_bench.device_check --out DIR  where octavo is installed

Every Triton kernel is checked against its meaning in float64, on fresh random inputs with poisoned outputs; an engine's
tokens against those of the same engine on the CPU in float32; then the ceilings, attention beside others, products and
small kernels, decode steps and the workload of 256 requests are timed. Each part is a process of its own with a limit
of its own, so that what hangs or crashes costs nothing but itself; each figure is in DIR/device_check.json as soon as
it is known. What the kernels' parts launch is found on a GPU that computes nothing and compiled on all cores first;
that takes no GPU, and `python -m octavo.kernels.gpu.compile_checks` does it before there is one: bring along the folder
that TRITON_CACHE_DIR names, of the same Triton on such a Python.

What the machine needs: Python 3.11 or later, torch with CUDA and its Triton, numpy. That is enough for kernels and
attention. Engines need more, and these may have to be brought along as wheels: msgspec, structlog, pyzmq, setproctitle
(beside anyio, aiohttp, psutil, rich, tqdm, jinja2, prometheus_client, tokenizers, safetensors, huggingface_hub,
transformers). What is missing is named, and its parts are left out. To compare with others bring, for attention,
FlashInfer (flashinfer-python and apache-tvm-ffi), and FlashAttention-3's library from vLLM's wheel
(OCTAVO_FA3_LIBRARY=/path/_vllm_fa3_C.abi3.so); for engines mini-sglang, nano-vllm or vLLM on PYTHONPATH. The CUDA
toolkit's nvcc is not needed, but for FlashInfer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any


def from_a_checkout(arguments: list[str]) -> None:
    """Run this file again as a module of `octavo`, which is the name of the checkout's root for a moment."""
    root = Path(__file__).resolve().parents[2]
    view = Path(tempfile.mkdtemp(prefix="octavo-view-"))
    (view / "octavo").symlink_to(root, target_is_directory=True)
    path = os.pathsep.join(filter(None, (str(view), os.environ.get("PYTHONPATH"))))
    # The root itself must not be on the path: its folders have names that others use too.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    module = "octavo.gateway.gpu_bench.device_check"
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)  # noqa: S606 - itself


if not __package__:
    from_a_checkout(sys.argv[1:])

from .ceilings import H200_NOTED, Ceilings  # noqa: E402 - only a package has them
from .parts import PartResult, run_part  # noqa: E402
from .rows import Row, ceilings_of, kernel_row, table_of  # noqa: E402

# Part, options, seconds at most; in the order of their worth. Ceilings come first, since the rest is a share of them.
# `compile` fills Triton's cache on all cores, so that no part compiles kernels one after the other; models' kernels are
# compiled on all cores by whoever loads one. Beside each part what it is expected to take on an H200 with 16 cores,
# of which little is compilation any more; all in all under 7 minutes.
PLAN: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("ceilings", {}, 45),  # 15
    ("compile", {}, 120),  # 40: half to find 327 variants, half to compile them, which takes one core 3 minutes
    ("octavo", {}, 45),  # 15
    ("checks", {}, 90),  # 45
    ("steps", {"shape": "qwen3-0.6b"}, 75),  # 40
    ("fa3", {}, 45),  # 15
    ("flashinfer", {}, 90),  # 30, or 1 where it is not there
    ("workload", {"shape": "qwen3-0.6b"}, 75),  # 35
    ("steps", {"shape": "qwen3-8b", "batches": [1, 64, 256], "without_graphs": []}, 75),  # 40
    ("tokens", {}, 75),  # 40
    ("products", {}, 60),  # 25
    ("small_ops", {}, 45),  # 15
    ("torch_attention", {}, 45),  # 15
    ("attention", {"peers": []}, 45),  # 15
    ("workload", {"shape": "qwen3-8b"}, 90),  # 45
    ("flex_attention", {}, 60),  # 30
)
_NEEDED_BY_ENGINES = ("msgspec", "structlog", "zmq", "setproctitle", "anyio", "aiohttp", "psutil", "rich", "tqdm")


def main(argv: list[str] | None = None) -> int:
    """Returns 2 without a GPU, 1 if a check failed or could not be made, otherwise 0."""
    parser = argparse.ArgumentParser(prog="device_check", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=None, help="folder for device_check.json")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"some of {', '.join(dict(_names()))}")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.only or () if name not in dict(_names())]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(dict(_names()))}")
    import torch

    if not torch.cuda.is_available():
        print(f"device_check: torch {torch.__version__} finds no GPU that it can use", file=sys.stderr)
        return 2
    check = Check(arguments.out, arguments.seconds, torch.cuda.get_device_name())
    check.run([part for part in PLAN if not arguments.only or part[0] in arguments.only])
    check.report()
    return 0 if check.is_right else 1


def _names() -> list[tuple[str, None]]:
    return [(name, None) for name, _, _ in PLAN]


class Check:
    """What was found so far, and the time that is left.

    Args:
        out: folder of the JSON; None for none.
        seconds: for everything.
        gpu: its name.
    """

    def __init__(self, out: Path | None, seconds: float, gpu: str) -> None:
        self._out, self._gpu = out, gpu
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        self._ceilings: Ceilings = H200_NOTED
        self._checks: list[dict[str, Any]] = []
        self._rows: list[Row] = []
        self._seconds: dict[str, float] = {}
        self._folder = Path()

    @property
    def is_right(self) -> bool:
        """Whether everything that was checked is right, and something was."""
        return bool(self._checks) and all(row["ok"] for row in self._checks)

    def run(self, plan: list[tuple[str, dict[str, Any], float]]) -> None:
        """Run parts while there is time, and write down what is known after each."""
        with tempfile.TemporaryDirectory(prefix="octavo-check-") as folder:
            self._folder = Path(folder)
            self._run(plan)

    def _run(self, plan: list[tuple[str, dict[str, Any], float]]) -> None:
        for name, options, most_s in plan:
            left_s = self._deadline - time.monotonic()
            label = " ".join([name, *([options["shape"]] if "shape" in options else [])])
            if left_s < 10:
                self._note(label, "no time left")
                continue
            print(f"device_check: {time.monotonic() - self._started:.0f} s: {label}", file=sys.stderr, flush=True)
            started = time.monotonic()
            try:
                self._part(name, dict(options), label, min(most_s, left_s))
            except Exception as error:  # noqa: BLE001,RUF100 - whatever it was, the other parts go on
                self._note(label, f"{type(error).__name__}: {error}")
            self._seconds[label] = time.monotonic() - started
            self._write()

    def _part(self, name: str, options: dict[str, Any], label: str, timeout_s: float) -> None:
        if name in ("steps", "workload", "tokens"):
            absent = missing_packages(_NEEDED_BY_ENGINES)
            if absent:
                self._note(label, f"left out: needs {', '.join(absent)}; bring them as wheels")
                return
        if name == "workload":
            self._workload(options["shape"], timeout_s)
            return
        shape = options.pop("shape", "")
        if shape:
            options["model"] = self._model_folder(shape)
        is_check = name in ("checks", "tokens")

        def take(found: dict[str, Any]) -> None:
            if is_check:
                self._checks.append(found)
            else:
                self._rows.append(self._row(name, shape, found))
            self._write()  # as it comes: what is next may be the last that this machine does

        result = run_part(name, options, timeout_s=timeout_s, on_row=take)
        if name == "ceilings" and not result.failure:
            self._ceilings = ceilings_of(result.found, self._gpu)
        if result.failure and is_check:
            self._checks.append(_failed_check(label, result))
        elif result.failure:
            self._note(label, f"failed: {result.failure}")

    def _row(self, name: str, shape: str, found: dict[str, Any]) -> Row:
        if name != "steps":
            section = "ceilings" if name == "ceilings" else "kernels"
            return kernel_row(found, self._ceilings if section == "kernels" else None, section=section)
        # Not at the top: engines' packages may be absent.
        from ...sim.step_time.known_models import find_model
        from .command import step_row

        return step_row(found, find_model(shape), self._ceilings, shape)

    def _model_folder(self, shape: str) -> str:
        from ...actors.executor.locate import write_random_model

        folder = self._folder / shape
        if not folder.exists():
            write_random_model(shape, folder)
        return str(folder)

    def _workload(self, shape: str, timeout_s: float) -> None:
        from .command import workload_of

        engines = ("octavo", "mini-sglang", "nano-vllm") if shape == "qwen3-0.6b" else ("octavo",)
        _, rows = workload_of(
            shape,
            Path(self._model_folder(shape)),
            "dummy",
            self._ceilings,
            engines=engines,
            repeats=1,
            timeout_s=timeout_s,
            say=lambda what: print(f"device_check: {what}", file=sys.stderr, flush=True),
        )
        self._rows += rows

    def _note(self, what: str, note: str) -> None:
        self._rows.append(Row(section="-", what=what, shape="", note=note))

    def _write(self) -> None:
        if self._out is None:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        found = {
            "gpu": self._gpu,
            "python": sys.version.split()[0],
            "seconds": self._seconds,
            "ceilings": asdict(self._ceilings),
            "checks": self._checks,
            "rows": [{**asdict(row), "share": row.share} for row in self._rows],
        }
        (self._out / "device_check.json").write_text(json.dumps(found, indent=1))

    def report(self) -> None:
        """Print the tables: figures first, and what has to be right last, where it is seen."""
        print(table_of(self._rows, f"{self._gpu}: figures; {self._ceilings.source}"))
        print()
        for line in lines_of(self._checks):
            print(line)
        num_wrong = sum(not row["ok"] for row in self._checks)
        print(f"{len(self._checks)} checks, {num_wrong} wrong; {time.monotonic() - self._started:.0f} s")


def lines_of(checks: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel and dtype, with its worst case; and one for each case that is wrong."""
    lines = []
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in checks:
        kinds.setdefault((row["kernel"], row.get("dtype", "")), []).append(row)
    for (kernel, dtype), rows in kinds.items():
        right = [row for row in rows if row["ok"]]
        if right:
            worst = max(right, key=lambda row: row["error"] / row["bound"] if row["bound"] else 0.0)
            error = f"{worst['error']:.1e} of {worst['bound']:.1e}"
            lines.append(f"ok     {kernel:<18} {len(right):>3} cases {dtype:<9} worst {error}  {worst['shape']}")
        lines += [
            f"WRONG  {kernel:<18} {row['shape']:<44} {'; '.join(row['failures'][:3])}" for row in rows if not row["ok"]
        ]
    return lines


def _failed_check(label: str, result: PartResult) -> dict[str, Any]:
    return {
        "kernel": label,
        "shape": "",
        "ok": False,
        "error": 0.0,
        "bound": 0.0,
        "worst": "",
        "failures": [result.failure],
    }


def missing_packages(names: tuple[str, ...]) -> list[str]:
    """Those that cannot be imported."""
    import importlib.util

    return [name for name in names if importlib.util.find_spec(name) is None]


if __name__ == "__main__":
    sys.exit(main())
