"""The order in which an executor launches steps and collects their results; without torch, waiting for nothing.

A device computes while the host prepares: the next step is launched before the last one's tokens are read. What it
gains is lost if results come late, so that a result that is there goes first, unless the device would stand idle.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar

from ...messages.step import ExecuteStep, StepExecuted

L = TypeVar("L")


class Launcher(Protocol[L]):
    """Computes steps in the order in which they are launched.

    Attributes:
        max_launched: steps that may be launched and not collected; 1 where a launch computes the whole step.
    """

    @property
    def max_launched(self) -> int: ...

    def launch(self, step: ExecuteStep) -> L:
        """Begin a step."""
        ...

    def is_done(self, launched: L) -> bool:
        """Whether `collect` would return at once."""
        ...

    def collect(self, launched: L) -> StepExecuted:
        """Wait for the oldest step that was not collected, and say what came of it."""
        ...


class LaunchAhead(Generic[L]):
    """What is launched, and what is to be done next.

    Args:
        launcher: of the steps.
    """

    def __init__(self, launcher: Launcher[L]) -> None:
        self._launcher = launcher
        self._launched: deque[L] = deque()

    def __len__(self) -> int:
        return len(self._launched)

    @property
    def is_full(self) -> bool:
        """Whether no step can be launched before one is collected."""
        return len(self._launched) >= self._launcher.max_launched

    def launch(self, step: ExecuteStep) -> None:
        """Begin a step; nothing must be due."""
        self._launched.append(self._launcher.launch(step))

    def is_due(self, *, has_step: bool) -> bool:
        """Whether to collect before anything else, even if that has to wait.

        Args:
            has_step: another step could be launched now.
        """
        if not self._launched:
            return False
        if self.is_full:
            return True
        if has_step and len(self._launched) == 1:
            return False  # the device has nothing after this step, or nothing at all: see to that first
        return self._launcher.is_done(self._launched[0])

    def collect(self) -> StepExecuted:
        """The result of the oldest step; may wait for it."""
        return self._launcher.collect(self._launched.popleft())

    def clear(self) -> None:
        """Forget what was launched: its epoch is over."""
        self._launched.clear()
