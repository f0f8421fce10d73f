"""Compilation while a model is loaded, on a GPU that computes nothing; what is compiled here is compiled for sm_90."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from octavo.actors.executor.config import ExecutorConfig
from octavo.models.shapes import write_config_folder

TESTS = Path(__file__).parents[3]
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
SERVED = {"cuda_graph_sizes": (1, 64), "max_model_len": 2048, "device": "cuda", "load_format": "dummy"}

# Of what was found, only kernels that compile within a second; then what a start launches, compiled as a launch does.
ALL_IN_ONE = """
import json, sys
import msgspec
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu import compile_program as ahead
from octavo.actors.executor.gpu.fake_cuda import GpuFacts
from triton import knobs

config = msgspec.json.decode(sys.argv[1], type=ExecutorConfig)
found = ahead.find_variants(config, GpuFacts())
few = [each for each in found if each.name in {"_rms_norm_kernel", "_append_tokens_kernel", "_embed_kernel"}]
first, again = (sum(each.is_new for each in ahead.compile_variants(few, 2)) for _ in range(2))
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
for each in few:
    each.compile()
print(json.dumps({"names": [each.name for each in found], "few": len(few), "first": first, "again": again,
                  "hits": hits, "keys": sorted(f"{each.name} {each.signature} {each.constexprs} {each.attributes} "
                  f"{each.options.num_warps} {each.options.num_stages}" for each in found)}))
"""

# All layers, and steps of a serving engine: each launch is specialised anew.
ALL_LAYERS = """
import json, sys
import gpu_dry_run as dry
from octavo.actors.executor.gpu import fake_cuda as fake

keys = []
make = dry.Kernels.make
def noting(self, each):
    keys.append(f"{each.name} {each.signature} {each.constexprs} {each.attributes} "
                f"{each.options.num_warps} {each.options.num_stages}")
    make(self, each)
dry.Kernels.make = noting
question = json.loads(sys.argv[1])
next(dry.answers([question]))
print(json.dumps(sorted(keys)))
"""


def output_of(code: str, argument: str, cache: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=TESTS,
        env={**ENVIRONMENT, "HOME": str(cache), "TRITON_CACHE_DIR": str(cache)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("preset", "num_layers", "more"),
    [
        ("qwen3-0.6b", 3, {}),
        ("gpt-oss-20b", 4, {}),
        ("qwen3-0.6b", 2, {"quantization": "int4"}),
    ],
)
def test_what_is_compiled_ahead_is_what_is_launched_and_lies_in_the_cache(
    preset: str, num_layers: int, more: dict[str, Any], tmp_path: Path
) -> None:
    write_config_folder(preset, tmp_path, tokenizer=None, num_hidden_layers=num_layers)
    config = ExecutorConfig(model_path=str(tmp_path), **SERVED, **more)  # type: ignore[arg-type]
    answer = json.loads(output_of(ALL_IN_ONE, msgspec.json.encode(config).decode(), tmp_path / "cache"))
    assert answer["few"] >= 3
    assert "_embed_kernel" in answer["names"]
    assert answer["first"] == answer["few"]
    assert answer["again"] == 0
    assert answer["hits"] == [True] * answer["few"]
    if more:
        assert {"_codes_kernel", "_widen_kernel"} <= set(answer["names"])
    question = {"preset": preset, "num_layers": num_layers, "num_steps": 3, "cuda_graph_sizes": [1, 64], **more}
    launched = json.loads(output_of(ALL_LAYERS, json.dumps(question), tmp_path / "cache"))
    assert answer["keys"] == launched


# Each in the place of the process that compiles: one that fails, two that do not come to an end, one that compiles.
BEGUN = """
import sys
from pathlib import Path
import msgspec
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu import compile_ahead as ahead
from octavo.actors.executor.gpu.fake_cuda import GpuFacts

folder = Path(sys.argv[1])
config = ExecutorConfig(model_path=str(folder))
answer = ahead.Answer(5, 3, 0.5, 1.5)
said = msgspec.json.encode(answer).decode()

def begin(program, **facts):
    ahead._PROGRAM = (sys.executable, "-c", program)
    return ahead.CompileAhead.begin(config, GpuFacts(**facts))

