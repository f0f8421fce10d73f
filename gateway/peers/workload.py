"""What engines are compared on: requests that arrive all at once, and how their answers are counted."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence

import msgspec

MIXED_REQUESTS = 32
MIXED_INPUT = (32, 512)
MIXED_OUTPUT = (16, 256)


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that arrive all at once.

    Attributes:
        kind: what is counted. `decode`: output tokens after each request's first, over the time of the whole less the
            time of the prompts alone (a second run, one output token each). `prefill`: prompt tokens over the time to
            one output token. `mixed`: output tokens over the time of the whole.
        lengths: `(prompt, output)` tokens of each request.
    """

    name: str
    kind: str
    lengths: tuple[tuple[int, int], ...]

    @property
    def longest(self) -> int:
        return max(prompt + output for prompt, output in self.lengths)

    @property
    def total_tokens(self) -> int:
        return sum(prompt + output for prompt, output in self.lengths)


def make_workloads(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads that the flags ask for; the mixed one has the same lengths for the same seed."""
    shape = (arguments.input_len, arguments.output_len)
    workloads = [
        Workload(name=f"decode {count}", kind="decode", lengths=(shape,) * count) for count in arguments.concurrency
    ]
    workloads += [
        Workload(name=f"prefill {length}", kind="prefill", lengths=((length, 1),)) for length in arguments.prefill_len
    ]
    if arguments.mixed:
        chance = random.Random(arguments.workload_seed)  # noqa: S311  # a workload, not a secret
        lengths = tuple((chance.randint(*MIXED_INPUT), chance.randint(*MIXED_OUTPUT)) for _ in range(MIXED_REQUESTS))
        workloads.append(Workload(name=f"mixed {MIXED_REQUESTS}", kind="mixed", lengths=lengths))
    return workloads


def rate_of(workload: Workload, elapsed_s: float, prefill_s: float) -> float:
    """Tokens a second as the workload counts them; NaN where no time is left for decoding."""
    match workload.kind:
        case "decode":
            num_tokens = sum(output - 1 for _, output in workload.lengths)
            return num_tokens / (elapsed_s - prefill_s) if elapsed_s > prefill_s else math.nan
        case "prefill":
            return sum(prompt for prompt, _ in workload.lengths) / elapsed_s
        case _:
            return sum(output for _, output in workload.lengths) / elapsed_s


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Share of tokens before each request's first difference."""
    same = total = 0
    for a, b in zip(ours, theirs, strict=True):
        total += len(a)
        for x, y in zip(a, b, strict=True):
            if x != y:
                break
            same += 1
    return same / total
