"""What a journal says of itself, and the bounds of its file."""

from __future__ import annotations

from typing import Any

import msgspec

from ...messages.ids import Epoch
from ..kv_allocator.config import AllocatorConfig
from ..scheduler.config import SchedulerConfig

FORMAT_VERSION = 1

MAX_FRAME_BYTES = 32 << 20
"""Longest payload of a frame."""

MAX_FRAME_RECORDS = 8192
"""Most records of a frame."""

MAX_REQUEST_TOKENS = 4 << 20
"""Longest sequence that a journal holds; its tokens, as they are, take half a frame."""

MAX_NUM_BLOCKS = 1 << 23
MAX_PIPELINE_DEPTH = 1024


class JournalHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame of a journal: everything that two fresh cores need to begin as those did.

    Attributes:
        version: of the format.
        octavo: the program's version, for information.
        model: what was served, for information.
        started_at: date and time in UTC as ISO 8601, for information; empty under virtual time.
        start_ns: the cores' clock at the beginning.
        has_tokens: whether token ids stand in the journal as they are, and not keyed hashes of blocks of them.
        key_id: tells the random keys of two journals apart without giving them away; empty if `has_tokens`.
        scheduler, allocator: the cores' configurations.
        scheduler_epoch, allocator_epoch: the executor's incarnation that each core began with.

    Raises:
        ValueError: bounds that no engine has, or two configurations that contradict each other.
    """

    version: int = FORMAT_VERSION
    octavo: str = ""
    model: str = ""
    started_at: str = ""
    start_ns: int = 0
    has_tokens: bool = False
    key_id: bytes = b""
    scheduler: SchedulerConfig
    allocator: AllocatorConfig
    scheduler_epoch: Epoch = Epoch(0)
    allocator_epoch: Epoch = Epoch(0)

    def __post_init__(self) -> None:
        if self.scheduler.num_blocks > MAX_NUM_BLOCKS:
            raise ValueError(f"num_blocks={self.scheduler.num_blocks} is above {MAX_NUM_BLOCKS}")
        if self.scheduler.pipeline_depth > MAX_PIPELINE_DEPTH:
            raise ValueError(f"pipeline_depth={self.scheduler.pipeline_depth} is above {MAX_PIPELINE_DEPTH}")
        for name in ("num_blocks", "block_size"):
            theirs: Any = getattr(self.allocator, name)
            if getattr(self.scheduler, name) != theirs:
                raise ValueError(f"{name} of scheduler and KV allocator are {getattr(self.scheduler, name)}, {theirs}")
