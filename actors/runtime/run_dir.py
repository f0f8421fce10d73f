"""The directory of an engine's UNIX sockets: nobody else's, gone afterwards, and never an older engine's."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from pathlib import Path

from ...messages.errors import OctavoError
from .endpoints import MAX_PATH_BYTES

MAX_NAME_BYTES = len("executor-99999.99999")
"""Longest name of a socket in it; `edge-0` has the milliseconds since 1970 behind it."""

_NAME = re.compile(r"[1-9][0-9]*-[0-9a-f]{8}")


class RunDirError(OctavoError):
    """There is no place for sockets that is safe, or short enough."""

    code = "run_dir"


class RunDir:
    """A directory `octavo-<uid>/<pid>-<random>`, mode 0700, that lives as long as this process.

    Its owner, and whoever may come after the owner (`RunDirHeir`), share a lock in it, which the kernel drops when they
    die: what can be locked by another alone is stale, and is swept by the next start. (A pid would not tell: containers
    may share the directory and count processes separately.)

    Args:
        base: the directory to put it under; None is `$XDG_RUNTIME_DIR`, else the directory for temporary files.

    Raises:
        RunDirError: `octavo-<uid>` is somebody else's or a link, nothing can be written there, or the paths of sockets
            would be too long.
    """

    def __init__(self, base: Path | None = None) -> None:
        home = (default_base() if base is None else base) / f"octavo-{os.getuid()}"
        self.path = home / f"{os.getpid()}-{secrets.token_hex(4)}"
        if len(os.fsencode(self.path)) + 1 + MAX_NAME_BYTES > MAX_PATH_BYTES:
            raise RunDirError(
                f"the path of a socket in {self.path} would have more than {MAX_PATH_BYTES} bytes: {_ADVICE}"
            )
        home_fd = _open_home(home)
        try:
            fcntl.flock(home_fd, fcntl.LOCK_EX)  # between making a directory and locking it, nobody sweeps
            _sweep(home)
            self.path.mkdir(mode=0o700)
            self._lock_fd = _open_lock(self.path)
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirError(f"no directory for sockets can be made in {home}: {error.strerror}: {_ADVICE}") from error
        finally:
            os.close(home_fd)
        self._owner_pid = os.getpid()
        atexit.register(self.remove)

    @classmethod
    def _inherited(cls, path: Path, lock_fd: int) -> RunDir:
        self = cls.__new__(cls)
        self.path, self._lock_fd, self._owner_pid = path, lock_fd, os.getpid()
        atexit.register(self.remove)
        return self

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the directory and what is in it. Safe to call twice; a forked child removes nothing."""
        if self._owner_pid != os.getpid():
            return
        self._owner_pid = 0
        atexit.unregister(self.remove)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        with contextlib.suppress(OSError):  # another octavo of this user lives there
            self.path.parent.rmdir()


class RunDirHeir:
    """Keeps another process's directory from being swept, should that process die.

    Raises:
        RunDirError: the directory is gone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Not made here if it is not there: then its owner has removed the directory.
            self._lock_fd = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise RunDirError(f"{path} is gone, and its owner with it: {error.strerror}") from error

    def inherit(self) -> RunDir:
        """The owner is dead: this process removes the directory at its end. Call it once."""
        return RunDir._inherited(self._path, self._lock_fd)


_ADVICE = "set XDG_RUNTIME_DIR or TMPDIR to a short path of a directory that is yours"


def default_base() -> Path:
    """Where such directories are put, unless somebody says otherwise."""
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime_dir and Path(runtime_dir).is_absolute() and os.access(runtime_dir, os.W_OK | os.X_OK):
        return Path(runtime_dir)
    return Path(tempfile.gettempdir())


def _open_home(home: Path) -> int:
    """Make `octavo-<uid>`, or find that it is ours alone."""
    try:
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        found = "is a link or not a directory" if home.is_symlink() or home.exists() else "cannot be made"
        raise RunDirError(f"{home} {found} ({error.strerror}): remove it, or {_ADVICE}") from error
    status = os.fstat(fd)
    if status.st_uid != os.getuid():
        os.close(fd)
        raise RunDirError(f"{home} belongs to user {status.st_uid}, who could read what is said there: {_ADVICE}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        os.fchmod(fd, 0o700)
    return fd


def _open_lock(path: Path) -> int:
    return os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _sweep(home: Path) -> None:
    """Remove the directories of the dead."""
    for path in sorted(home.iterdir()):
        if not _NAME.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # alive, or half removed by its owner: not ours to judge
            lock_fd = _open_lock(path)
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock_fd)
