"""Compile Triton kernels for Hopper (sm_90a) without a GPU, in a process without the interpreter.

    reports = compile_all([Variant("octavo.kernels.gpu.rms_norm:_rms_norm_kernel",
                                   signature={"x_ptr": "*bf16", "hidden_size": "i32:16", "eps": "fp32"},
                                   constexprs={"BLOCK": 4096}, num_warps=4)])
    assert reports[0].spills == 0

A process for each core compiles its part of a list: starting it costs seconds, a small kernel half a second, a large
one five.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MAX_SHARED_BYTES = 227 * 1024  # that one thread block of an H100 or H200 can have
FEWEST_VARIANTS = 8  # that a process is worth its start for


@dataclasses.dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel.

    Attributes:
        kernel: `module:function`.
        signature: each argument that is not a constexpr, in any order: `*bf16`, `*fp32`, `*i32`, `*i64`, `*fp8e4nv`,
            `*i8`, `*u8`, `i32`, `i64`, `fp32`. Pointers are taken as aligned to 16 bytes; `:16` behind an
            integer says that it is divisible by 16, `:1` behind a pointer takes the alignment away. An integer argument
            that will be 1 or an argument that will be None belongs into `constexprs` (as Triton does at launch).
        constexprs: plain values or dataclasses of them; the string `tl.bfloat16` means that type.
        enable_fp_fusion: whether products may be fused with sums.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a variant.

    Attributes:
        num_registers: of a thread.
        shared_bytes: of a thread block.
        spills: bytes stored to and loaded from local memory for want of registers.
        sass: disassembly, where asked for.
    """

    ptx: str
    ttgir: str
    num_registers: int
    shared_bytes: int
    spills: int
    sass: str = ""

    @property
    def uses_wgmma(self) -> bool:
        return "wgmma.mma_async" in self.ptx


def compile_all(variants: Sequence[Variant], *, sass: bool = False, timeout_s: float = 600) -> list[Report]:
    """Compile all variants for sm_90a, in child processes.

    Raises:
        RuntimeError: one does not compile; the message is the child's.
    """
    from octavo.kernels.cores import usable_cores  # here, as a child that only compiles has no use for it

    num_processes = max(1, min(usable_cores(), len(variants) // FEWEST_VARIANTS))
    # Every so many of them: variants beside each other are of one kernel, and take about as long.
    parts = [variants[first::num_processes] for first in range(num_processes)]
    reports: list[Report | None] = [None] * len(variants)
    with ThreadPoolExecutor(num_processes) as processes:
        for first, part in enumerate(processes.map(lambda part: _compile_part(part, sass, timeout_s), parts)):
            reports[first::num_processes] = part
    return [report for report in reports if report is not None]


def _compile_part(variants: Sequence[Variant], sass: bool, timeout_s: float) -> list[Report]:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_ALWAYS_COMPILE"] = "1"  # ptxas says how much it spilled only when it runs
    plain = [
        {**vars(variant), "constexprs": {name: _to_json(value) for name, value in variant.constexprs.items()}}
        for variant in variants
    ]
    question = json.dumps({"variants": plain, "sass": sass})
    done = subprocess.run(
        [sys.executable, __file__],
        input=question,
        capture_output=True,
        text=True,
        env=environ,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"compilation failed:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    return [Report(**report) for report in json.loads(done.stdout.splitlines()[-1])]


def compiled(
    kernel: str, signature: dict[str, str], constexprs: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> Report:
    """`compile_all` of one variant."""
    return compile_all([Variant(kernel, signature, constexprs, num_warps, num_stages)])[0]


def _to_json(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    kind = type(value)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "fields": vars(value)}


def _from_json(value: Any) -> Any:
    """In the child: what `_to_json` was given."""
    import triton.language as tl  # here, and not in the process of the tests, whose triton interprets

    if isinstance(value, str) and value.startswith("tl."):
        return getattr(tl, value[3:])
    if isinstance(value, dict):
        module, _, name = value["class"].partition(":")
        return getattr(importlib.import_module(module), name)(**value["fields"])
    return value


def _compile(variant: Variant, *, sass: bool) -> Report:
    """In the child: one variant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = variant.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    constexprs = {key: _from_json(value) for key, value in variant.constexprs.items()}
    unknown = (set(variant.signature) | set(constexprs)) ^ set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{variant.kernel}: arguments not given, or not its own: {sorted(unknown)}")
    signature, attributes = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        kind, _, divisor = variant.signature.get(argument, "constexpr").partition(":")
        signature[argument] = kind
        if divisor == "16" or (kind.startswith("*") and divisor != "1"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(
            source,
            target=GPUTarget("cuda", 90, 32),
            options={
                "num_warps": variant.num_warps,
                "num_stages": variant.num_stages,
                "enable_fp_fusion": variant.enable_fp_fusion,
            },
        )
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    assert registers is not None, text
    return Report(
        ptx=binary.asm["ptx"],
        ttgir=binary.asm["ttgir"],
        num_registers=int(registers[1]),
        shared_bytes=binary.metadata.shared,
        spills=sum(int(count) for count in re.findall(r"(\d+) bytes spill", text)),
        sass=binary.asm["sass"] if sass else "",
    )


def _main() -> None:
    question = json.load(sys.stdin)
    variants = [Variant(**variant) for variant in question["variants"]]
    reports = [dataclasses.asdict(_compile(variant, sass=question["sass"])) for variant in variants]
    print(json.dumps(reports))


if __name__ == "__main__":
    _main()
