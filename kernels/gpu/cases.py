"""Cases of a check or a benchmark, one after the other, on a device that any of them may break."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
OnCase = Callable[[int, int, Row], None]
"""Hears of each case before it runs: its number, how many there are, and what its rows have in common."""


class DeviceLostError(RuntimeError):
    """The device refuses everything since some case, as after an illegal access: only another process can go on."""


@dataclass(frozen=True, slots=True)
class Case:
    """`run` gives its rows; `what` is what they have in common, and what a row of its failure says of it."""

    what: Row
    run: Callable[[], Iterable[Row]]


def rows_of(
    cases: Sequence[Case],
    device: torch.device,
    *,
    first: int = 0,
    on_case: OnCase = lambda _number, _of, _what: None,
) -> Iterator[Row]:
    """The rows of every case from `first` on; a case that fails is a row more, whose note says why.

    Raises:
        DeviceLostError: after that row, if the device went with the case.
    """
    for number in range(first, len(cases)):
        case = cases[number]
        on_case(number, len(cases), case.what)
        failure = ""
        try:
            for row in case.run():
                yield {**case.what, **row}
        except Exception as error:  # noqa: BLE001,RUF100 - whatever it was, the other cases go on
            failure = worded(error)
        if failure:
            yield {**case.what, "note": f"failed: {failure}"}
            recover(device, failure)


def recover(device: torch.device, failure: str) -> None:
    """Make room after a failure, which may have been for want of memory.

    Raises:
        DeviceLostError: the device no longer answers.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLostError(f"the device is lost since: {failure}") from error


def worded(error: BaseException) -> str:
    """Its kind and the first line of what it says; CUDA's errors have advice behind that."""
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0][:200]}" if said else type(error).__name__
