"""Build the C kernels for this CPU at first use, and load them.

They are plain C without torch's headers, called through ctypes, which releases the GIL. The library lies in a cache
directory of the user under a name that holds a hash of all that it depends on, so that a change of source, flags,
compiler or CPU builds another one. Without a compiler, or with OCTAVO_CPU_KERNELS=0, every operation keeps its torch
path; one log line says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # not on Windows: there each process compiles for itself
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

# As in csrc/vector.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math, no contraction: masks rely on infinities, and sums and fused products are made as the source writes
# them, so that a result is the same out of every loop that computes it.
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
_NATIVE = {"aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
_BUILD_TIMEOUT_S = 600  # some seconds, but more on a machine that is busy


class BuildError(Exception):
    """The C kernels cannot be built or loaded here; the message says why."""


def cache_dir(environ: Mapping[str, str]) -> Path:
    """Where built libraries are kept: `$XDG_CACHE_HOME/octavo`, or `~/.cache/octavo`."""
    base = environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "octavo"


def build(directory: Path, environ: Mapping[str, str]) -> Path:
    """Compile the C kernels into `directory`, unless they are there already.

    Returns:
        The shared library's path.

    Raises:
        BuildError: no C compiler, one that refuses the source, or a directory that others could write to.
    """
    compiler = _find_compiler(environ)
    flags = (*_FLAGS, _NATIVE.get(platform.machine(), "-march=native"))
    sources = sorted(_SOURCES.glob("*.[ch]"))
    version = _run([compiler, "--version"])
    digest = hashlib.sha256(repr((version, flags, _cpu_identity())).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise BuildError(f"the cache directory {directory} cannot be made ({error}): set XDG_CACHE_HOME") from error
    # What lies there is run: a directory of another user, or open to others' writing, is not to be trusted.
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise BuildError(f"{directory} is not owned by this user alone: chmod 700 it, or set XDG_CACHE_HOME")
    library = directory / f"cpu_kernels_{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    c_files = [source for source in sources if source.suffix == ".c"]
    try:
        with _one_at_a_time(directory), tempfile.TemporaryDirectory(dir=directory, prefix="build_") as scratch:
            if library.exists():  # another process was at it
                return library
            built = Path(scratch) / "library.so"
            try:
                _compile(compiler, [*flags, "-fopenmp"], c_files, built)
            except BuildError:
                log.info("cpu_kernels.single_threaded reason=%r", f"{compiler} does not take -fopenmp")
                _compile(compiler, [*flags, "-Wno-unknown-pragmas"], c_files, built)
            built.replace(library)  # atomic: another process sees all of it or nothing
    except OSError as error:
        raise BuildError(f"the cache directory {directory} cannot be written ({error}): set XDG_CACHE_HOME") from error
    return library


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


def _find_compiler(environ: Mapping[str, str]) -> str:
    asked = environ.get("CC")
    for name in [asked] if asked else ["cc", "gcc", "clang"]:
        found = shutil.which(name, path=environ.get("PATH"))
        if found:
            return found
    raise BuildError("no C compiler: install gcc or clang, or name one in CC")


def _compile(compiler: str, flags: list[str], sources: list[Path], library: Path) -> None:
    """Compile the sources side by side, a few seconds each, then link them."""
    objects = [str(library.with_name(f"{source.stem}.o")) for source in sources]
    commands = [
        [compiler, *flags, "-c", str(source), "-o", target] for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(_run, commands))
    _run([compiler, *flags, "-shared", *objects, "-o", str(library), "-lm"])


def _cpu_identity() -> str:
    """What decides which instructions -march=native may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    kept = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - a list of our own making, no shell
            command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"{command[0]} refused the C kernels: {done.stderr.strip()[-500:]}")
    return done.stdout
