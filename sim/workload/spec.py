"""Workloads by a text: a trace's path or `synthetic:...`, and transforms by `name=value`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, cast

from ...messages.errors import InvalidWorkloadError
from .arrivals import ArrivalKind, ArrivalProcess
from .cut import Faster, FirstRequests, TimeWindow
from .distributions import parse_distribution
from .marks import AssignPriorities, AssignTenants, SomeLeave
from .request import Workload
from .reshape import ClampContext, ContextPolicy, LimitOutputs, ScaleLengths, SharedPrefix
from .spec_text import key_values, number, unknown, whole
from .superpose import scale_rate
from .synthetic import MAX_TURNS, SyntheticSpec, SyntheticWorkload
from .ticks import spread_ticks
from .trace import read_trace
from .transform import NS

SYNTHETIC_PREFIX = "synthetic:"
_COMMON_KEYS = (
    "n", "duration", "seed", "prompt", "followup", "output", "lengths", "groups", "group_tokens", "zipf", "turns",
    "think", "max_prompt", "max_output",
)  # fmt: skip
_KIND_KEYS: dict[ArrivalKind, tuple[str, ...]] = {
    "poisson": ("rate",),
    "gamma": ("rate", "cv"),
    "bursts": ("rate", "on", "off"),
    "diurnal": ("rate", "period", "amplitude"),
    "constant": ("rate",),
    "closed": ("concurrency",),
}


def make_workload(source: str | Path, transforms: Iterable[str] = (), *, seed: int = 0) -> Workload:
    """A workload by its text.

    `source` is the path of a trace (see `read_trace`), or `synthetic:KIND,key=value,...`:

    - KIND: poisson, gamma (`cv`), bursts (`on`, `off`: mean seconds), diurnal (`period` seconds, `amplitude`),
      constant, all with `rate` (a second, in the long run); or closed with `concurrency`.
    - `n`: how many (conversations, if they have turns), `duration`: seconds; `seed`.
    - `prompt`, `output`: tokens, by a distribution (`distributions.FORMS`); `lengths=TRACE`: both from one;
      `max_prompt`, `max_output`: bounds.
    - `groups`, `group_tokens`, `zipf`: system prompts that conversations have in common.
    - `turns`, `think`, `followup`: a conversation's turns, seconds between, user tokens of later turns.

    Each of `transforms` is applied in turn: `first=N`, `window=BEGIN:END` (seconds), `speed=FACTOR`, `rate=FACTOR` or
    `rate=FACTOR:shared`, `spread=TICK_SECONDS` or `spread=auto`, `context=TOKENS:refuse|cut|drop`, `prompts=FACTOR`,
    `outputs=FACTOR`, `max_output=TOKENS`, `prefix=TOKENS`, `tenants=NAME:WEIGHT+NAME:WEIGHT`, `priorities=` likewise,
    `timeout=SECONDS` or `CHANCE:FROM:TO`, `cancel=` likewise.

    Args:
        seed: of the transforms, and of a synthetic workload that names none.

    Raises:
        InvalidTraceError: a trace cannot be read.
        InvalidWorkloadError: a text is malformed, or its numbers are impossible.
    """
    text = str(source)
    workload = _synthetic(text, seed) if text.startswith(SYNTHETIC_PREFIX) else read_trace(source)
    for transform in transforms:
        workload = apply_transform(workload, transform, seed=seed)
    return workload


def _synthetic(text: str, seed: int) -> SyntheticWorkload:
    kind_text, _, rest = text.removeprefix(SYNTHETIC_PREFIX).partition(",")
    if kind_text not in _KIND_KEYS:
        unknown("kind of arrivals", kind_text, _KIND_KEYS)
    kind = next(known for known in _KIND_KEYS if known == kind_text)
    known = (*_KIND_KEYS[kind], *_COMMON_KEYS)
    given = key_values(rest, text) if rest else {}
    for key in given:
        if key not in known:
            unknown(f"key of synthetic:{kind}", key, known)
    for needed in ("rate", "concurrency"):
        if needed in _KIND_KEYS[kind] and needed not in given:
            raise InvalidWorkloadError(f"synthetic:{kind} needs {needed}=NUMBER")
    if "lengths" in given and (clash := [key for key in ("prompt", "followup", "output") if key in given]):
        raise InvalidWorkloadError(f"lengths gives prompts and outputs already: leave out it or {', '.join(clash)}")
    if kind == "closed" and "duration" in given:
        raise InvalidWorkloadError("a closed loop ends after n requests, not after a duration: give n")
    turns = parse_distribution(given.get("turns", "1"), "turns", is_whole=True, low=1)
    if turns.max_value > MAX_TURNS and given["turns"].split(":")[0] not in ("lognormal", "exponential", "empirical"):
        raise InvalidWorkloadError(f"turns={given['turns']}: a conversation has at most {MAX_TURNS} turns")
    for key in ("think", "followup"):
        if key in given and turns.max_value == 1 and not (key == "think" and kind == "closed"):
            raise InvalidWorkloadError(f"{key} is about conversations: give turns, too")
    if "zipf" in given and "groups" not in given:
        raise InvalidWorkloadError("zipf is about groups: give groups and group_tokens, too")
    spec = SyntheticSpec(
        arrivals=None if kind == "closed" else _arrivals(kind, given),
        num_conversations=whole(given["n"], "n", low=1) if "n" in given else None,
        duration_s=number(given["duration"], "duration", above=True, high=1e8) if "duration" in given else None,
        concurrency=whole(given["concurrency"], "concurrency", low=1) if kind == "closed" else 0,
        prompt=parse_distribution(given.get("prompt", "512"), "prompt", is_whole=True, low=1),
        followup=parse_distribution(given["followup"], "followup", is_whole=True, low=1)
        if "followup" in given
        else None,
        output=parse_distribution(given.get("output", "128"), "output", is_whole=True, low=1),
        lengths_from=read_trace(given["lengths"]) if "lengths" in given else None,
        num_groups=whole(given.get("groups", "0"), "groups", high=10**6),
        group_tokens=whole(given.get("group_tokens", "0"), "group_tokens"),
        zipf=number(given.get("zipf", "1"), "zipf", high=20),
        turns=turns,
        think=parse_distribution(given.get("think", "0"), "think", is_whole=False),
        max_prompt=whole(given.get("max_prompt", str(2**31 - 1)), "max_prompt", low=1),
        max_output=whole(given.get("max_output", str(2**31 - 1)), "max_output", low=1),
        seed=whole(given["seed"], "seed", low=-(2**53), high=2**53) if "seed" in given else seed,
    )
    return SyntheticWorkload(spec, name=text)


def _arrivals(kind: ArrivalKind, given: Mapping[str, str]) -> ArrivalProcess:
    def positive(key: str, default: str) -> float:
        return number(given.get(key, default), key, above=True, high=1e9)

    return ArrivalProcess(
        kind=kind,
        rate=number(given["rate"], "rate", low=1e-6, high=1e6),
        cv=number(given.get("cv", "1"), "cv", low=0.01, high=20),
        on_s=positive("on", "10"),
        off_s=positive("off", "10"),
        period_s=positive("period", "86400"),
        amplitude=number(given.get("amplitude", "0.5"), "amplitude", high=1),
    )


def apply_transform(workload: Workload, text: str, *, seed: int = 0) -> Workload:
    """One `name=value` of `make_workload`.

    Raises:
        InvalidWorkloadError: malformed or impossible.
    """
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if name not in TRANSFORMS:
        unknown("transform", name, TRANSFORMS)
    if not equals or not value:
        raise InvalidWorkloadError(f"{text!r} is not NAME=VALUE")
    return TRANSFORMS[name](workload, value, seed)


def _window(workload: Workload, value: str, seed: int) -> Workload:
    begin, end = _parts(value, "window", 2, "BEGIN:END in seconds")
    limit = 1e9
    return TimeWindow(
        workload,
        round(number(begin or "0", "window", high=limit) * NS),
        round(number(end, "window", high=limit) * NS) if end else round(limit * NS),
    )


def _rate(workload: Workload, value: str, seed: int) -> Workload:
    factor, colon, mode = value.partition(":")
    if colon and mode != "shared":
        unknown("mode of rate", mode, ["shared"])
    return scale_rate(workload, number(factor, "rate", low=1e-6, high=1e4), seed=seed, is_content_shared=bool(colon))


def _spread(workload: Workload, value: str, seed: int) -> Workload:
    tick_ns = None if value == "auto" else round(number(value, "spread", above=True, high=1e6) * NS)
    return spread_ticks(workload, seed=seed, tick_ns=tick_ns)


def _context(workload: Workload, value: str, seed: int) -> Workload:
    tokens, colon, policy = value.partition(":")
    known = ("refuse", "cut", "drop")
    if not colon:
        raise InvalidWorkloadError(f"context={value}: say what becomes of longer ones, as in context={value}:cut "
                                   f"({', '.join(known)})")  # fmt: skip
    if policy not in known:
        unknown("policy of context", policy, known)
    return ClampContext(workload, whole(tokens, "context", low=2), cast(ContextPolicy, policy))


def _weights(value: str, name: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in value.split("+"):
        choice, colon, weight = part.rpartition(":")
        if not colon or not choice or choice in weights:
            raise InvalidWorkloadError(f"{name}={value} is not CHOICE:WEIGHT+CHOICE:WEIGHT, each choice once")
        weights[choice] = number(weight, name, high=1e9)
    return weights


def _priorities(workload: Workload, value: str, seed: int) -> Workload:
    weights = {
        whole(choice, "priorities", low=-(2**31)): weight for choice, weight in _weights(value, "priorities").items()
    }
    return AssignPriorities(workload, weights, seed=seed)


def _some_leave(kind: Literal["timeout", "cancel"]) -> Callable[[Workload, str, int], Workload]:
    def apply(workload: Workload, value: str, seed: int) -> Workload:
        if ":" not in value:
            value = f"1:{value}:{value}"
        chance, low, high = _parts(value, kind, 3, "SECONDS or CHANCE:FROM:TO")
        return SomeLeave(
            workload,
            kind,
            chance=number(chance, kind, high=1),
            low_ns=round(number(low, kind, above=True, high=1e9) * NS),
            high_ns=round(number(high, kind, above=True, high=1e9) * NS),
            seed=seed,
        )

    return apply


def _parts(value: str, name: str, num: int, form: str) -> list[str]:
    parts = value.split(":")
    if len(parts) != num:
        raise InvalidWorkloadError(f"{name}={value} is not {form}")
    return parts


TRANSFORMS: dict[str, Callable[[Workload, str, int], Workload]] = {
    "first": lambda workload, value, seed: FirstRequests(workload, whole(value, "first", low=1)),
    "window": _window,
    "speed": lambda workload, value, seed: Faster(workload, number(value, "speed", low=1e-6, high=1e6)),
    "rate": _rate,
    "spread": _spread,
    "context": _context,
    "prompts": lambda workload, value, seed: ScaleLengths(
        workload, prompts=number(value, "prompts", low=1e-6, high=1e4)
    ),
    "outputs": lambda workload, value, seed: ScaleLengths(
        workload, outputs=number(value, "outputs", low=1e-6, high=1e4)
    ),
    "max_output": lambda workload, value, seed: LimitOutputs(workload, whole(value, "max_output", low=1)),
    "prefix": lambda workload, value, seed: SharedPrefix(workload, whole(value, "prefix", low=1)),
    "tenants": lambda workload, value, seed: AssignTenants(workload, _weights(value, "tenants"), seed=seed),
    "priorities": _priorities,
    "timeout": _some_leave("timeout"),
    "cancel": _some_leave("cancel"),
}
