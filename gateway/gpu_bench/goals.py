"""What is to be reached on one H200, and which of it a run has reached.

K are kernels, S steps, E engines. Shares are of the ceilings that the same run measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from .rows import OURS, Row

START = "start to first token"
NOT_COMPILED, COMPILED = "nothing compiled before", "compiled before"
"""What the row of a start is called, and how its shape ends."""

Measure = Callable[[Sequence[Row]], float | None]
"""Of all rows; None if what it takes was not measured."""


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table.

    Attributes:
        name: `K1`.
        what: is measured, the worst case where it is several.
        unit: of what `measure` gives: `%` and `x` are shares of 1 and ratios.
        thresholds: least that must be, the goal, and what would be better still; those that are set.
        is_time: less is better.
    """

    name: str
    what: str
    unit: str
    thresholds: dict[str, float]
    measure: Measure
    is_time: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Attributes:
    value: None if it was not measured.
    reached: the highest of the goal's thresholds that it reaches; `missed` if none, `not measured` without a value.
    """

    goal: Goal
    value: float | None
    reached: str

    @property
    def is_met(self) -> bool:
        """Whether the goal itself is."""
        names = list(self.goal.thresholds)
        return self.reached in names and names.index(self.reached) >= names.index("goal")


def verdicts(rows: Sequence[Row], goals: Iterable[Goal] | None = None) -> list[Verdict]:
    """For each goal what was found."""
    found = []
    for goal in GOALS if goals is None else goals:
        value = goal.measure(rows)
        reached = "not measured" if value is None else "missed"
        for name, threshold in goal.thresholds.items():
            if value is not None and (value <= threshold if goal.is_time else value >= threshold):
                reached = name
        found.append(Verdict(goal, value, reached))
    return found


_WORDS = {"must": "MISSED, not what must be", "missed": "MISSED", "goal": "met", "stretch": "met, stretch too"}


def goals_table(found: Sequence[Verdict]) -> str:
    """A line for each goal: what was found, what is asked for, and which of it is reached."""
    lines = [("", "goal", "found", "must / goal / stretch", "verdict")]
    for verdict in found:
        goal = verdict.goal
        asked = " / ".join(
            _told(goal.thresholds[name], goal.unit) if name in goal.thresholds else "-"
            for name in ("must", "goal", "stretch")
        )
        value = "-" if verdict.value is None else _told(verdict.value, goal.unit)
        lines.append((goal.name, goal.what, value, asked, _WORDS.get(verdict.reached, verdict.reached)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    shown = [
        "  ".join([cell.ljust(width) for cell, width in zip(line[:4], widths, strict=True)] + [line[4]]).rstrip()
        for line in lines
    ]
    num_measured = sum(verdict.value is not None for verdict in found)
    num_met = sum(verdict.is_met for verdict in found)
    return "\n".join([*shown, f"goals: {num_met} of {num_measured} that were measured are met, {len(found)} in all"])


def _told(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "x":
        return f"{value:.2f}x"
    return f"{value:,.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"


# ---- how each is found among rows ----


def _ours(rows: Sequence[Row], what: str, *shapes: str, engine: str = OURS) -> list[Row]:
    """Rows with a time, of shapes whose first words are one of `shapes`; all where none is given."""
    first = tuple(shape + end for shape in shapes for end in (" ", ","))
    return [
        row
        for row in rows
        if row.what == what
        and row.engine == engine
        and row.ms > 0
        and (not shapes or row.shape in shapes or row.shape.startswith(first))
    ]


def _worst_share(what: str, *shapes: str) -> Measure:
    def measure(rows: Sequence[Row]) -> float | None:
        return min((row.share for row in _ours(rows, what, *shapes) if row.share is not None), default=None)

    return measure


def _worst_ratio(what: str, others: Sequence[str], *shapes: str) -> Measure:
    """The best of some others' time over ours, at the shape where that is least."""

    def measure(rows: Sequence[Row]) -> float | None:
        found = []
        for ours in _ours(rows, what, *shapes):
            theirs = [
                row.ms
                for other in others
                for row in _ours(rows, what, ours.shape, engine=other)
                if row.shape == ours.shape
            ]
            if theirs:
                found.append(min(theirs) / ours.ms)
        return min(found, default=None)

    return measure


def _value(what: str, shapes: Sequence[str], name: str, *, worst: Callable[..., float] = min) -> Measure:
    """One of a row's other figures."""

    def measure(rows: Sequence[Row]) -> float | None:
        found = [row.values[name] for row in _ours(rows, what, *shapes) if name in row.values]
        return worst(found) if found else None

    return measure


def _ms(what: str, *shapes: str, factor: float = 1.0) -> Measure:
    """The longest time."""
    return lambda rows: max((row.ms * factor for row in _ours(rows, what, *shapes)), default=None)


def _hard_decodes(rows: Sequence[Row]) -> float | None:
    shares = [_worst_share("K2")(rows), _worst_share("decode attention", *_HARD)(rows)]
    return min((share for share in shares if share is not None), default=None)


