"""Copies between the host and a GPU that computes nothing (`fake_cuda`), and what they would do on one that does.

Two mistakes make no difference there: to wait for the GPU, which is never late, and to touch pinned memory while a copy
of it is under way, which takes no time. So both are watched for. A copy is under way until an event that was recorded
behind it has been waited for, or has said that it is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNREAD = -1
"""What pinned memory holds while a copy to it is under way: no token."""


@dataclass(slots=True)
class _Copy:
    """A copy that is under way; `before` is what pinned memory held, None: it is what is copied to."""

    number: int
    pinned: torch.Tensor
    before: torch.Tensor | None


class Transfers(TorchDispatchMode):
    """Hears of each operation, from within `fake_cuda`.

    Args:
        on_wait: is told of what makes the host wait for the GPU, or a copy wait for the host: none of it can be
            captured in a graph.
        on_race: is told of pinned memory that was written while a copy of it was under way.
    """

    def __init__(self, on_wait: Callable[[str], None], on_race: Callable[[str], None]) -> None:
        super().__init__()
        self.on_wait = on_wait
        self._on_race = on_race
        self._pinned: set[int] = set()  # addresses; for good, as nobody says when memory is given back
        self._under_way: deque[_Copy] = deque()
        self._num_copies = 0

    def pin(self, tensor: torch.Tensor) -> None:
        """This tensor's memory is pinned."""
        self._pinned.add(tensor.untyped_storage().data_ptr())

    def event(self) -> Event:
        """In the place of `torch.cuda.Event`."""
        return Event(self)

    def mark(self) -> int:
        """What has been submitted so far."""
        return self._num_copies

    def complete(self, mark: int | None = None) -> None:
        """The GPU is done with all that was submitted before a mark; None: with everything."""
        while self._under_way and (mark is None or self._under_way[0].number <= mark):
            copy = self._under_way.popleft()
            with unset_fake_temporarily():
                if copy.before is None:
                    is_as_it_was = bool((copy.pinned == _UNREAD).all())
                    copy.pinned.zero_()
                else:
                    is_as_it_was = torch.equal(copy.pinned, copy.before)
            if not is_as_it_was:
                where = "to" if copy.before is None else "from"
                self._on_race(f"pinned memory was written while a copy {where} it was under way")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":
            return func(*args, **kwargs)
        with self:  # in inference mode operations that are made of others come whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if func.is_view and all(type(each) is torch.Tensor for each in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)  # a part of memory that is there is there, too
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in {"_to_copy", "copy_"}:
            target, source = (args[0], args[1]) if name == "copy_" else (result, args[0])
            is_async = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            self._copied(target, source, is_async=is_async)
        elif any(each.is_cuda for each in tensors) and any(not each.is_cuda and each.dim() for each in tensors):
            self.on_wait(f"{name} of tensors of the host and of the GPU")
        return result

    def _copied(self, target: torch.Tensor, source: torch.Tensor, *, is_async: bool) -> None:
        if target.is_cuda == source.is_cuda:
            return
        of_host = source if target.is_cuda else target
        if not self._is_pinned(of_host):
            self.on_wait(f"a copy {'from' if target.is_cuda else 'to'} memory of the host that is not pinned")
        elif not is_async:
            self.on_wait("a copy that is waited for")
        else:
            self._num_copies += 1
            with unset_fake_temporarily():
                before = of_host.clone() if target.is_cuda else None
                if before is None:
                    of_host.fill_(_UNREAD)
            self._under_way.append(_Copy(self._num_copies, of_host, before))

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        if type(tensor) is not torch.Tensor:
            return False  # without contents
        with unset_fake_temporarily():
            return tensor.untyped_storage().data_ptr() in self._pinned


class Event:
    """An event that has happened whenever it is asked for."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers, self._mark = transfers, 0

    def record(self, *_: Any) -> None:
        self._mark = self._transfers.mark()

    def query(self) -> bool:
        self._transfers.complete(self._mark)
        return True

    def synchronize(self) -> None:
        self._transfers.on_wait("an event that is waited for")
        self._transfers.complete(self._mark)
