"""Runs the package with one line changed: the import system reads the changed source instead of the file."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import msgspec

PACKAGE = __name__.split(".", maxsplit=1)[0]
ROOT = Path(__file__).absolute().parents[2]  # not resolved: the package may be reached through a link


class Mutant(msgspec.Struct, frozen=True):
    """One changed line.

    Attributes:
        name: what is broken, in a few words.
        path: the file, from the package's root.
        old, new: a part of one line that occurs once in the file, and what stands there instead.
        after: `old` is searched behind this text, where it occurs more than once.
        model: the real bug that it is modelled on.
    """

    name: str
    path: str
    old: str
    new: str
    model: str
    after: str = ""

    @property
    def module(self) -> str:
        """The module's full name."""
        return f"{PACKAGE}." + self.path.removesuffix(".py").replace("/", ".")

    def apply(self, source: str) -> str:
        """Return the changed source.

        Raises:
            ValueError: the line is not there, or not once: the code has changed and the mutant must follow it.
        """
        head, found, tail = source.partition(self.after) if self.after else ("", "", source)
        if self.after and not found:
            raise ValueError(f"{self.name!r}: {self.path} has no {self.after!r} any more")
        num_found = tail.count(self.old)
        if num_found == 0 or (num_found > 1 and not self.after):
            raise ValueError(f"{self.name!r}: {self.path} has {self.old!r} {num_found} times, not once")
        return head + found + tail.replace(self.old, self.new, 1)

    def read(self) -> str:
        """Return the changed source of the file."""
        return self.apply((ROOT / self.path).read_text(encoding="utf-8"))


class _MutantLoader(importlib.abc.InspectLoader):
    def __init__(self, source: str, path: Path) -> None:
        self._source = source
        self._path = path

    def get_source(self, fullname: str) -> str:
        return self._source

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, str(self._path), "exec"), module.__dict__)  # noqa: S102  # our own source


class MutantFinder(importlib.abc.MetaPathFinder):
    """Finds the changed module before anybody finds the file.

    Args:
        mutant: what to change.

    Raises:
        ValueError: see `Mutant.apply`.
        RuntimeError: the module has been imported already.
    """

    def __init__(self, mutant: Mutant) -> None:
        if mutant.module in sys.modules:
            raise RuntimeError(f"{mutant.module} is imported already: a mutant needs a process of its own")
        self._module = mutant.module
        self._loader = _MutantLoader(mutant.read(), ROOT / mutant.path)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        return importlib.util.spec_from_loader(fullname, self._loader, origin=f"a mutant of {fullname}")
