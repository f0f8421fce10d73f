"""The load of a simulation: its flags, and the workload they make."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, NamedTuple

from ...messages.errors import InvalidConfigError, InvalidWorkloadError
from ..flag_parser import Parser
from ..flag_values import positive

if TYPE_CHECKING:
    from ...sim.workload.request import Workload


class LoadSource(NamedTuple):
    """Where requests come from and how they are changed, as plain values that reach other processes.

    Attributes:
        trace: a file, or a synthetic workload's description.
        transforms: `name=value`, in order; see `make_workload`.
        rate_scale: multiple of the load, by laying copies over each other; after the transforms.
        context: `TOKENS:cut` or `TOKENS:drop`, after that; empty: the engine refuses what is too long.
        seed: of everything random.
    """

    trace: str
    transforms: tuple[str, ...] = ()
    rate_scale: float = 1.0
    context: str = ""
    seed: int = 0


class Load:
    """The workload, read once, at any multiple of its load.

    Raises:
        InvalidTraceError, InvalidWorkloadError: see `make_workload`; or no request is left.
    """

    def __init__(self, source: LoadSource) -> None:
        from ...sim.workload.spec import SYNTHETIC_PREFIX, make_workload

        self._source = source
        self._base: Workload = make_workload(source.trace, seed=source.seed)
        kind, _, rest = source.trace.removeprefix(SYNTHETIC_PREFIX).partition(",")
        # a closed loop's users and a conversation's turns wait for answers: not all requests are known beforehand
        self.has_followers = source.trace.startswith(SYNTHETIC_PREFIX) and (kind == "closed" or "turns=" in rest)
        workload = self(1.0)  # a transform that cannot be is an error now
        if next(iter(workload.arrivals()), None) is None:
            left_out = ", ".join(f"{number} {reason}" for reason, number in workload.counts.num_skipped.items())
            raise InvalidWorkloadError(f"{workload.name} holds no request{f' ({left_out})' if left_out else ''}")

    def __call__(self, multiple: float) -> Workload:
        """At this multiple of the load that the flags ask for."""
        from ...sim.workload.spec import apply_transform

        source = self._source
        workload = self._base
        factor = source.rate_scale * multiple
        transforms = [*source.transforms]
        if factor != 1.0:
            transforms.append(f"rate={factor!r}")
        if source.context:
            transforms.append(f"context={source.context}")
        for transform in transforms:
            workload = apply_transform(workload, transform, seed=source.seed)
        return workload


def window(text: str) -> tuple[float, float]:
    """`600:1200`, seconds of the trace; either may be left out."""
    begin, colon, end = text.partition(":")
    try:
        found = (float(begin) if begin else 0.0, float(end) if end else math.inf)
    except ValueError:
        found = (1.0, 0.0)
    if not colon or not 0 <= found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not a window such as 600:1200, in seconds of the trace")
    return found


def multiple(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_load_flags(parser: Parser) -> None:
    """Flags that become a `LoadSource`."""
    group = parser.add_argument_group("load")
    group.add_argument(
        "--trace",
        required=True,
        metavar="FILE",
        help="requests: Azure's or BurstGPT's CSV, Mooncake's or Qwen-Bailian's JSON lines, a generic CSV, plain or "
        "gzip, told from the file; or a synthetic load such as synthetic:poisson,rate=4,n=2000,prompt=512,output=128",
    )
    group.add_argument("--window", type=window, metavar="BEGIN:END", help="seconds of the trace to take")
    group.add_argument("--limit", type=positive, help="first so many requests")
    group.add_argument(
        "--spread-ticks", action="store_true", help="spread requests over the ticks of a coarse clock (Mooncake: 3 s)"
    )
    group.add_argument(
        "--transform",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the load, in turn: speed=2, prompts=1.5, outputs=0.5, max_output=256, prefix=1000, "
        "tenants=A:1+B:3, priorities=0:9+5:1, timeout=30, cancel=0.1:1:5; may be repeated",
    )
    group.add_argument(
        "--rate-scale", type=multiple, default=1.0, help="multiple of the load, by laying copies over each other"
    )
    group.add_argument(
        "--context",
        choices=["refuse", "cut", "drop"],
        default="refuse",
        help="what becomes of requests longer than --max-model-len",
    )
    group.add_argument("--seed", type=int, default=0, help="of whatever is random")


def load_source(arguments: argparse.Namespace) -> LoadSource:
    """The flags' values.

    Raises:
        InvalidConfigError: `--context` without a length.
    """
    context = ""
    if arguments.context != "refuse":
        if not arguments.max_model_len:
            raise InvalidConfigError(f"--context {arguments.context} needs --max-model-len", field="context")
        context = f"{arguments.max_model_len}:{arguments.context}"
    transforms = []
    if arguments.window:
        begin, end = arguments.window
        transforms.append(f"window={begin!r}:{'' if math.isinf(end) else repr(end)}")
    if arguments.limit:
        transforms.append(f"first={arguments.limit}")
    if arguments.spread_ticks:
        transforms.append("spread=auto")
    return LoadSource(
        trace=arguments.trace,
        transforms=(*transforms, *arguments.transform),
        rate_scale=arguments.rate_scale,
        context=context,
        seed=arguments.seed,
    )
