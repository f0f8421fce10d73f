"""One script for a machine with a GPU: builds, checks, times and prints a table, within 8 minutes.

    python3 gateway/gpu_bench/device_check.py --out DIR        from a checkout, nothing installed
    python -m octavo.gateway.gpu_bench.device_check --out DIR  where octavo is installed

Every Triton kernel is checked against its meaning in float64, on fresh random inputs with poisoned outputs, and an
engine's tokens against those of the same engine on the CPU in float32. Then come the figures that BENCHMARKS.md tells:
decode steps, the workload of 256 requests, attention beside others; then everything else. Each part is a process of its
own with a limit of its own. A kernel that hangs, or takes the device with it, costs its own case, and another process
goes on behind it. The last lines say which goals are met. In DIR are, from the first figure on,

    device_check.json  every figure and check, versions, clocks
    device_check.txt   the tables
    device_check.log   what the parts wrote to standard error

What the kernels' parts launch is found on a GPU that computes nothing and compiled on all cores first; that takes no
GPU, and `python -m octavo.kernels.gpu.compile_checks` does it before there is one: bring along the folder that
TRITON_CACHE_DIR names, of the same Triton on such a Python.

What the machine needs: Python 3.11 or later, torch with CUDA and its Triton, numpy, a C compiler for Triton. That is
enough for kernels and attention. Engines need more, and these may have to be brought along as wheels: msgspec,
structlog, pyzmq, setproctitle (beside anyio, aiohttp, psutil, rich, tqdm, jinja2, prometheus_client, tokenizers,
safetensors, huggingface_hub, transformers):

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels msgspec structlog 'pyzmq<28' setproctitle
    pip install --no-deps --no-index --target site wheels/*.whl && export PYTHONPATH=$PWD/site    # on that machine

What is missing is named, and its parts are left out. To compare with others bring, for attention, FlashInfer
(flashinfer-python and apache-tvm-ffi), and FlashAttention-3's library from vLLM's wheel
(OCTAVO_FA3_LIBRARY=/path/_vllm_fa3_C.abi3.so); for engines mini-sglang, nano-vllm or vLLM on PYTHONPATH. The CUDA
toolkit's nvcc is not needed, but for FlashInfer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
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
from .goals import goals_table, verdicts  # noqa: E402
from .gpu import GpuFacts, gpu_facts, gpu_state  # noqa: E402
from .part import CASE_PARTS, CHECK_PARTS  # noqa: E402
from .parts import run_cases, run_part  # noqa: E402
from .rows import Row, ceilings_of, kernel_row, table_of  # noqa: E402


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the plan.

    Attributes:
        seconds: at most.
        shape: of the model that it takes, if it takes one.
        stall_s: longest wait for a case's next figure; 0: the whole time. Compiling a case's kernels has to fit.
    """

    name: str
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)
    shape: str = ""
    stall_s: float = 0.0

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.shape, *self.options.get("engines", ()))))


