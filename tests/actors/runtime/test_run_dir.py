from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.actors.runtime import run_dir as module
from octavo.actors.runtime.addresses import endpoint_of
from octavo.actors.runtime.endpoints import MAX_PATH_BYTES, check_endpoint
from octavo.actors.runtime.run_dir import MAX_NAME_BYTES, RunDir, RunDirError, RunDirHeir

HOME = f"octavo-{os.getuid()}"


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory with a short path, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="o-", dir="/tmp") as folder:
        yield Path(folder)


def test_the_directory_is_its_owners_alone_and_gone_afterwards(base: Path) -> None:
    with RunDir(base) as run_dir:
        assert run_dir.path.parent == base / HOME
        assert run_dir.path.stat().st_mode & 0o777 == 0o700
        assert run_dir.path.parent.stat().st_mode & 0o777 == 0o700
        (run_dir.path / "engine.3").touch()
    assert list(base.iterdir()) == []
    run_dir.remove()


def test_it_lies_under_the_users_runtime_directory_or_that_for_temporary_files(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    with RunDir() as run_dir:
        assert run_dir.path.is_relative_to(base)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "is-not-there"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(base / ".."))
    with RunDir() as run_dir:
        assert run_dir.path.parent == base / ".." / HOME


def test_what_the_dead_left_is_swept_and_what_the_living_use_is_not(base: Path) -> None:
    killed = """
import os, signal, sys
from pathlib import Path
from octavo.actors.runtime.run_dir import RunDir
run_dir = RunDir(Path(sys.argv[1]))
(run_dir.path / "engine.1").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", killed, str(base)], check=False, timeout=60)
    (left,) = (base / HOME).iterdir()
    assert (left / "engine.1").exists()
    mine = base / HOME / "notes"
    mine.mkdir()
    with RunDir(base) as first, RunDir(base) as second:
        assert not left.exists()
        assert first.path.exists()
        assert second.path != first.path
        assert mine.exists(), "what is not named like one of ours is not ours to remove"


def test_a_link_in_its_place_is_refused(base: Path) -> None:
    (base / "elsewhere").mkdir()
    (base / HOME).symlink_to(base / "elsewhere")
    with pytest.raises(RunDirError, match="is a link or not a directory"):
        RunDir(base)


def test_somebody_elses_directory_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    somebody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody)
    (base / f"octavo-{somebody}").mkdir()
    with pytest.raises(RunDirError, match=f"belongs to user {somebody - 1}"):
        RunDir(base)


def test_others_lose_their_access_to_a_directory_that_was_open_to_them(base: Path) -> None:
    (base / HOME).mkdir(mode=0o755)
    with RunDir(base) as run_dir:
        assert run_dir.path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("spare", [0, -1])
def test_a_directory_too_deep_for_its_sockets_is_an_error_that_says_what_to_do(spare: int, base: Path) -> None:
    with RunDir(base) as usual:
        room = MAX_PATH_BYTES - len(os.fsencode(usual.path)) - len("/") - MAX_NAME_BYTES
    deep = base / ("d" * (room - len("/") - spare))
    deep.mkdir()
    if spare < 0:
        with pytest.raises(RunDirError, match="set XDG_RUNTIME_DIR or TMPDIR to a short path"):
            RunDir(deep)
        assert list(deep.iterdir()) == []
        return
    with RunDir(deep) as run_dir:
        for name, incarnation in (("edge 0", time.time_ns() // 1_000_000), ("executor 99999", 99999)):
            endpoint = endpoint_of(str(run_dir.path), name, incarnation)
            check_endpoint(endpoint, has_keys=False, allow_plain_loopback=False)
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(endpoint.removeprefix("ipc://"))


def test_a_forked_child_removes_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir(base) as run_dir:
        with monkeypatch.context() as patch:
            patch.setattr(module.os, "getpid", lambda: 1)
            run_dir.remove()
        assert run_dir.path.exists()


OWNER = """
import sys, time
from pathlib import Path
from octavo.actors.runtime.run_dir import RunDir
print(RunDir(Path(sys.argv[1])).path, flush=True)
time.sleep(1000)
"""


def test_a_directory_that_has_an_heir_is_not_swept_when_its_owner_dies_and_goes_with_the_heir(base: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(base)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        path = Path(owner.stdout.readline().strip())
        heir = RunDirHeir(path)
        owner.kill()
        owner.wait()
    with RunDir(base):
        assert path.exists()
    heir.inherit().remove()
    assert not path.exists()


def test_of_a_directory_that_is_gone_there_are_no_heirs(base: Path) -> None:
    run_dir = RunDir(base)
    run_dir.remove()
    with pytest.raises(RunDirError, match="is gone, and its owner with it"):
        RunDirHeir(run_dir.path)
