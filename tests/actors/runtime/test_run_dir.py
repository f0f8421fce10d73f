from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.actors.runtime import run_dir as module
from octavo.actors.runtime.run_dir import MAX_SOCKET_PATH_BYTES, RunDir, RunDirError, RunDirHeir

HOME = f"octavo-{os.getuid()}"


def test_the_directory_is_its_owners_alone_and_gone_afterwards(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run_dir:
        assert run_dir.path.parent == tmp_path / HOME
        assert run_dir.path.stat().st_mode & 0o777 == 0o700
        assert run_dir.path.parent.stat().st_mode & 0o777 == 0o700
        run_dir.socket_path("engine.3").touch()
    assert list(tmp_path.iterdir()) == []
    run_dir.remove()


def test_it_lies_under_the_users_runtime_directory_or_that_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with RunDir() as run_dir:
        assert run_dir.path.is_relative_to(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "is-not-there"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / ".."))
    with RunDir() as run_dir:
        assert run_dir.path.parent == tmp_path / ".." / HOME


def test_what_the_dead_left_is_swept_and_what_the_living_use_is_not(tmp_path: Path) -> None:
    killed = """
import os, signal, sys
from pathlib import Path
from octavo.actors.runtime.run_dir import RunDir
run_dir = RunDir(Path(sys.argv[1]))
run_dir.socket_path("engine.1").touch()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False, timeout=60)
    (left,) = (tmp_path / HOME).iterdir()
    assert (left / "engine.1").exists()
    mine = tmp_path / HOME / "notes"
    mine.mkdir()
    with RunDir(tmp_path) as first, RunDir(tmp_path) as second:
        assert not left.exists()
        assert first.path.exists()
        assert second.path != first.path
        assert mine.exists(), "what is not named like one of ours is not ours to remove"


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / HOME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunDirError, match="is a link or not a directory"):
        RunDir(tmp_path)


def test_somebody_elses_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    somebody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody)
    (tmp_path / f"octavo-{somebody}").mkdir()
    with pytest.raises(RunDirError, match=f"belongs to user {somebody - 1}"):
        RunDir(tmp_path)


def test_others_lose_their_access_to_a_directory_that_was_open_to_them(tmp_path: Path) -> None:
    (tmp_path / HOME).mkdir(mode=0o755)
    with RunDir(tmp_path) as run_dir:
        assert run_dir.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_path_too_long_for_a_socket_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run_dir:
        room = MAX_SOCKET_PATH_BYTES - len(os.fsencode(run_dir.path)) - 1
        assert len(str(run_dir.socket_path("e" * max(1, room)))) >= MAX_SOCKET_PATH_BYTES or room < 1
        with pytest.raises(RunDirError, match="XDG_RUNTIME_DIR"):
            run_dir.socket_path("e" * (max(0, room) + 1))


def test_a_forked_child_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDir(tmp_path) as run_dir:
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


def test_a_directory_that_has_an_heir_is_not_swept_when_its_owner_dies_and_goes_with_the_heir(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner.stdout:
        path = Path(owner.stdout.readline().strip())
        heir = RunDirHeir(path)
        owner.kill()
        owner.wait()
    with RunDir(tmp_path):
        assert path.exists()
    heir.inherit().remove()
    assert not path.exists()


def test_of_a_directory_that_is_gone_there_are_no_heirs(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.remove()
    with pytest.raises(RunDirError, match="is gone, and its owner with it"):
        RunDirHeir(run_dir.path)
