"""Whether a child that is silent, or long at a step, hangs; or has a reason that is not its own."""

from __future__ import annotations

from typing import NamedTuple

from .child import Child
from .config import SupervisorConfig

_PATIENCE_WITH_ALL = 3
"""So many times as long may children be silent if all of them are."""

_COMPUTES = 4
"""A child that had a processor for one part in so many of its silence computes; what wakes now and then does not."""


class Verdict(NamedTuple):
    """A child is to end.

    Attributes:
        why: for logs.
        is_innocent: as of `ExecutorLost`.
        useless_ns: for how long it has been of no use.
    """

    why: str
    is_innocent: bool
    useless_ns: int


def silence_ns(child: Child, now_ns: int) -> int:
    """For how long a child has not been heard, be it since its start."""
    return now_ns - (child.heard_ns if child.heard_ns >= 0 else child.since_ns)


def usual_silence_ns(child: Child, config: SupervisorConfig) -> int:
    """For how long a child that is well may be silent."""
    if child.state != "starting":
        return config.max_silence_ns
    if child.config.kind != "engine":
        return config.max_silence_at_start_ns
    # It loads nothing: its beats come soon, and then regularly.
    return config.max_silence_ns if child.heard_ns >= 0 else config.max_engine_start_silence_ns


def judge_silence(child: Child, now_ns: int, config: SupervisorConfig, *, are_all_silent: bool) -> Verdict | None:
    """Judge a child that has beats: it hangs if it is silent for longer than what it was at explains.

    One that neither computes nor waits for a processor or the kernel does so for ever. One that computes may be in a
    call that lets no other thread run, and one that is not let run is no worse for it. Neither goes on without end.

    Args:
        are_all_silent: whether several children have fallen silent together.
    """
    is_starting = child.state == "starting"
    silent_ns, limit_ns, age_ns = silence_ns(child, now_ns), usual_silence_ns(child, config), now_ns - child.since_ns
    if is_starting and age_ns > config.max_start_ns:
        why = f"{child.config.name} was not ready within {config.max_start_ns / 1e9:.0f} s"
        return Verdict(why, is_innocent=True, useless_ns=age_ns)
    if are_all_silent and not is_starting:
        limit_ns *= _PATIENCE_WITH_ALL
    if _COMPUTES * child.ran_ns >= silent_ns:
        limit_ns = max(limit_ns, config.max_computing_silence_ns)
    if silent_ns <= limit_ns + min(child.hindered_ns, config.max_hindered_ns):
        return None
    why = f"{child.config.name} hangs: no beat for {silent_ns / 1e9:.1f} s"
    # One that has not loaded has computed nothing yet.
    is_innocent = is_starting or are_all_silent or 2 * child.hindered_ns >= silent_ns
    return Verdict(why, is_innocent, useless_ns=silent_ns)


def judge_step(child: Child, busy_ns: int, hindered_ns: int, limit_ns: int, config: SupervisorConfig) -> Verdict | None:
    """Judge an executor that has been at a step for `busy_ns`, hindered for a part of it, of usually `limit_ns`."""
    if busy_ns <= limit_ns + min(hindered_ns, config.max_hindered_ns):
        return None
    why = f"{child.config.name} hangs: a step has been running for {busy_ns / 1e9:.1f} s"
    return Verdict(why, is_innocent=2 * hindered_ns >= busy_ns, useless_ns=busy_ns)
