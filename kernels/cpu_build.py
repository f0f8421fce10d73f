"""Build the C kernels for this CPU at first use, and load them.

They are plain C without torch's headers, called through ctypes, which releases the GIL. The library lies in a cache
directory of the user under a name that holds a hash of all that it depends on, so that a change of source, flags,
compiler or CPU builds another one. GCC from 11 on and Clang from 14 on have been tried; of several compilers the
first that builds it is taken. Without one, or with OCTAVO_CPU_KERNELS=0, every operation keeps its torch path; one log
line says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .cores import usable_cores

try:
    import fcntl
except ImportError:  # not on Windows: there each process compiles for itself
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# As in csrc/vector.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# What the kernels take and return: a size counts what lies in memory, a code is a dtype's, a status or a small number.
POINTER, SIZE, CODE, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

_SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math, no contraction: masks rely on infinities, and sums and fused products are made as the source writes
# them, so that a result is the same out of every loop that computes it.
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_NATIVE = {"aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_THREADED, _SINGLE = "-fopenmp", "-Wno-unknown-pragmas"
_OPENMP_PROBE = "#include <omp.h>\nint octavo_probe(void) { return omp_get_max_threads(); }\n"
_BUILD_TIMEOUT_S = 600  # some seconds, but more on a machine that is busy


class BuildError(Exception):
    """The C kernels cannot be built or loaded here; the message says why."""


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where built libraries are kept: `$XDG_CACHE_HOME/octavo`, or `~/.cache/octavo`."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "octavo"


@dataclass(frozen=True, slots=True)
class _Compiler:
    """`command` with its own options, and what it says of itself."""

    command: tuple[str, ...]
    version: str

    def library(self, directory: Path, threads: str) -> Path:
        """Where the library lies that it builds with `threads` among its flags."""
        asked = (self.command[1:], self.version, _flags(threads), _cpu_identity())
        digest = hashlib.sha256(repr(asked).encode())
        for source in _sources():
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return directory / f"cpu_kernels_{digest.hexdigest()[:24]}.so"


def build(directory: Path, environ: Mapping[str, str]) -> Path:
    """Compile the C kernels into `directory`, unless they are there already.

    Returns:
        The shared library's path.

    Raises:
        BuildError: no C compiler, none that takes the source, or a directory that others could write to.
    """
    compilers = _find_compilers(environ)
    try:
        _make_private(directory)
        for compiler in compilers:
            if (library := compiler.library(directory, _THREADED)).exists():
                return library
        failures = []
        for compiler in compilers:
            try:
                return _build_with(compiler, directory)
            except BuildError as error:
                failures.append(str(error))
    except OSError as error:
        raise BuildError(f"the cache directory {directory} cannot be used ({error}): set XDG_CACHE_HOME") from error
    raise BuildError("; ".join(failures))


def _make_private(directory: Path) -> None:
    """See that the directory is there, and that what lies in it, which will be run, is of this user alone."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise BuildError(f"{directory} is not owned by this user alone: chmod 700 it, or set XDG_CACHE_HOME")


def _build_with(compiler: _Compiler, directory: Path) -> Path:
    with _one_at_a_time(directory), tempfile.TemporaryDirectory(dir=directory, prefix="build_") as scratch:
        threads = _THREADED
        if not compiler.library(directory, _THREADED).exists() and not _takes_openmp(compiler, Path(scratch)):
            log.warning(
                "cpu_kernels.single_threaded reason=%r consequence='CPU operations run on one core each'",
                f"{compiler.command[0]} has no OpenMP: with clang install libomp-dev, or take gcc",
            )
            threads = _SINGLE
        library = compiler.library(directory, threads)
        if not library.exists():  # otherwise another process was at it
            built = Path(scratch) / "library.so"
            _compile(compiler.command, _flags(threads), [path for path in _sources() if path.suffix == ".c"], built)
            built.replace(library)  # atomic: another process sees all of it or nothing
    return library


def _takes_openmp(compiler: _Compiler, scratch: Path) -> bool:
    """Whether it compiles for threads and finds their library.

    Raises:
        BuildError: it compiles nothing at all, or was killed at it, which says nothing about threads.
    """
    source = scratch / "probe.c"
    source.write_text(_OPENMP_PROBE)
    command = [*compiler.command, "-shared", "-fPIC", str(source), "-o", str(scratch / "probe.so")]
    try:
        _run([*command, _THREADED])
    except BuildError:
        source.write_text("int octavo_probe(void) { return 0; }\n")
        _run(command)
        return False
    return True