assert begin("import sys; sys.stdin.read(); sys.exit('no such model')").finish() is None
ahead._PATIENCE_S = 0.0
late = begin("import signal; signal.pause()")
process = late._process
assert late.finish() is None
assert process.returncode < 0
left = begin("import signal; signal.pause()")
process = left._process
left.cancel()
assert process.returncode < 0
ahead._PATIENCE_S = 60.0
good = begin(f"import sys; assert 'num_processes' in sys.stdin.read(); print({said!r})")
assert good.finish() == answer
assert good.finish() is None, "it is over"
good.cancel()
again = begin("import sys; sys.stdin.read()")
assert again._process is not None, "nothing was noted yet"
again.cancel()
good.note()
assert begin("pass")._process is None, "a start like it has compiled all"
assert begin("pass", free_bytes=1)._process is None, "what others take of the memory makes no difference"
other = msgspec.structs.replace(config, init_method="file:///elsewhere", replica=1, num_replicas=2, gpu=3)
assert ahead.CompileAhead.begin(other, GpuFacts())._process is None, "nor who else there is, nor where they meet"
ahead._PROGRAM = (sys.executable, "-c", "import sys; print(sys.stdin.read())")
ahead.os.sched_getaffinity = lambda pid: set(range(16))
second = ahead.CompileAhead.begin(config, GpuFacts(), rank=1, num_sharing=4)
assert second._process is not None, "another rank has other kernels"
question = msgspec.json.decode(second._process.communicate()[0], type=ahead.Question)
assert (question.rank, question.num_processes) == (1, 3), "ranks share the cores"
here = folder / "config.json"
here.write_text(here.read_text() + " ")
another = begin("import sys; sys.stdin.read()")
assert another._process is not None
another.cancel()
print("done")
"""


def test_a_start_waits_in_vain_for_nothing_and_one_like_an_earlier_one_does_not_wait(tmp_path: Path) -> None:
    write_config_folder("qwen3-0.6b", tmp_path, tokenizer=None)
    assert output_of(BEGUN, str(tmp_path), tmp_path / "cache") == "done"


# Models of which it cannot be found out what they launch: no process is begun, or it says why; a line of the log, each.
LEFT_OUT = """
import json, sys
from pathlib import Path
import structlog
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu import compile_ahead as ahead
from octavo.actors.executor.gpu.fake_cuda import GpuFacts

folder = Path(sys.argv[1])
gguf = folder / "model.gguf"
gguf.write_bytes(b"GGUF")
with structlog.testing.capture_logs() as lines:
    for config in (
        ExecutorConfig(model_path=str(gguf)),
        ExecutorConfig(model_path=str(folder), model_impl="transformers"),
        ExecutorConfig(model_path=str(folder / "nowhere")),
    ):
        begun = ahead.CompileAhead.begin(config, GpuFacts())
        assert begun._process is None
        assert begun.finish() is None
assert [line["event"] for line in lines] == ["executor.compile_ahead"] * 2
assert all(line["log_level"] == "info" for line in lines)
assert "GGUF file" in lines[0]["left_out"] and "no native implementation" in lines[1]["left_out"]
here = folder / "config.json"
here.write_text(json.dumps(json.loads(here.read_text()) | {"hidden_act": "sine"}))  # known to be ours, and is not
begun = ahead.CompileAhead.begin(ExecutorConfig(model_path=str(folder), device="cuda"), GpuFacts())
with structlog.testing.capture_logs() as lines:
    answer = begun.finish()
assert answer.num_variants == 0 and "'sine' is not supported" in answer.left_out, answer
assert [(line["log_level"], line["left_out"]) for line in lines] == [("info", answer.left_out)]
print("done")
"""


def test_what_cannot_be_compiled_ahead_is_left_out_with_a_line_that_says_why(tmp_path: Path) -> None:
    write_config_folder("qwen3-0.6b", tmp_path, tokenizer=None)
    assert output_of(LEFT_OUT, str(tmp_path), tmp_path / "cache") == "done"


# A library with the driver's functions that launchers are linked with; none of them is called.
DRIVER = "".join(
    f"int {name}(void) {{ return 1; }}\n"
    for name in (
        *("cuGetErrorString", "cuPointerGetAttribute", "cuCtxGetCurrent", "cuDeviceGet"),
        *("cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuFuncSetAttribute", "cuLaunchKernelEx"),
    )
)

# Compiled ahead without the driver's library and with it; then made ready as a launch does, where no C compiler is.
LAUNCHERS = """
import json, sys
import msgspec
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu import compile_program as ahead
from octavo.actors.executor.gpu.fake_cuda import GpuFacts
from octavo.kernels.gpu.fake_cuda import build_launcher
from triton import knobs

config = msgspec.json.decode(sys.argv[1], type=ExecutorConfig)
found = ahead.find_variants(config, GpuFacts())
few = [each for each in found if each.name in {"_rms_norm_kernel", "_append_tokens_kernel"}]
other = next(each for each in found if each.name == "_embed_kernel").compile()
path, knobs.nvidia.libcuda_path = knobs.nvidia.libcuda_path, "/nowhere"
without = sum(each.has_launcher for each in ahead.compile_variants(few, 2))
knobs.nvidia.libcuda_path = path
compiled = list(ahead.compile_variants(few, 2))
assert not any(each.is_new for each in compiled)
def no_compiler(*_):
    raise RuntimeError("a launch runs the C compiler")