def _fp8_over_bf16(rows: Sequence[Row]) -> float | None:
    """The same decodes' time with bfloat16 KV over that with fp8."""
    wide = {row.shape: row.ms for row in _ours(rows, "K1")}
    found = []
    for row in _ours(rows, "K3"):
        ms = wide.get(row.shape.replace("float8_e4m3fn", "bfloat16"))
        if ms:
            found.append(ms / row.ms)
    return min(found, default=None)


def _prefix_over_plain(rows: Sequence[Row]) -> float | None:
    """Rate of a prefill behind a cached prefix over that of one without."""
    plain, behind = (_value("prefill attention", (shape,), "tflops")(rows) for shape in (_PLAIN, _BEHIND))
    return behind / plain if plain and behind else None


def _workload(model: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.section == "workload" and row.shape == model and row.ms > 0]


def _tokens_per_s(model: str) -> Measure:
    def measure(rows: Sequence[Row]) -> float | None:
        found = [row.values["tokens_per_s"] for row in _workload(model, rows) if row.engine == OURS]
        return median(found) if found else None

    return measure


def _over_other_engines(model: str) -> Measure:
    """Our rate over the best other engine's."""

    def measure(rows: Sequence[Row]) -> float | None:
        theirs = [row.ms for row in _workload(model, rows) if row.engine != OURS]
        ours = [row.ms for row in _workload(model, rows) if row.engine == OURS]
        return min(theirs) / median(ours) if theirs and ours else None

    return measure


def _first_token_s(model: str) -> Measure:
    """Of a start like one before it; if there was none, of the workload's, for which some may have been compiled."""

    def measure(rows: Sequence[Row]) -> float | None:
        found = [row.ms / 1e3 for row in _ours(rows, START, f"{model}, {COMPILED}")]
        found = found or [row.values["first_token_s"] for row in _workload(model, rows) if row.engine == OURS]
        return max(found, default=None)

    return measure


def _idle_8b(rows: Sequence[Row]) -> float | None:
    """The largest share of a step in which the device waits, from 32 rows on."""
    shapes = tuple(f"B={count} ctx=1024 graph" for count in (32, 64, 128, 256))
    return _value("qwen3-8b decode step", shapes, "idle", worst=max)(rows)


def _host_us(rows: Sequence[Row]) -> float | None:
    """What launching a step takes of the host."""
    return _value(_SMALL, (_STEP_256,), "host_us", worst=max)(rows)


def _elsewhere(_rows: Sequence[Row]) -> None:
    return None


_HEADS = "32/8 x 128"
_LARGE = tuple(f"B={rows} ctx={context} {_HEADS}" for rows in (64, 256) for context in (1024, 4096, 8192))
_HARD = (f"B=1 ctx=32768 {_HEADS}", f"B=8 ctx=4096 {_HEADS}", "B=256 ctx=1024 16/8")
_PLAIN, _BEHIND = "1 x 8192 behind 0", "1 x 2048 behind 6144"
_OTHERS = ("fa3", "flashinfer")
_SAMPLE = "256x151936"
_FEW, _MANY = tuple(f"Qwen3-30B-A3B B={count}" for count in (8, 16, 32, 64)), "Qwen3-30B-A3B B=8192"
_DECODE, _PREFILL, _SKINNY = "decode attention", "prefill attention", "skinny linear"
_SMALL, _LARGER = "qwen3-0.6b decode step", "qwen3-8b decode step"


def _at_least(must: float | None, goal: float, stretch: float | None = None) -> dict[str, float]:
    given = {"must": must, "goal": goal, "stretch": stretch}
    return {name: value for name, value in given.items() if value is not None}


_W4_8B = ("8B qkv", "8B o", "8B gate_up", "8B down")
_STEP_1, _STEP_256 = "B=1 ctx=1024 graph", "B=256 ctx=1024 graph"
_FRESH_8B = f"qwen3-8b, {NOT_COMPILED}"
_ONE_TOP_K = "sample top_k 50 top_p 0.9"

