from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from c_library import COMPILER, HAS_C, needs_c

from octavo.kernels import cpu_build, thread_binding


def make_tool(folder: Path, name: str, script: str) -> Path:
    """A shell script; `$CC` in it is the compiler."""
    folder.mkdir(exist_ok=True)
    tool = folder / name
    tool.write_text(f"#!/bin/sh\nCC={COMPILER}\n{script}\n")
    tool.chmod(0o700)
    return tool


def environ_of(folder: Path, **more: str) -> dict[str, str]:
    return {"PATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), **more}


@pytest.fixture
def threads_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small source instead of all: what is tested is how it is built."""
    (tmp_path / "src").mkdir()
    shutil.copy(cpu_build._SOURCES / "threads.c", tmp_path / "src")
    monkeypatch.setattr(cpu_build, "_SOURCES", tmp_path / "src")


def test_there_are_c_kernels_wherever_there_is_a_compiler() -> None:
    """Without them every operation would quietly take its torch path, and so would its tests."""
    assert (cpu_build.library() is not None) == HAS_C


@needs_c
def test_a_library_is_built_without_a_warning_and_once_into_a_directory_of_the_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "cache" / "octavo"
    environ = {**os.environ, "CC": f"'{COMPILER}' -Wall -Werror"}
    library = cpu_build.build(directory, environ)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in directory.iterdir()} == {library.name, "build.lock"}  # nothing half-built is left
    assert ctypes.CDLL(str(library)).octavo_paged_attention
    built_at = library.stat().st_mtime_ns
    assert cpu_build.build(directory, environ) == library
    assert library.stat().st_mtime_ns == built_at


@needs_c
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(cpu_build.BuildError, match="chmod 700"):
        cpu_build.build(directory, os.environ)


def test_without_a_compiler_one_log_line_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environ = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    with caplog.at_level(logging.INFO):
        assert cpu_build.load(environ) is None
    assert len(caplog.records) == 1
    assert "install gcc or clang" in caplog.text


def test_a_compiler_that_fails_leaves_torch_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho broken compiler >&2; exit 1\n')
    compiler.chmod(0o700)
    with caplog.at_level(logging.WARNING):
        assert cpu_build.load({"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}) is None
    assert "broken compiler" in caplog.text


def test_it_can_be_switched_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert cpu_build.load({"OCTAVO_CPU_KERNELS": "0", "XDG_CACHE_HOME": str(tmp_path)}) is None
    assert "OCTAVO_CPU_KERNELS=0" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_relative_cache_home_is_ignored_as_its_specification_says() -> None:
    assert cpu_build.cache_dir({"XDG_CACHE_HOME": "somewhere"}) == Path.home() / ".cache" / "octavo"
    assert cpu_build.cache_dir({"XDG_CACHE_HOME": "/var/cache/me"}) == Path("/var/cache/me/octavo")


REFUSES_OPENMP = 'case "$*" in *-fopenmp*) exit 1;; esac; exec $CC "$@"'


@needs_c
@pytest.mark.usefixtures("threads_only")
def test_a_compiler_without_openmp_builds_for_one_thread_and_nobody_takes_that_for_a_team(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_tool(tmp_path / "bin", "cc", REFUSES_OPENMP)
    environ = environ_of(tmp_path / "bin")
    with caplog.at_level(logging.WARNING):
        kernels = cpu_build.load(environ)
    assert kernels is not None
    assert "has no OpenMP" in caplog.text
    monkeypatch.setattr(thread_binding, "_kernels", lambda: kernels)
    allowed = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="fewer than 2 threads"):
        thread_binding.bind_team([min(allowed)] * 2)
    assert os.sched_getaffinity(0) == allowed
    make_tool(tmp_path / "bin", "cc", 'exec $CC "$@"')  # its OpenMP was installed: threads at last
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert cpu_build.build(cpu_build.cache_dir(environ), environ) != Path(kernels._name)
    assert not caplog.records


@needs_c
@pytest.mark.usefixtures("threads_only")
def test_a_compiler_that_is_killed_at_its_work_leaves_no_library_for_one_thread_behind(tmp_path: Path) -> None:
    make_tool(tmp_path / "bin", "cc", 'case "$*" in *threads.c*) kill -9 $$;; esac; exec $CC "$@"')
    environ = environ_of(tmp_path / "bin")
    with pytest.raises(cpu_build.BuildError, match=r"cc failed \(-9\)"):
        cpu_build.build(tmp_path / "cache", environ)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.lock"]


@needs_c
@pytest.mark.usefixtures("threads_only")
def test_of_several_compilers_the_first_that_builds_is_taken_and_found_again(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    make_tool(tmp_path / "bin", "cc", f'[ "$1" = --version ] && echo "cc 1" && exit; echo "$@" >> {calls}; exit 1')
    make_tool(tmp_path / "bin", "gcc", 'exec $CC "$@"')
    library = cpu_build.build(tmp_path / "cache", environ_of(tmp_path / "bin"))
    assert library.exists()
    asked = calls.read_text()
    assert cpu_build.build(tmp_path / "cache", environ_of(tmp_path / "bin")) == library
    assert calls.read_text() == asked  # what failed once is not tried again where there is a library


@needs_c
@pytest.mark.usefixtures("threads_only")
def test_cc_may_be_a_command_with_arguments_of_its_own(tmp_path: Path) -> None:
    make_tool(tmp_path / "bin", "wrapper", 'exec "$@"')
    environ = environ_of(tmp_path / "bin", CC=f"wrapper '{COMPILER}' -DSOME")
    library = cpu_build.build(tmp_path / "cache", environ)
    assert library.exists()
    assert cpu_build.build(tmp_path / "cache", {**environ, "CC": f"wrapper {COMPILER}"}) != library
    with pytest.raises(cpu_build.BuildError, match=r"CC=.* is no command"):
        cpu_build.build(tmp_path / "cache", {**environ, "CC": "'gcc"})
    with pytest.raises(cpu_build.BuildError, match="'absent', which CC names"):
        cpu_build.build(tmp_path / "cache", {**environ, "CC": "absent -O2"})


@needs_c
def test_no_more_files_are_compiled_at_once_than_there_are_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "src"
    sources.mkdir()
    for index in range(4):
        (sources / f"part{index}.c").write_text(f"int part{index}(void) {{ return {index}; }}\n")
    monkeypatch.setattr(cpu_build, "_SOURCES", sources)
    monkeypatch.setattr(cpu_build, "usable_cores", lambda: 1)
    # A folder can be made once: who finds it there is not alone.
    alone = f'mkdir {tmp_path}/busy || exit 1; $CC "$@"; status=$?; rmdir {tmp_path}/busy; exit $status'
    make_tool(tmp_path / "bin", "cc", alone)
    environ = environ_of(tmp_path / "bin")
    environ["PATH"] += os.pathsep + os.environ["PATH"]
    assert cpu_build.build(tmp_path / "cache", environ).exists()


X86_LEVELS = ("x86-64-v3", "x86-64-v4", "icelake-server")  # AVX2; AVX-512; and its VNNI


@needs_c
@pytest.mark.skipif(platform.machine() != "x86_64", reason="they are of x86")
@pytest.mark.parametrize("level", X86_LEVELS)
def test_branches_for_other_processors_compile_without_a_warning(level: str) -> None:
    flags = [flag for flag in cpu_build._flags("-fopenmp") if not flag.startswith("-march")]
    sources = sorted(map(str, cpu_build._SOURCES.glob("*.c")))
    done = subprocess.run(
        [COMPILER, *flags, f"-march={level}", "-Wall", "-Werror", "-fsyntax-only", *sources],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


HALVES = """
#include "vector.h"
void to_floats(const uint16_t *from, float *to, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store(to, i, load(from, i, F16), F32);
}
void to_halves(const float *from, uint16_t *to, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) store(to, i, load(from, i, F32), F16);
}
float to_float(const uint16_t *from) { return widen_half(from); }
"""


@needs_c
@pytest.mark.parametrize("options", [[], ["-U__F16C__", "-U__FLT16_MAX__"]], ids=["native", "without float16"])
def test_float16_is_converted_exactly_and_rounded_to_even_whatever_the_compiler_knows_of_it(
    options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "halves.c").write_text(HALVES)
    library = tmp_path / "halves.so"
    command = [COMPILER, *cpu_build._flags("-fopenmp"), *options, f"-I{cpu_build._SOURCES}", "-shared"]
    subprocess.run([*command, str(tmp_path / "halves.c"), "-o", str(library)], check=True)
    kernels = ctypes.CDLL(str(library))
    kernels.to_float.restype = ctypes.c_float
    bits = torch.arange(-(2**15), 2**15).short()
    halves, floats = bits.view(torch.float16), torch.empty(2**16)
    kernels.to_floats(*(ctypes.c_void_p(halves.data_ptr()), ctypes.c_void_p(floats.data_ptr()), ctypes.c_int64(2**16)))
    assert torch.equal(floats.nan_to_num(7e9), halves.float().nan_to_num(7e9))
    assert all(kernels.to_float(ctypes.c_void_p(halves[i:].data_ptr())) == floats[i] for i in range(0, 2**16, 97)[:300])
    # Each half, what lies between it and the next, ties and their neighbours; and what is too large.
    finite = halves[halves.isfinite()].float()
    ties = finite + (torch.nextafter(finite.half(), torch.tensor(65504.0).half()).float() - finite) / 2
    wide = torch.cat((finite, ties, ties.nextafter(torch.tensor(1e9)), ties.nextafter(torch.tensor(-1e9))))
    some = torch.tensor(
        [65519.99, 65520.0, 7e4, 3e38, -3e38, float("inf"), -float("inf"), float("nan"), 1e-30, 2.0**-25]
    )
    wide = torch.cat((wide, some))
    wide = torch.cat((wide, wide.new_zeros(-len(wide) % 16)))
    rounded = torch.empty(len(wide), dtype=torch.float16)
    kernels.to_halves(
        *(ctypes.c_void_p(wide.data_ptr()), ctypes.c_void_p(rounded.data_ptr()), ctypes.c_int64(len(wide)))
    )
    assert torch.equal(rounded.nan_to_num(-7.0), wide.half().nan_to_num(-7.0))
    assert torch.equal(rounded.isnan(), wide.isnan())


def test_who_does_not_need_the_kernels_does_not_have_them_built() -> None:
    code = (
        "from octavo.kernels import cpu_build, thread_binding\n"
        "thread_binding.release_team()\n"
        "assert cpu_build.loaded() is None and cpu_build._library_once.cache_info().currsize == 0\n"
        "assert cpu_build.library() is cpu_build.loaded()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
