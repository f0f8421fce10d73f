"""Who is let in: bounded work, refused before its body is read, with an honest time to come back.

Throughput falls if too much is let in, and every client waits longer than it will. So the sum of what is open is
bounded in requests and bytes (tokens, where they are counted: by the scheduler), and the queue by the time that it
takes. While far more comes than can be done, all that is open is bounded by that time, not only what waits: otherwise
the server would have the overload before it for many seconds after its end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final, Literal, NamedTuple

import msgspec

from ..stats import EngineStats

WINDOW_NS: Final = 10_000_000_000
"""Ends of sequences are counted over so long."""

SETTLED_NS: Final = 2_000_000_000
"""A queue must have been there for so long before its speed is believed."""

QUEUE_GAP_NS: Final = 1_000_000_000
"""A queue that was empty for less has not ended: sequences that began together end together, and make it empty."""

OVERLOAD_FACTOR: Final = 1.5
"""So many times as many requests come as end: then it is an overload. As many come as end of clients that wait for an
answer before they ask again, however many they are."""

MIN_ENDS: Final = 8
STATS_AGE_NS: Final = 50_000_000
MAX_RETRY_AFTER_S: Final = 60

Bound = Literal["requests", "bytes", "wait", "memory"]


class OverloadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be open.

    Attributes:
        max_requests: requests that are open, streamed ones included; 0 for no bound.
        max_bytes: of their bodies; 0 for no bound. A request that comes alone is never too big by this one.
        max_wait_ns: no more is let in while those who wait would take longer, under overload all who are there; 0 for
            no bound.
        min_waiting: so many may wait whatever the time.
        min_waiting_overloaded: the same under overload: enough to fill the batch's places as they come free.
        max_running: sequences that run at a time; what lives beyond them waits. 0: the engine's account alone counts.
    """

    max_requests: int = 0
    max_bytes: int = 0
    max_wait_ns: int = 0
    min_waiting: int = 0
    min_waiting_overloaded: int = 0
    max_running: int = 0


class Refusal(msgspec.Struct, frozen=True):
    """Why not now, and when."""

    bound: Bound
    text: str
    retry_after_s: int


