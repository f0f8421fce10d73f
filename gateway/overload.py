"""Who is let in: bounded work, refused before its body is read, with an honest time to come back.

Throughput falls if too much is let in, and every client waits longer than it will. So the sum of what is open is
bounded in requests and bytes (tokens, where they are counted: by the scheduler), and the queue by the time that it
takes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from .stats import EngineStats

WINDOW_NS: Final = 10_000_000_000
"""Ends of sequences are counted over so long."""

SETTLED_NS: Final = 2_000_000_000
"""A queue must have been there for so long before its speed is believed."""

MIN_ENDS: Final = 8
STATS_AGE_NS: Final = 50_000_000
MAX_RETRY_AFTER_S: Final = 60

Bound = Literal["requests", "bytes", "wait"]


class OverloadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be open.

    Attributes:
        max_requests: requests that are open, streamed ones included; 0 for no bound.
        max_bytes: of their bodies; 0 for no bound. A request that comes alone is never too big by this one.
        max_wait_ns: no more is let in while those who wait would take longer; 0 for no bound.
        min_waiting: so many may wait whatever the time.
    """

    max_requests: int = 0
    max_bytes: int = 0
    max_wait_ns: int = 0
    min_waiting: int = 0


class Refusal(msgspec.Struct, frozen=True):
    """Why not now, and when."""

    bound: Bound
    text: str
    retry_after_s: int


class AdmissionCore:
    """Counts what is open and how fast it ends.

    Args:
        read_stats: the engine's account; asked at most twenty times a second.
        read_num_ended: sequences that came to their end since the start; asked as often.

    Attributes:
        num_admitted, num_refused: requests since the start, the latter by bound.
    """

    def __init__(
        self, limits: OverloadLimits, read_stats: Callable[[], EngineStats], read_num_ended: Callable[[], int]
    ) -> None:
        self._limits = limits
        self._read_stats = read_stats
        self._read_num_ended = read_num_ended
        self._num_open = 0
        self._num_bytes = 0
        self._ends: deque[tuple[int, int]] = deque()  # when, how many sequences
        self._num_ends = 0
        self._num_ended_before = 0
        self._waiting_since_ns: int | None = None
        self._num_waiting = 0
        self._read_at_ns = -STATS_AGE_NS
        self._next_place_ns = 0
        self.num_admitted = 0
        self.num_refused: dict[str, int] = {"requests": 0, "bytes": 0, "wait": 0}

    @property
    def num_open(self) -> int:
        return self._num_open

    def admit(self, now_ns: int, num_bytes: int) -> Refusal | None:
        """Let a request in, which must then be released; or say why not."""
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
        wait_ns = self.wait_ns()
        if limits.max_wait_ns and self._num_waiting >= limits.min_waiting and wait_ns > limits.max_wait_ns:
            return self._refuse(
                now_ns,
                "wait",
                f"{self._num_waiting} sequences wait already, for about {wait_ns / 1e9:.0f} s: more than the "
                f"{limits.max_wait_ns / 1e9:g} s that anybody is to wait here",
            )
        self.num_admitted += 1
        self._num_open += 1
        self._num_bytes += num_bytes
        return None

    def release(self, num_bytes: int) -> None:
        """A request that was let in is over."""
        self._num_open -= 1
        self._num_bytes -= num_bytes

    def wait_ns(self) -> int:
        """How long those who wait will take by the speed of late; 0 if that is not known."""
        rate = self._rate()
        return int(self._num_waiting / rate * 1e9) if rate else 0

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
        self.num_refused[bound] += 1
        return Refusal(bound, text, self.retry_after_s(now_ns))

    def _look(self, now_ns: int) -> None:
        if now_ns - self._read_at_ns < STATS_AGE_NS:
            return
        self._read_at_ns = now_ns
        self._num_waiting = self._read_stats().num_waiting
        if not self._num_waiting:
            self._waiting_since_ns = None
        elif self._waiting_since_ns is None:
            self._waiting_since_ns = now_ns
        num_ended = self._read_num_ended()
        if num_ended > self._num_ended_before:
            self._ends.append((now_ns, num_ended - self._num_ended_before))
            self._num_ends += num_ended - self._num_ended_before
            self._num_ended_before = num_ended
        while self._ends and now_ns - self._ends[0][0] > WINDOW_NS:
            self._num_ends -= self._ends.popleft()[1]

    def _rate(self) -> float:
        """Sequences that end in a second while others wait; 0 if there has been no queue for long enough."""
        if self._waiting_since_ns is None or not self._ends:
            return 0.0
        span_ns = min(self._read_at_ns - self._waiting_since_ns, WINDOW_NS)
        if span_ns < SETTLED_NS or self._num_ends < MIN_ENDS:
            return 0.0
        # Ends from before there was a queue say less than the engine can do; they fall out of the window soon.
        return self._num_ends / max(span_ns, self._read_at_ns - self._ends[0][0]) * 1e9
