from __future__ import annotations

import os
import subprocess
import sys

import pytest
from supervised_children import await_death

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="watches orphans through pidfds")

CHILD = """
import os, signal, sys
sys.platform = sys.argv[1]
from octavo.actors.runtime.parent_death import die_with_parent
die_with_parent(int(sys.argv[2]) or os.getppid())
print(os.getpid(), flush=True)
signal.pause()
"""

PARENT = """
import signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
signal.pause()
"""


@pytest.mark.parametrize("platform", ["linux", "another"])
def test_a_process_dies_with_its_parent_also_where_the_kernel_does_not_see_to_it(platform: str) -> None:
    command = [sys.executable, "-c", PARENT, CHILD, platform, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    await_death([pidfd])


def test_a_process_whose_parent_died_before_it_looked_ends_at_once() -> None:
    command = [sys.executable, "-c", CHILD, "linux", "1"]  # started by this process, not by process 1
    ended = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, b"")
