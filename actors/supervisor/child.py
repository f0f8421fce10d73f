"""What the supervisor knows of one child."""

from __future__ import annotations

from typing import Literal

import msgspec

from ...messages.ids import Epoch
from .config import ChildConfig
from .spans import Spans


class Child(msgspec.Struct):
    """A child and what is known of its latest incarnation.

    Attributes:
        incarnation: before the first start 0, or the last that a supervisor before this one may have used.
        state: `absent` between an exit and the next start, `killed` and `stopping` until the exit that was asked for.
        start_at_ns: when an absent child is started; -1 for never.
        since_ns: of the latest start; later by the time in which this process stood still since, as is `ready_ns`.
        heard_ns: of the latest beat, or of readiness; -1 for never.
        ready_ns: since when it has been ready; -1 if it is not.
        progress: as of its latest beat.
        ran_ns, hindered_ns: as of `ProcessObserved`, since it was heard last.
        hindered, stalled: when it was, of an executor, and when this process did not listen: as far back as the latest
            step may reach. A step that began before must not be held to the time that was lost since, whether or not a
            beat has told of it yet.
        is_long_at_step: whether its step is worth a look.
        halted_ns, halt_seen_ns: since when it has been stopped by a signal, and when that was seen last; -1 for never.
        cannot_load: whether it has said so.
        epoch: that it was started with.
        why: the latest loss, for those who must hear of it once the next incarnation is ready.
    """

    config: ChildConfig
    incarnation: int = 0
    state: Literal["absent", "starting", "ready", "killed", "stopping"] = "absent"
    start_at_ns: int = 0
    since_ns: int = 0
    heard_ns: int = -1
    ready_ns: int = -1
    progress: int = 0
    ran_ns: int = 0
    hindered_ns: int = 0
    stalled: Spans = msgspec.field(default_factory=Spans)
    hindered: Spans = msgspec.field(default_factory=Spans)
    is_long_at_step: bool = False
    halted_ns: int = -1
    halt_seen_ns: int = -1
    cannot_load: bool = False
    epoch: Epoch = Epoch(0)
    why: str = ""

    @property
    def is_running(self) -> bool:
        """Alive, and nobody has told it to end."""
        return self.state in ("starting", "ready")

    @property
    def streak(self) -> str:
        """Whose failures in a row are counted together: the ranks of the group are."""
        return "executor" if self.config.kind == "executor" else self.config.name