_STEPS_8B: dict[str, Any] = {"batches": [1, 64, 256], "mixed": [[255, 512]], "without_graphs": []}
# In the order of their worth; what stands together runs side by side, as what is timed there does not mind. Ceilings
# come first, since the rest is a share of them; `compile` fills Triton's cache on all cores, so that no part compiles
# kernels one after the other; models' kernels are compiled on all cores by whoever loads one. Then what has to be
# right, and then the figures that are told. Beside each what it is expected to take on an H200 with 16 cores: in all
# about 8 minutes, and where it is more, what is last is left out.
PLAN: tuple[tuple[Part, ...], ...] = (
    (Part("ceilings", 60), Part("compile", 120)),  # 40: 327 variants, which take one core 3 minutes
    (Part("checks", 120, stall_s=40), Part("tokens", 120)),  # 75: the engines of one, while the other compares
    (Part("steps", 100, shape="qwen3-0.6b"),),  # 40
    (Part("workload", 75, {"engines": ["octavo"]}, "qwen3-0.6b"),),  # 30
    (Part("octavo", 60, stall_s=25),),  # 15
    (Part("steps", 100, _STEPS_8B, "qwen3-8b"),),  # 50
    (Part("workload", 90, {"engines": ["octavo"]}, "qwen3-8b"),),  # 40
    (Part("fa3", 45, stall_s=25),),  # 15, where it is there
    (Part("flashinfer", 90),),  # 30, likewise
    (Part("cudnn", 30, stall_s=20),),  # 10
    (Part("products", 75, stall_s=25),),  # 30
    (Part("attention", 60, {"peers": []}, stall_s=25),),  # 20
    (Part("small_ops", 45, stall_s=20),),  # 15
    (Part("torch_attention", 45, stall_s=20),),  # 12
    (Part("workload", 120, {"engines": ["mini-sglang", "nano-vllm"]}, "qwen3-0.6b"),),  # 60, where they are there
    (Part("start", 75, shape="qwen3-8b"),),  # 50, two starts
    (Part("workload", 100, {"engines": ["transformers-continuous"]}, "qwen3-0.6b"),),  # 60
    (Part("flex_attention", 75, stall_s=40),),  # 50
)
_NEEDED_BY_ENGINES = ("msgspec", "structlog", "zmq", "setproctitle", "anyio", "aiohttp", "psutil", "rich", "tqdm")
FA3_LIBRARY = "OCTAVO_FA3_LIBRARY"
_OF_ENGINES = ("steps", "workload", "tokens", "start")
_LEAST_S = 10.0
_MOST_WRONG = 20
"""Lines about what is wrong: a broken device makes everything wrong, and the goals stand behind them."""


def main(argv: list[str] | None = None) -> int:
    """Returns 2 without a GPU, 1 if a check failed or could not be made, otherwise 0."""
    names = list(dict.fromkeys(part.name for group in PLAN for part in group))
    parser = argparse.ArgumentParser(prog="device_check", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=None, help="folder for device_check.json, .txt and .log")
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"some of {', '.join(names)}")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.only or () if name not in names]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(names)}")
    import torch

    if not torch.cuda.is_available():
        print(f"device_check: torch {torch.__version__} finds no GPU that it can use", file=sys.stderr)
        return 2
    check = Check(arguments.out, arguments.seconds, gpu_facts())
    wanted = [[part for part in group if not arguments.only or part.name in arguments.only] for group in PLAN]
    try:
        check.run(wanted)
    finally:
        check.report()
    return 0 if check.is_right else 1


