"""How a workload's content ids are laid out, so that parts and copies of workloads never mix them up."""

from __future__ import annotations

import msgspec

from .request import Workload

MAX_CONTENT_ID = 2**31 - 1
FIRST_PRIVATE_ID = 2**30
"""Ids below name content that a source lets several requests hold (a trace's block hashes, system prompts); ids from
here on belong to one request or conversation (a unique prompt, the rest of a partial block, an answer)."""


class ContentIds(msgspec.Struct, frozen=True):
    """How many ids a workload uses: `0 .. num_shared - 1`, and `num_private` from `FIRST_PRIVATE_ID` on."""

    num_shared: int
    num_private: int


def content_ids_of(workload: Workload) -> ContentIds:
    """What `workload` declares as `content_ids`; without that, what its arrivals hold (one pass over them)."""
    declared = getattr(workload, "content_ids", None)
    if isinstance(declared, ContentIds):
        return declared
    last_shared, last_private = -1, FIRST_PRIVATE_ID - 1
    for request in workload.arrivals():
        for content_id in (request.answer_id, *[run[0] for run in request.segments]):
            if content_id < FIRST_PRIVATE_ID:
                last_shared = max(last_shared, content_id)
            else:
                last_private = max(last_private, content_id)
    return ContentIds(last_shared + 1, last_private + 1 - FIRST_PRIVATE_ID)
