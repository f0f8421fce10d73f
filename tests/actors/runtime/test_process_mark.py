from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.actors.runtime.pidfd import open_pidfd
from octavo.actors.runtime.process_mark import find_marked, write_mark
from octavo.actors.runtime.process_state import started_at

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(os, "pidfd_open"), reason="elsewhere a mark means nothing"
)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:  # ourselves
        yield process
        process.kill()


def test_a_marked_process_is_found_told_to_be_stopped_or_not_and_ended(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    write_mark(tmp_path / "mark", child.pid)
    found = find_marked(tmp_path / "mark")
    assert found is not None and found.pid == child.pid and not found.is_stopped()
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert found.is_stopped()
    assert not select.select([found.pidfd], [], [], 0)[0]
    found.kill()
    assert child.wait() == -signal.SIGKILL
    assert select.select([found.pidfd], [], [], 0)[0] == [found.pidfd]
    found.kill()  # of one that has ended
    found.close()
    with pytest.raises(ProcessLookupError):
        find_marked(tmp_path / "mark")
    assert list(tmp_path.iterdir()) == [tmp_path / "mark"]


def test_a_process_that_got_the_pid_of_a_dead_one_is_not_taken_for_it(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    start = started_at(child.pid)
    assert start >= started_at(os.getpid()) > 0
    (tmp_path / "mark").write_text(f"{child.pid} {start - 1}")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ProcessLookupError):
        find_marked(tmp_path / "mark")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert child.poll() is None


@pytest.mark.parametrize("text", [None, "", "7", "x y", "1 2 3", "0 0", "OWN 0"])
def test_a_mark_that_says_nothing_finds_nobody(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "mark").write_text(text.replace("OWN", str(os.getpid())))
    assert find_marked(tmp_path / "mark") is None


def test_a_process_without_room_for_descriptors_finds_nobody_and_loses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mark(tmp_path / "mark")
    monkeypatch.setattr("octavo.actors.runtime.process_mark.open_pidfd", lambda pid: -1)
    assert find_marked(tmp_path / "mark") is None
    monkeypatch.setattr("octavo.actors.runtime.process_mark.open_pidfd", open_pidfd)
    found = find_marked(tmp_path / "mark")
    assert found is not None and found.pid == os.getpid()
    found.close()