class Check:
    """What was found so far, and the time that is left.

    Args:
        out: folder of the JSON, the tables and the log; None for none.
        seconds: for everything.
        facts: of the GPU.
    """

    def __init__(self, out: Path | None, seconds: float, facts: GpuFacts) -> None:
        self._out, self._facts = out, facts
        self._date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        self._ceilings: Ceilings = H200_NOTED
        self._checks: list[dict[str, Any]] = []
        self._rows: list[Row] = []
        self._seconds: dict[str, float] = {}
        self._states: dict[str, str] = {}
        self._folder = Path()
        self._lock = threading.RLock()  # parts that run side by side are taken in by a thread each

    @property
    def is_right(self) -> bool:
        """Whether everything that was checked is right, and something was."""
        return bool(self._checks) and all(row["ok"] for row in self._checks)

    def run(self, plan: Iterable[Iterable[Part]]) -> None:
        """Run groups of parts while there is time, and write down what is known after each figure."""
        with tempfile.TemporaryDirectory(prefix="octavo-check-") as folder:
            self._folder = Path(folder)
            for group in plan:
                parts = list(group)
                if len(parts) == 1:
                    self._run(parts[0])
                elif parts:
                    with ThreadPoolExecutor(len(parts)) as side_by_side:
                        for done in [side_by_side.submit(self._run, part) for part in parts]:
                            done.result()

    def _run(self, part: Part) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s < _LEAST_S:
            self._note(part.label, "no time left")
            return
        self._say(part.label)
        started = time.monotonic()
        try:
            self._part(part, min(part.seconds, left_s))
        except Exception as error:  # noqa: BLE001,RUF100 - whatever it was, the other parts go on
            self._note(part.label, f"failed: {type(error).__name__}: {error}")
            if part.name in CHECK_PARTS:
                self._checks.append(_failed_check(part.label, f"{type(error).__name__}: {error}"))
        with self._lock:
            self._seconds[part.label] = time.monotonic() - started
            self._states[part.label] = gpu_state()
        self._write()

    def _part(self, part: Part, timeout_s: float) -> None:
        why = why_left_out(part.name)
        if why:
            self._note(part.label, why)
            if part.name in CHECK_PARTS:
                self._checks.append(_failed_check(part.label, why))
            return
        if part.name == "workload":
            self._workload(part.shape, part.options["engines"], timeout_s)
            return
        options = dict(part.options)
        if part.shape:
            options["model"] = self._model_folder(part.shape)
        if part.name == "start":
            options |= {"name": part.shape, "all_within_s": timeout_s - _LEAST_S}  # its own imports take some

        def take(found: dict[str, Any]) -> None:
            self._take(part, found)

        run = run_cases if part.name in CASE_PARTS else run_part
        stall_s = part.stall_s or math.inf
        result = run(part.name, options, timeout_s=timeout_s, stall_s=stall_s, on_row=take)
        self._log(f"{part.label}{': ' + result.failure if result.failure else ''}", result.log)
        if part.name == "ceilings":
            self._ceilings = ceilings_of(result.found, self._facts.gpu)
        if result.failure and part.name in CHECK_PARTS:
            self._checks.append(_failed_check(part.label, result.failure))
        elif result.failure:
            self._note(part.label, f"failed: {result.failure}")

    def _take(self, part: Part, found: dict[str, Any]) -> None:
        """One figure or check, as it comes: what is next may be the last that this machine does."""
        with self._lock:
            if part.name not in CHECK_PARTS:
                self._rows.append(self._row(part, found))
            elif "failures" in found and "ok" in found:
                self._checks.append(found)
            else:  # the case that ended its process
                failed = _failed_check(str(found.get("kernel")), str(found.get("note")))
                self._checks.append({**failed, **_named(found)})
        self._write()

    def _row(self, part: Part, found: dict[str, Any]) -> Row:
        if part.name != "steps":
            section = part.name if part.name in ("ceilings", "compile", "start") else "kernels"
            return kernel_row(found, self._ceilings if section == "kernels" else None, section=section)
        # Not at the top: engines' packages may be absent.
        from ...sim.step_time.known_models import find_model
        from .command import step_row

        return step_row(found, find_model(part.shape), self._ceilings, part.shape)

    def _model_folder(self, shape: str) -> str:
        from ...actors.executor.locate import write_random_model

        folder = self._folder / shape
        if not folder.exists():
            write_random_model(shape, folder)
        return str(folder)

    def _workload(self, shape: str, engines: list[str], timeout_s: float) -> None:
        from .command import workload_of

        _, rows = workload_of(
            shape,
            Path(self._model_folder(shape)),
            "dummy",
            self._ceilings,
            engines=engines,
            repeats=1,
            timeout_s=timeout_s,
            all_within_s=timeout_s,
            say=self._tell,
        )
        with self._lock:
            self._rows += rows

    def _say(self, what: str) -> None:
        print(f"device_check: {time.monotonic() - self._started:.0f} s: {what}", file=sys.stderr, flush=True)

    def _note(self, what: str, note: str) -> None:
        with self._lock:
            self._rows.append(Row(section="-", what=what, shape="", note=note))

    def _tell(self, what: str) -> None:
        """Say the first line, and put down what is behind it."""
        first, _, log = what.partition("\n")
        self._say(first)
        self._log(first, log)

    def _log(self, title: str, text: str) -> None:
        if self._out is None or not text.strip():
            return
        with self._lock:
            self._out.mkdir(parents=True, exist_ok=True)
            with (self._out / "device_check.log").open("a", encoding="utf-8") as file:
                file.write(f"==== {title}\n{text.rstrip()}\n")

    def _write(self) -> None:
        if self._out is None:
            return
        with self._lock:
            found = {
                "command": f"device_check {' '.join(sys.argv[1:])}",
                "date": self._date,
                **asdict(self._facts),
                "seconds": self._seconds,
                "states": self._states,
                "ceilings": asdict(self._ceilings),
                "checks": self._checks,
                "rows": [{**asdict(row), "share": row.share} for row in self._rows],
                "goals": [
                    {"name": each.goal.name, "what": each.goal.what, "unit": each.goal.unit, "found": each.value}
                    | {**each.goal.thresholds, "reached": each.reached}
                    for each in verdicts(self._rows)
                ],
            }
            self._out.mkdir(parents=True, exist_ok=True)
            _replace(self._out / "device_check.json", json.dumps(found, indent=1))

    def report(self) -> None:
        """Print the tables: figures first, then what has to be right, and last the goals, where they are seen."""
        facts = self._facts
        versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        told = f"{facts.gpu}, driver {facts.driver}, Python {facts.python}, {versions}; {self._date}"
        num_wrong = sum(not row["ok"] for row in self._checks)
        text = "\n".join(
            [
                table_of(self._rows, f"{facts.gpu}: figures; {self._ceilings.source}"),
                "",
                told,
                *lines_of(self._checks),
                "",
                goals_table(verdicts(self._rows)),
                f"{len(self._checks)} checks, {num_wrong} wrong; {time.monotonic() - self._started:.0f} s",
            ]
        )
        print(text, flush=True)
        self._write()
        if self._out is not None:
            _replace(self._out / "device_check.txt", text + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees all of it, whenever this is stopped."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def lines_of(checks: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel and dtype, with its worst case; and one for each case that is wrong, up to some number."""
    lines: list[str] = []
    wrong: list[str] = []
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in checks:
        kinds.setdefault((row["kernel"], row.get("dtype", "")), []).append(row)
    for (kernel, dtype), rows in kinds.items():
        right = [row for row in rows if row["ok"]]
        if right:
            worst = max(right, key=lambda row: row["error"] / row["bound"] if row["bound"] else 0.0)
            error = f"{worst['error']:.1e} of {worst['bound']:.1e}"
            lines.append(f"ok     {kernel:<18} {len(right):>3} cases {dtype:<9} worst {error}  {worst['shape']}")
        wrong += [
            f"WRONG  {kernel:<18} {row['shape']:<44} {'; '.join(row['failures'][:3])}" for row in rows if not row["ok"]
        ]
    if len(wrong) > _MOST_WRONG:
        wrong[_MOST_WRONG:] = [f"WRONG  and {len(wrong) - _MOST_WRONG} more, in device_check.json"]
    return lines + wrong


def _failed_check(label: str, failure: str) -> dict[str, Any]:
    return {
        "kernel": label,
        "shape": "",
        "ok": False,
        "error": 0.0,
        "bound": 0.0,
        "worst": "",
        "failures": [failure],
    }


def _named(found: dict[str, Any]) -> dict[str, Any]:
    """What of a case's name a check's row has too."""
    return {name: found[name] for name in ("kernel", "dtype", "shape") if name in found}


def why_left_out(name: str) -> str:
    """What a part lacks here; empty if nothing."""
    absent = missing_packages(_NEEDED_BY_ENGINES) if name in _OF_ENGINES else []
    if absent:
        return f"left out: needs {', '.join(absent)}; bring them as wheels"
    if name == "flashinfer" and missing_packages(("flashinfer",)):
        return "left out: flashinfer is not there"
    if name == "fa3" and not os.environ.get(FA3_LIBRARY):
        return f"left out: {FA3_LIBRARY} is not set"
    return ""


def missing_packages(names: tuple[str, ...]) -> list[str]:
    """Those that cannot be imported."""
    import importlib.util

    return [name for name in names if importlib.util.find_spec(name) is None]


if __name__ == "__main__":
    sys.exit(main())
