"""Which kernels processes that share Triton's cache are compiling, so that none compiles what another one does.

The ranks of a host launch nearly the same kernels, and so do replicas of an engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from .fake_cuda import KernelVariant

try:
    import fcntl
except ImportError:  # not on Windows: there each process compiles for itself
    fcntl = None  # type: ignore[assignment]

_NAME = "octavo-compiling"
_KEY_BYTES = 6  # of a lock's place in the file: a sparse one, of which only its name takes room


class CompileLocks:
    """A lock for each variant: a byte of a file, which is released with its process, however that ends.

    Where there can be no locks it is as if nobody else were there: a kernel is compiled twice then, which does no harm.

    Args:
        folder: of Triton's cache; None: nobody else is there.
    """

    def __init__(self, folder: Path | None) -> None:
        self._file: int | None = None
        if fcntl is not None and folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @contextlib.contextmanager
    def held(self, variant: KernelVariant, *, waits: bool) -> Iterator[bool]:
        """Within it no other process compiles the variant; False if one does, and it is not to be waited for."""
        if self._file is None:
            yield True
            return
        place = _place_of(variant)
        is_elsewhere = False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            is_elsewhere = True
        except OSError:  # such as of a file system without locks
            pass
        try:
            yield not is_elsewhere
        finally:
            with contextlib.suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)


def _place_of(variant: KernelVariant) -> int:
    parts = (variant.name, variant.signature, variant.constexprs, variant.attributes, variant.options)
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=_KEY_BYTES)
    return int.from_bytes(digest.digest(), "little")


NO_LOCKS = CompileLocks(None)
