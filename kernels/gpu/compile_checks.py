"""Compiles on all cores what checks and benchmarks of kernels will launch, before they do so one after the other.

What that is shows on a GPU that computes nothing, so that neither finding nor compiling needs one: Triton's cache, once
filled, may be carried to where one is. As a part of `device_check` this is a process of its own, as `fake_cuda` wants.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import cpu_build
from ..cores import usable_cores
from . import bench_attention_peers, bench_ceilings, bench_paged_attention, bench_products, bench_small_ops
from .check_setting import Setting
from .compile_variants import compile_variants
from .device_checks import CHECKS
from .device_time import Timed
from .fake_cuda import DEVICE, GpuFacts, KernelVariant, fake_cuda

DTYPES = ("bfloat16", "float16")

Launches = Callable[[], None]
"""Launches what some part will launch."""


def _launch_checks(name: str, dtype: str) -> None:
    for _ in CHECKS[name](Setting(DEVICE, getattr(torch, dtype), 0, small=False, computes=False)):
        pass


def _launch_attention_beside_peers() -> None:
    for shape in bench_attention_peers.SHAPES:
        bench_attention_peers.make_run("octavo", bench_attention_peers.make_inputs(shape, DEVICE))()


def _launch_attention() -> None:
    for shape in bench_paged_attention.shapes():
        layers = bench_paged_attention.make_layers(shape, DEVICE, num_layers=1)
        for call in bench_paged_attention.our_calls(layers):
            call()


def _once(*calls: Callable[[], object]) -> Timed:
    """In the place of a timer."""
    calls[0]()
    return Timed(0.0)


def _launch_products() -> None:
    # What follows from numbers that nobody has computed.
    bench_products.experts_met = lambda routes: 1.0
    bench_products.mixture_ref = lambda x, *_: x  # type: ignore[attr-defined]  # whence it is called
    bench_products._Bench._grouped_mm = lambda *_: lambda: None  # type: ignore[method-assign]  # torch's, of no concern
    for row in bench_products.rows(DEVICE, timer=_once):
        if "engine" not in row:  # of its own preparations; an engine's error is no number, as there are none
            raise RuntimeError(row["note"])


def _launch_small_ops() -> None:
    bench_small_ops.cold_time = lambda calls: _once(*calls)
    for row in bench_small_ops.rows(DEVICE):
        if "us" not in row:
            raise RuntimeError(row["note"])


def _launch_ceilings() -> None:
    bench_ceilings.read_all(torch.empty(bench_ceilings.READ_BYTES // 4, device=DEVICE))


def launches(dtypes: Sequence[str] = DTYPES, only: Sequence[str] = ()) -> dict[str, Launches]:
    """What will be launched, by part; of the checks each by itself.

    Args:
        only: some of the names.
    """
    found: dict[str, Launches] = {
        "ceilings": _launch_ceilings,
        "octavo": _launch_attention_beside_peers,
        **{
            f"check {name} {dtype}": (lambda name=name, dtype=dtype: _launch_checks(name, dtype))  # type: ignore[misc]
            for dtype in dtypes
            for name in CHECKS
        },
        "products": _launch_products,
        "small_ops": _launch_small_ops,
        "attention": _launch_attention,
    }
    return {name: launch for name, launch in found.items() if not only or name in only}


def find_launches(
    facts: GpuFacts, parts: dict[str, Launches]
) -> tuple[list[tuple[str, KernelVariant]], dict[str, str]]:
    """Every variant that parts launch, beside the first of them that does; and parts that failed, with the reason.

    Leaves the process on a GPU that computes nothing.
    """
    variants: list[tuple[str, KernelVariant]] = []
    failures: dict[str, str] = {}
    part = ""

    def note(variant: KernelVariant) -> None:
        variants.append((part, variant))

    with fake_cuda(facts, on_variant=note), torch.inference_mode():
        for part, launch in parts.items():
            try:
                launch()
            except Exception as error:  # noqa: BLE001,RUF100 - what it has not launched yet is compiled when it does
                failures[part] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return variants, failures


def _build_c_kernels() -> tuple[str, float]:
    """What came of it, and seconds."""
    started = time.perf_counter()
    built = cpu_build.library()
    return "there" if built is not None else "none; see the log", time.perf_counter() - started


def rows(
    device: torch.device,
    *,
    dtypes: Sequence[str] = DTYPES,
    only: Sequence[str] = (),
    num_processes: int | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for finding what will be launched, and one for compiling it; what does not compile, or could not be found,
    is a row as well.

    Args:
        device: a GPU whose facts count; else an H200's do.
        num_processes: None takes a core each.
    """
    facts = GpuFacts.of(device) if device.type == "cuda" and torch.cuda.is_available() else GpuFacts()
    started = time.perf_counter()
    # Beside it a C compiler builds what engines compute with on the host, or their first start would wait for it.
    with ThreadPoolExecutor(1) as beside:
        built = beside.submit(_build_c_kernels)
        variants, failures = find_launches(facts, launches(dtypes, only))
        seconds = time.perf_counter() - started
        note, c_seconds = built.result()
    yield {"kernel": "C kernels", "shape": "", "ms": c_seconds * 1e3, "note": note}
    counts = Counter(part for part, _ in variants)
    told = ", ".join(f"{part} {count}" for part, count in counts.items() if not part.startswith("check "))
    told += f", checks {sum(count for part, count in counts.items() if part.startswith('check '))}"
    yield {"kernel": "find launches", "shape": f"{len(variants)} variants", "ms": seconds * 1e3, "note": told}
    for part, failure in failures.items():
        yield {"kernel": "find launches", "shape": part, "note": f"failed: {failure}"}
    started = time.perf_counter()
    num_processes = num_processes or usable_cores()
    num_new = num_launchers = 0
    for compiled in compile_variants([variant for _, variant in variants], num_processes):
        num_new += compiled.is_new
        num_launchers += compiled.has_launcher
        if compiled.failure:
            yield {"kernel": "compile", "shape": compiled.name, "note": f"failed: {compiled.failure}"}
    yield {
        "kernel": "compile",
        "shape": f"{num_new} of {len(variants)} variants, {num_processes} processes",
        "ms": (time.perf_counter() - started) * 1e3,
        "note": f"{num_launchers} with a launcher",
    }


def main() -> None:
    """Fill Triton's cache for an H200, and say what was compiled."""
    for row in rows(torch.device("cpu")):
        print(row["kernel"], row["shape"], f"{row.get('ms', 0.0) / 1e3:.1f} s", row["note"], flush=True)


if __name__ == "__main__":
    main()
