"""What a run can find."""

from __future__ import annotations

import traceback


class Violation(AssertionError):  # noqa: N818  # the field's word; it is an assertion that failed
    """An invariant does not hold.

    Args:
        kind: which one, the same words for the same defect.
        detail: what was seen.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        self.kind = kind
        self.detail = detail
        super().__init__(f"{kind}: {detail}" if detail else kind)


def as_violation(address: str, error: BaseException) -> Violation:
    """An exception that escaped an actor, named by where it was raised."""
    if isinstance(error, Violation):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = "?"
    if frames:
        path = "/".join(frames[-1].filename.replace("\\", "/").split("/")[-2:])
        where = f"{path}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}"
    return Violation(f"the {address} raised {type(error).__name__}", f"{error} ({where})" if str(error) else where)
