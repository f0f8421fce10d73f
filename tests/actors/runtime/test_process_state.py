from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from octavo.actors.runtime.process_state import is_stopped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def test_a_process_is_stopped_from_its_stop_to_its_continuation_and_not_once_it_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:  # ourselves
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert is_stopped(process.pid)
        process.send_signal(signal.SIGCONT)
        os.waitpid(process.pid, os.WCONTINUED)
        assert not is_stopped(process.pid)
        process.kill()
    assert not is_stopped(process.pid)


def test_a_name_with_brackets_in_it_is_no_state() -> None:
    code = "import setproctitle, signal; setproctitle.setthreadtitle(') T (x'); print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:  # ourselves
        assert process.stdout is not None
        process.stdout.readline()
        assert not is_stopped(process.pid)
        process.kill()