knobs.build.impl = no_compiler
print(json.dumps({"few": len(few), "without": without, "with": sum(each.has_launcher for each in compiled),
                  "cached": sum(build_launcher(each.compile()) for each in few), "other": build_launcher(other)}))
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler, as Triton does")
def test_what_launches_a_kernel_is_built_ahead_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(tmp_path / "driver.c")]
    subprocess.run(command, check=True)
    monkeypatch.setitem(ENVIRONMENT, "TRITON_LIBCUDA_PATH", str(tmp_path))
    monkeypatch.setitem(ENVIRONMENT, "LD_LIBRARY_PATH", str(tmp_path))
    write_config_folder("qwen3-0.6b", tmp_path, tokenizer=None, num_hidden_layers=1)
    config = ExecutorConfig(model_path=str(tmp_path), **SERVED)  # type: ignore[arg-type]
    answer = json.loads(output_of(LAUNCHERS, msgspec.json.encode(config).decode(), tmp_path / "cache"))
    assert answer["few"] >= 2
    assert answer["without"] == 0
    assert answer["with"] == answer["cached"] == answer["few"]
    assert not answer["other"], "or there would be a C compiler"


# A start on the GPU that computes nothing, which says that it is there; what stands for the compiling process says when
# it was waited for, and the model's launches when warm-up began.
LOADED = """
import sys
import msgspec
import torch
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu import compile_ahead as ahead
from octavo.actors.executor.gpu.fake_cuda import DEVICE, GpuFacts, fake_cuda
from octavo.actors.executor.runner import load_runner
from octavo.messages.errors import OctavoError

config = msgspec.json.decode(sys.argv[1], type=ExecutorConfig)
answer = msgspec.json.encode(ahead.Answer(5, 3, 0.5, 1.5)).decode()
events = []
wait, end = ahead.CompileAhead.finish, ahead._end
ahead.CompileAhead.finish = lambda self: events.append(wait(self))
ahead._end = lambda process: (end(process), events.append("ended"))
with fake_cuda(GpuFacts(), on_variant=lambda each: events.append(each.name)):
    torch.cuda.is_available, torch.cuda.current_device = lambda: True, lambda: 0
    torch.cuda.get_device_capability = lambda _device: (9, 0)
    ahead._PROGRAM = (sys.executable, "-c", "import signal; signal.pause()")
    for path, expected in (("/nowhere", []), (config.model_path, ["ended"])):  # the latter has no weights
        try:
            load_runner(msgspec.structs.replace(config, model_path=path, load_format="auto"))
        except OctavoError:
            assert events == expected, "a model that cannot be loaded is not waited for"
        else:
            raise AssertionError
        events.clear()
    ahead._PROGRAM = (sys.executable, "-c", f"import sys; sys.stdin.read(); print({answer!r})")
    load_runner(config)
    assert events.count(msgspec.json.decode(answer, type=ahead.Answer)) == 1
    at = events.index(msgspec.json.decode(answer, type=ahead.Answer))
    assert "share_kernel" in events[at:] and "choose_kernel" in events[at:], "warm-up comes after it"
    assert ahead.CompileAhead.begin(config, GpuFacts.of(DEVICE))._process is None, "it was noted"
print("done")
"""


def test_a_model_is_loaded_while_its_kernels_are_compiled_and_warmed_up_after(tmp_path: Path) -> None:
    write_config_folder("qwen3-0.6b", tmp_path, tokenizer=None, num_hidden_layers=1)
    config = ExecutorConfig(model_path=str(tmp_path), **SERVED)  # type: ignore[arg-type]
    assert output_of(LOADED, msgspec.json.encode(config).decode(), tmp_path / "cache") == "done"


# A start whose process is killed while the one that compiles, and its two workers, are at work.
ORPHANS = """
import signal, sys, time
import msgspec
from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu import compile_ahead as ahead
from octavo.actors.executor.gpu.fake_cuda import GpuFacts

program = '''
import sys, time
from octavo.actors.executor.gpu import compile_program as ahead

class Endless:
    name = signature = constexprs = attributes = options = "k"

    def compile(self):
        time.sleep(600)

ahead.find_variants = lambda config, facts, rank: [Endless()] * 2
ahead.main()
'''
ahead._PROGRAM = (sys.executable, "-c", program)
ahead.os.sched_getaffinity = lambda pid: {0, 1, 2}
begun = ahead.CompileAhead.begin(msgspec.json.decode(sys.argv[1], type=ExecutorConfig), GpuFacts())
print(begun._process.pid, flush=True)
signal.pause()
"""


def test_nothing_of_it_outlives_a_start_that_is_killed(tmp_path: Path) -> None:
    write_config_folder("qwen3-0.6b", tmp_path, tokenizer=None)
    config = msgspec.json.encode(ExecutorConfig(model_path=str(tmp_path))).decode()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    start = subprocess.Popen(
        [sys.executable, "-c", ORPHANS, config], stdout=subprocess.PIPE, text=True, cwd=TESTS, env=environment
    )
    try:
        assert start.stdout is not None
        compiling = psutil.Process(int(start.stdout.readline()))
        while len(workers := compiling.children()) < 2:
            assert compiling.is_running()
            time.sleep(0.01)
    finally:
        start.kill()
        start.communicate()
    _, alive = psutil.wait_procs([compiling, *workers], timeout=60)
    assert not alive