class AdmissionCore:
    """Counts what is open and how fast it ends.

    Args:
        read_stats: the engine's account, of all that it does for whatever edge; asked at most twenty times a second.
        is_memory_full: at a time in ns, whether the system is about to kill for lack of memory.

    Attributes:
        num_admitted, num_refused: requests since the start, the latter by bound.
    """

    def __init__(
        self,
        limits: OverloadLimits,
        read_stats: Callable[[], EngineStats],
        is_memory_full: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self._limits = limits
        self._is_memory_full = is_memory_full
        self._read_stats = read_stats
        self._num_open = 0
        self._num_bytes = 0
        self._window: deque[_Span] = deque()
        self._sum = _Span(0, 0, 0, 0)
        self._num_completed = 0  # by the latest account
        self._waiting_since_ns: int | None = None
        self._waited_ns = 0  # when a queue was seen last
        self._num_waiting = self._num_live = 0
        self._num_asked = self._num_let_in = self._num_released = 0  # since the latest look
        self._read_at_ns = -STATS_AGE_NS
        self._next_place_ns = 0
        self.num_admitted = 0
        self.num_refused: dict[str, int] = {"requests": 0, "bytes": 0, "wait": 0, "memory": 0}

    @property
    def num_open(self) -> int:
        return self._num_open

    def admit(self, now_ns: int, num_bytes: int) -> Refusal | None:
        """Let a request in, which must then be released; or say why not."""
        refusal = self.refuse(now_ns, num_bytes)
        if refusal is None:
            self._num_asked += 1
            self._num_let_in += 1
            self.num_admitted += 1
            self._num_open += 1
            self._num_bytes += num_bytes
        return refusal

    def refuse(self, now_ns: int, num_bytes: int) -> Refusal | None:
        """Say why a request is not let in, and count that; or nothing, and then it has still to be admitted."""
        limits = self._limits
        self._look(now_ns)
        if limits.max_requests and self._num_open >= limits.max_requests:
            return self._refuse(
                now_ns, "requests", f"{self._num_open} requests are open, of at most {limits.max_requests}"
            )
        if limits.max_bytes and self._num_open and self._num_bytes + num_bytes > limits.max_bytes:
            return self._refuse(
                now_ns, "bytes", f"open requests hold {self._num_bytes} bytes, of at most {limits.max_bytes}"
            )
        if self._num_open and self._is_memory_full(now_ns):  # alone, it may be what shows that there is room again
            return self._refuse(now_ns, "memory", "this server's memory is all but used up")
        if limits.max_wait_ns:
            return self._refuse_to_wait(now_ns)
        return None

    def _refuse_to_wait(self, now_ns: int) -> Refusal | None:
        limits = self._limits
        num_live = self._num_live + self._num_let_in
        num_waiting = self._num_waiting
        if limits.max_running:
            num_waiting = max(num_waiting, num_live - limits.max_running)
        if self._is_overload() and num_waiting >= limits.min_waiting_overloaded:
            takes_ns, what = self._takes_ns(max(num_live, num_waiting)), f"{num_live} sequences are at work or wait"
        elif num_waiting >= limits.min_waiting:
            takes_ns, what = self._takes_ns(num_waiting), f"{num_waiting} sequences wait already"
        else:
            return None
        if takes_ns <= limits.max_wait_ns:
            return None
        return self._refuse(
            now_ns,
            "wait",
            f"{what}, for about {takes_ns / 1e9:.0f} s: more than the {limits.max_wait_ns / 1e9:g} s that anybody is "
            "to wait here",
        )

    def release(self, num_bytes: int) -> None:
        """A request that was let in is over."""
        self._num_open -= 1
        self._num_bytes -= num_bytes
        self._num_released += 1

    def hold_bytes(self, num_bytes: int) -> Refusal | None:
        """Count the body of a request that wants no sequence, and is then to be let go of; or say why not."""
        most = self._limits.max_bytes
        if most and self._num_bytes and self._num_bytes + num_bytes > most:
            self.num_refused["bytes"] += 1
            return Refusal("bytes", f"open requests hold {self._num_bytes} bytes, of at most {most}", 1)
        self._num_bytes += num_bytes
        return None

    def let_go_of_bytes(self, num_bytes: int) -> None:
        """Such a request is over."""
        self._num_bytes -= num_bytes

    def retry_after_s(self, now_ns: int) -> int:
        """When to come back. Each client who is told gets a later place than those told before: places come free at the
        speed at which sequences end, and all at once would be refused again."""
        rate = self._rate()
        if not rate:
            return 1
        self._next_place_ns = min(
            max(self._next_place_ns, now_ns) + int(1e9 / rate), now_ns + MAX_RETRY_AFTER_S * 1_000_000_000
        )
        return max(1, math.ceil((self._next_place_ns - now_ns) / 1e9))

    def _refuse(self, now_ns: int, bound: Bound, text: str) -> Refusal:
        self._num_asked += 1
        self.num_refused[bound] += 1
        return Refusal(bound, text, self.retry_after_s(now_ns))

    def _look(self, now_ns: int) -> None:
        """Ask the engine anew, if its latest account is too old, and close this span of the window."""
        if now_ns - self._read_at_ns < STATS_AGE_NS:
            return
        self._read_at_ns = now_ns
        stats = self._read_stats()
        self._num_waiting = stats.num_waiting
        # Those that other edges wait for are no less at work; those that are still tokenized here only this edge knows.
        self._num_live = max(stats.num_live, stats.num_running + stats.num_waiting)
        if self._num_waiting:
            self._waited_ns = now_ns
            if self._waiting_since_ns is None:
                self._waiting_since_ns = now_ns
        elif now_ns - self._waited_ns >= QUEUE_GAP_NS:
            self._waiting_since_ns = None
        # An edge that joins later than the first does not take all that ended before for work of this moment.
        num_ended = stats.num_completed - self._num_completed if self._num_completed else 0
        span = _Span(now_ns, num_ended, self._num_asked, self._num_released)
        if self._waiting_since_ns is None or now_ns - self._waiting_since_ns < SETTLED_NS:
            # Those who came all at once are a burst, and bring about the queue whose speed is to be measured.
            span = span._replace(num_asked=0, num_released=0)
        self._num_completed = stats.num_completed
        self._num_asked = self._num_let_in = self._num_released = 0
        if span.num_ended or span.num_asked or span.num_released:
            self._window.append(span)
            self._sum = self._sum.plus(span, 1)
        while self._window and now_ns - self._window[0].end_ns > WINDOW_NS:
            self._sum = self._sum.plus(self._window.popleft(), -1)

    def _is_overload(self) -> bool:
        """Whether of late, and since there has been a queue, far more requests came than were over."""
        return self._sum.num_asked > OVERLOAD_FACTOR * max(self._sum.num_released, MIN_ENDS)

    def _takes_ns(self, num_sequences: int) -> int:
        """How long so many will take by the speed of late; 0 if that is not known."""
        rate = self._rate()
        return int(num_sequences / rate * 1e9) if rate else 0

    def _rate(self) -> float:
        """Sequences that end in a second while others wait; 0 if there has been no queue for long enough."""
        if self._waiting_since_ns is None or not self._window:
            return 0.0
        span_ns = min(self._read_at_ns - self._waiting_since_ns, WINDOW_NS)
        if span_ns < SETTLED_NS or self._sum.num_ended < MIN_ENDS:
            return 0.0
        # Ends from before there was a queue say less than the engine can do; they fall out of the window soon.
        return self._sum.num_ended / max(span_ns, self._read_at_ns - self._window[0].end_ns) * 1e9


class _Span(NamedTuple):
    """What happened between two looks, or in all spans of the window.

    Attributes:
        num_ended: sequences.
        num_asked, num_released: requests that came, and that were over.
    """

    end_ns: int
    num_ended: int
    num_asked: int
    num_released: int

    def plus(self, other: _Span, sign: int) -> _Span:
        return _Span(
            0,
            self.num_ended + sign * other.num_ended,
            self.num_asked + sign * other.num_asked,
            self.num_released + sign * other.num_released,
        )
