"""Processes that compile to the same cache at the same time divide the work, and wait for each other at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from octavo.kernels.gpu.compile_locks import CompileLocks

# Compiles two variants, unless another process is at it; says what it begins with as it does.
COMPILES = """
import sys
from pathlib import Path
from octavo.kernels.gpu.compile_locks import CompileLocks
from octavo.kernels.gpu.compile_variants import compile_variants

class Variant:
    signature = constexprs = attributes = options = None

    def __init__(self, name):
        self.name = name

    def compile(self):
        print(self.name, flush=True)

for _ in compile_variants([Variant("first"), Variant("second")], 1, locks=CompileLocks(Path(sys.argv[1]))):
    pass
"""


class Variant:
    signature = constexprs = attributes = options = None

    def __init__(self, name: str) -> None:
        self.name = name


def compiling(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", COMPILES, str(folder)], stdout=subprocess.PIPE, text=True)


def test_what_another_process_compiles_comes_last_and_is_waited_for(tmp_path: Path) -> None:
    locks = CompileLocks(tmp_path)
    with locks.held(Variant("first"), waits=False) as is_ours:  # type: ignore[arg-type]
        assert is_ours
        other = compiling(tmp_path)
        assert other.stdout is not None
        assert other.stdout.readline() == "second\n"
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "first\n"
    assert other.returncode == 0


def test_a_process_that_is_killed_keeps_no_other_from_compiling(tmp_path: Path) -> None:
    held = "locks.held(Variant('first'), waits=False)"
    code = COMPILES.partition("for _ in")[0] + (
        "locks = CompileLocks(Path(sys.argv[1]))\n"
        f"with {held} as is_ours:\n    print(is_ours, flush=True)\n    sys.stdin.read()\n"
    )
    dies = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert dies.stdout is not None
    assert dies.stdout.readline() == "True\n"
    locks, first = CompileLocks(tmp_path), Variant("first")
    with locks.held(first, waits=False) as is_ours:  # type: ignore[arg-type]
        assert not is_ours
    dies.kill()
    dies.communicate()
    with locks.held(first, waits=True) as is_ours:  # type: ignore[arg-type]
        assert is_ours


def test_where_nothing_can_be_locked_all_is_compiled(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "no folder", None):
        locks = CompileLocks(folder)
        for waits in (False, True):
            with locks.held(Variant("first"), waits=waits) as is_ours:  # type: ignore[arg-type]
                assert is_ours
