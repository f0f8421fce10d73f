"""Where a step's device work goes: CUDA's stream, whose work is waited for by an event; on a CPU, done at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Completion(Protocol):
    """The end of submitted work."""

    def is_done(self) -> bool: ...

    def wait(self) -> None:
        """Block until it is done."""
        ...


class Stream(Protocol):
    """Work that is done in the order in which it is submitted."""

    def submit(self, work: Callable[[], None]) -> Completion:
        """Enqueue what `work` does to tensors of the device; may return before it is done.

        `work` touches no tensor of the host that is still to be written, but for those that the completion protects.
        """
        ...


class _Done:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


DONE: Completion = _Done()
"""Of work that is over, or was never begun."""


class InlineStream:
    """A device that is done with its work when `submit` returns."""

    def submit(self, work: Callable[[], None]) -> Completion:
        work()
        return DONE


class _Recorded:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def is_done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]  # torch's

    def wait(self) -> None:
        self._event.synchronize()  # releases the GIL


class CudaStream:
    """A GPU's default stream, on which weights and KV cache were made too, so that nothing has to wait for them.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def submit(self, work: Callable[[], None]) -> Completion:
        # The current device is a thread's own, and Triton launches on it.
        with torch.cuda.device(self._device):
            work()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            event.record()
        return _Recorded(event)


def stream_of(device: torch.device) -> Stream:
    """The stream that work for `device` goes to."""
    return CudaStream(device) if device.type == "cuda" else InlineStream()