_KERNELS = (
    Goal("K1", "paged decode attention, bandwidth", "%", _at_least(0.75, 0.85, 0.92), _worst_share(_DECODE, *_LARGE)),
    Goal("K1", "beside FA3, FlashInfer", "x", _at_least(None, 1.0), _worst_ratio(_DECODE, _OTHERS, *_LARGE)),
    Goal("K2", "hard decodes, the mix of lengths", "%", _at_least(0.65, 0.78, 0.85), _hard_decodes),
    Goal("K2", "beside FA3", "x", _at_least(None, 1.05), _worst_ratio(_DECODE, ("fa3",), *_HARD)),
    Goal("K3", "fp8 KV over bfloat16", "x", _at_least(1.5, 1.7, 1.85), _fp8_over_bf16),
    Goal("K4", "causal prefill of 8k", "TFLOP/s", _at_least(400, 500, 560), _value(_PREFILL, (_PLAIN,), "tflops")),
    Goal("K4", "beside FA3, cuDNN", "x", _at_least(None, 0.8, 0.9), _worst_ratio(_PREFILL, ("fa3", "cudnn"), _PLAIN)),
    Goal("K5", "2k new behind 6k, of K4's rate", "x", _at_least(0.85, 0.92, 1.0), _prefix_over_plain),
    Goal("K6", "skinny linears of 8B", "%", _at_least(0.75, 0.85, 0.92), _worst_share(_SKINNY, "8B")),
    Goal("K6", "beside cuBLAS", "x", _at_least(None, 1.0), _worst_ratio(_SKINNY, ("torch",), "8B")),
    *(
        Goal(
            "K7",
            f"W4A16 over bfloat16, M={count}",
            "x",
            _at_least(*limits),
            _worst_ratio("W4A16 linear", ("torch, 16 bits",), *(f"{name} M={count}" for name in _W4_8B)),
        )
        for count, limits in ((16, (2.5, 3.0, 3.4)), (32, (1.9, 2.4, 2.8)), (64, (1.3, 1.6, 1.9)))
    ),
    *(
        Goal(
            "K8",
            f"fp8 linears over bfloat16{how}, M >= 2k",
            "x",
            _at_least(1.4, 1.7, 1.85),
            _worst_ratio(
                what, ("torch, 16 bits",), *(f"{name} M={count}" for name in _W4_8B for count in (2048, 8192))
            ),
        )
        for how, what in ((", blocks", "fp8 linear"), (", rows", "fp8 linear by rows"))
    ),
    Goal("K9", "experts of 30B-A3B, B=8 to 64", "%", _at_least(0.6, 0.75, 0.85), _worst_share("mixture", *_FEW)),
    Goal("K9", "the same, 8k tokens", "TFLOP/s", _at_least(300, 430, 520), _value("mixture", (_MANY,), "tflops")),
    Goal("K10", "256 rows, top-k, top-p", "us", _at_least(300, 150, 100), _ms(_ONE_TOP_K, _SAMPLE, factor=1e3), True),
    *(
        Goal("K10", f"256 rows, {how}", "us", _at_least(None, 60, 40), _ms(f"sample {how}", _SAMPLE, factor=1e3), True)
        for how in ("greedy", "temperature")
    ),
)
_STEPS = (
    Goal("S1", "decode step 0.6B, B=1, 1k", "ms", _at_least(1.2, 0.75, 0.6), _ms(_SMALL, _STEP_1), True),
    Goal("S2", "decode step 8B, B=1, 1k", "ms", _at_least(4.7, 4.3, 4.0), _ms(_LARGER, _STEP_1), True),
    Goal("S3", "decode step 0.6B, B=256, 1k", "%", _at_least(0.75, 0.85, 0.9), _worst_share(_SMALL, _STEP_256)),
    Goal("S3", "decode step 8B, B=256, 1k", "%", _at_least(0.75, 0.85, 0.9), _worst_share(_LARGER, _STEP_256)),
    Goal("S4", "host to launch 0.6B, B=256", "us", _at_least(500, 300, 150), _host_us, True),
    Goal("S4", "device idle 8B, B >= 32", "%", _at_least(0.05, 0.03, 0.01), _idle_8b, True),
)
_ENGINES = (
    Goal("E1", "256 requests, 0.6B", "tok/s", _at_least(23_500, 27_400, 29_800), _tokens_per_s("qwen3-0.6b")),
    Goal("E1", "beside the best other engine", "x", _at_least(None, 1.15), _over_other_engines("qwen3-0.6b")),
    Goal("E2", "256 requests, 8B", "tok/s", _at_least(9_000, 10_000, 10_800), _tokens_per_s("qwen3-8b")),
    Goal("E2", "256 requests, 14B", "tok/s", _at_least(5_700, 6_400, 6_900), _tokens_per_s("qwen3-14b")),
    Goal("E3", "saturated server, 8B", "tok/s", _at_least(7_700, 8_900, 9_800), _elsewhere),
    Goal("E4", "TTFT unloaded over HTTP, 8B", "ms", _at_least(35, 26, 23), _elsewhere, True),
    Goal("E5", "TTFT p99 at half load, 8B", "ms", _at_least(400, 200, 120), _elsewhere, True),
    Goal("E6", "500 prompts over HTTP, 0.6B", "req/s", _at_least(150, 220, 260), _elsewhere),
    Goal("E7", "start to first token, 8B", "s", _at_least(40, 20, 12), _first_token_s("qwen3-8b"), True),
    Goal("E7", "the same, nothing compiled", "s", _at_least(40, 20, 12), _ms(START, _FRESH_8B, factor=1e-3), True),
    Goal("E8", "TTFT of a prefix hit", "%", _at_least(0.25, 0.12, 0.09), _elsewhere, True),
)
GOALS: tuple[Goal, ...] = (*_KERNELS, *_STEPS, *_ENGINES)
"""Those that nothing here measures are a server's (`octavo bench serve`), or of what is not there."""