def _sources() -> list[Path]:
    return sorted(_SOURCES.glob("*.[ch]"))


def _flags(threads: str) -> tuple[str, ...]:
    return (*_FLAGS, _NATIVE.get(platform.machine(), "-march=native"), threads)


def load(environ: Mapping[str, str]) -> ctypes.CDLL | None:
    """The C kernels, built if need be; None, with one log line, where only the torch paths are possible."""
    if environ.get("OCTAVO_CPU_KERNELS", "1") == "0":
        log.info("cpu_kernels.off reason='OCTAVO_CPU_KERNELS=0'")
        return None
    try:
        # torch has loaded its OpenMP already; by its name (libgomp.so.1) the library is bound to the very same one.
        return ctypes.CDLL(str(build(cache_dir(environ), environ)))
    except (BuildError, OSError) as error:
        log.warning("cpu_kernels.unavailable reason=%r consequence='CPU operations run in torch, slower'", str(error))
        return None


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Hold a lock on the directory, so that processes that start together do not all compile; waits for its turn."""
    if fcntl is None:
        yield
        return
    with (directory / "build.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_lock = threading.Lock()


@functools.cache
def _library_once() -> ctypes.CDLL | None:
    return load(os.environ)


def library() -> ctypes.CDLL | None:
    """This process's C kernels, built and loaded at the first call; None where there are none."""
    with _lock:
        return _library_once()


def loaded() -> ctypes.CDLL | None:
    """As `library`, but None where nothing has asked for it yet: for whoever does not need it."""
    with _lock:
        return _library_once() if _library_once.cache_info().currsize else None


def declared(**signatures: tuple[type[Any] | None, ...]) -> Callable[[], ctypes.CDLL | None]:
    """A function that gives the C kernels as `library` does, with the types of some of them declared.

    Args:
        signatures: by a kernel's name the type of its result, None for none, then those of its arguments.
    """

    @functools.cache
    def kernels() -> ctypes.CDLL | None:
        loaded = library()
        if loaded is not None:
            for name, (result, *arguments) in signatures.items():
                kernel = getattr(loaded, name)
                kernel.restype, kernel.argtypes = result, arguments
        return loaded

    return kernels


def _find_compilers(environ: Mapping[str, str]) -> list[_Compiler]:
    """Those to try, in turn: what CC names, otherwise the usual ones, each compiler once whatever it is called.

    Raises:
        BuildError: there is none, or none that runs.
    """
    asked = environ.get("CC", "")
    try:
        commands = [shlex.split(asked)] if asked.strip() else [["cc"], ["gcc"], ["clang"]]
    except ValueError as error:
        raise BuildError(f"CC={asked!r} is no command ({error})") from error
    found: dict[str, _Compiler] = {}
    failures = []
    for name, *options in commands:
        path = shutil.which(name, path=environ.get("PATH"))
        if path is None:
            continue
        try:
            version = _run([path, *options, "--version"])
        except BuildError as error:
            failures.append(str(error))
            continue
        # `cc (Debian 12.2.0) ...` and `gcc (Debian 12.2.0) ...` are one.
        found.setdefault(version.partition(" ")[2] or path, _Compiler((path, *options), version))
    if not found:
        reason = "; ".join(failures) or (
            f"no C compiler {commands[0][0]!r}, which CC names" if asked else "no C compiler"
        )
        raise BuildError(f"{reason}: install gcc or clang, or name one in CC")
    return list(found.values())


def _compile(command: Sequence[str], flags: Sequence[str], sources: Sequence[Path], library: Path) -> None:
    """Compile the sources, as many side by side as there are cores (each takes seconds, and memory), then link them."""
    largest_first = sorted(sources, key=lambda source: -source.stat().st_size)
    objects = {source: str(library.with_name(f"{source.stem}.o")) for source in largest_first}
    with ThreadPoolExecutor(min(len(sources), usable_cores())) as pool:
        compiled = [
            pool.submit(_run, [*command, *flags, "-c", str(source), "-o", target]) for source, target in objects.items()
        ]
        try:
            for one in compiled:
                one.result()
        except BuildError:
            pool.shutdown(cancel_futures=True)  # the others would only keep this waiting
            raise
    _run([*command, *flags, "-shared", *sorted(objects.values()), "-o", str(library), "-lm"])


def _cpu_identity() -> str:
    """What decides which instructions -march=native may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kept = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - a list of our own making, no shell
            command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-500:]}")
    return done.stdout
