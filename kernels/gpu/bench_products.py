"""What the products reach on a GPU: few rows, weights of 4 and 8 bits, fp8, mixtures of experts; checked, then timed.

Weights and routes take turns, so that no call finds in the L2 cache what the one before it read, and calls are
replayed from a graph, so that launching them does not count (`device_time`).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..expert_stack import AnyExpertStack, CodedExpertStack, ExpertStack
from ..fp8_weight import Fp8Weight, quantize_fp8
from ..gated_activation import silu_and_mul
from ..linear_fp8 import linear_fp8_ref, multiplies_fp8
from ..mixture import mixture_ref, route_ref
from ..quantized_weight import QuantizedWeight
from .cases import Case, OnCase, Row, recover, rows_of, worded
from .check_mixture_codes import random_codes
from .check_setting import Random, Setting
from .device_time import Timed, device_time
from .linear import linear_skinny
from .linear_fp8 import linear_fp8
from .linear_fp8_skinny import MOST_ROWS
from .linear_quantized import linear_codes
from .mixture import mixture
from .round_inputs import round_inputs

BEYOND_L2 = 256 * 1024**2  # bytes that take turns: several times an H200's 60 MB
_MOST_TURNS = 64
_MOST_ERROR = 1e-2  # of the norm: bfloat16 operands, and sums of float32

# [out_features, in_features] of Qwen3-8B and Qwen3-0.6B.
MATRICES = {
    **{"8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate_up": (24576, 4096), "8B down": (4096, 12288)},
    **{"8B head": (151936, 4096), "0.6B qkv": (4096, 1024), "0.6B o": (1024, 2048)},
    **{"0.6B gate_up": (6144, 1024), "0.6B down": (1024, 3072)},
}
QUANTIZED = ("8B qkv", "8B o", "8B gate_up", "8B down")

Timer = Callable[..., Timed]
"""Of several calls that do the same on other data; see `device_time`."""


@dataclass(frozen=True, slots=True)
class MixtureShape:
    """Sizes of a mixture, the numbers of tokens to time it with, and whether its experts are timed as MXFP4 too."""

    num_experts: int
    num_chosen: int
    hidden_size: int
    inner: int
    num_tokens: tuple[int, ...]
    in_mxfp4: bool = False


MIXTURES = {
    "Qwen3-30B-A3B": MixtureShape(128, 8, 2048, 768, (1, 8, 16, 32, 64, 256, 8192)),
    "gpt-oss-20b": MixtureShape(32, 4, 2880, 2880, (1, 8, 64, 2048), in_mxfp4=True),
}


def rows(
    device: torch.device,
    *,
    matrices: dict[str, tuple[int, int]] | None = None,
    mixtures: dict[str, MixtureShape] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    skinny_rows: Sequence[int] = (1, 4, 16),
    quantized_rows: Sequence[int] = (16, 32, 64),
    fp8_rows: Sequence[int] = (1, 16, 64, 2048, 8192),
    beyond_l2: int = BEYOND_L2,
    timer: Timer = device_time,
    first_case: int = 0,
    on_case: OnCase = lambda _number, _of, _what: None,
) -> Iterator[Row]:
    """Every figure as soon as it is there.

    Yields:
        `kernel`, `shape`, `engine`, `us`, `bytes` (each operand once), `flops`; where a result is wrong, no time but a
        `note` that says by how much.
    """
    quantized = {name: shape for name, shape in (matrices or MATRICES).items() if matrices or name in QUANTIZED}
    bench = _Bench(device, dtype, beyond_l2, timer)
    cases = [
        Case(
            {"kernel": "skinny linear", "shape": f"{name} M={num_rows}"},
            partial(bench.skinny, name, *shape, num_rows),
        )
        for name, shape in (matrices or MATRICES).items()
        for num_rows in skinny_rows
    ]
    cases += [
        Case({"kernel": "W4A16 linear", "shape": f"{name} M={count}"}, partial(bench.quantized, name, *shape, count))
        for name, shape in quantized.items()
        for count in quantized_rows
    ]
    cases += [
        Case({"kernel": "fp8 linear", "shape": f"{name} M={count}"}, partial(bench.fp8, name, *shape, count))
        for name, shape in quantized.items()
        for count in (fp8_rows if device.type != "cuda" or multiplies_fp8(device) else ())
    ]
    for name, sizes in (MIXTURES if mixtures is None else mixtures).items():
        kinds: list[tuple[str, float, Callable[[], AnyExpertStack]]] = [("mixture", 16, partial(bench.stack, sizes))]
        if sizes.in_mxfp4:
            kinds.append(("MXFP4 mixture", 4.25, partial(bench.coded_stack, sizes)))
        for kernel, bits, make_stack in kinds:
            stack = functools.cache(make_stack)  # of all its cases, and made for the first that is run
            cases += [
                Case(
                    {"kernel": kernel, "shape": f"{name} B={count}"},
                    partial(bench.mixture, kernel, name, sizes, count, stack, bits),
                )
                for count in sizes.num_tokens
            ]
    with torch.inference_mode():
        yield from rows_of(cases, device, first=first_case, on_case=on_case)


def experts_met(routes: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Of how many experts the weights are read, the mean of several calls."""
    return statistics.mean(int(chosen.flatten().bincount().count_nonzero()) for _, chosen in routes)


class _Bench:
    """Makes operands, checks results and times calls."""

    def __init__(self, device: torch.device, dtype: torch.dtype, beyond_l2: int, timer: Timer) -> None:
        self._device, self._dtype, self._beyond_l2, self._timer = device, dtype, beyond_l2, timer
        self._generator = torch.Generator(device).manual_seed(0)

    def skinny(self, name: str, out_features: int, in_features: int, num_rows: int) -> Iterator[dict[str, Any]]:
        """Ours and torch's product of few rows."""
        weights = self._in_turn(partial(self._randn, out_features, in_features), out_features * in_features * 2)
        x = self._randn(num_rows, in_features)
        exact = F.linear(x.float(), weights[0].float())
        work = {
            "bytes": 2 * (out_features * in_features + num_rows * (out_features + in_features)),
            "flops": 2 * num_rows * out_features * in_features,
        }
        for engine, op in (("octavo", linear_skinny), ("torch", F.linear)):
            calls = [partial(op, x, weight) for weight in weights]
            yield self._row("skinny linear", f"{name} M={num_rows}", engine, calls, exact, work)

    def quantized(self, name: str, out_features: int, in_features: int, num_rows: int) -> Iterator[dict[str, Any]]:
        """Codes of 4 and 8 bits, and torch's product with bfloat16 weights of the same shape."""
        x, num_weights = self._randn(num_rows, in_features), out_features * in_features
        outside, flops = 2 * num_rows * (out_features + in_features), 2 * num_rows * num_weights
        for bits in (4, 8):
            weights = self._in_turn(partial(self._codes, out_features, in_features, bits), num_weights * bits // 8)
            exact = F.linear(x.float(), weights[0].dequantize(torch.float32))
            work = {"bytes": weights[0].num_bytes + outside, "flops": flops}
            calls = [partial(linear_codes, x, weight) for weight in weights]
            yield self._row(f"W{bits}A16 linear", f"{name} M={num_rows}", "octavo", calls, exact, work)
        floating = self._in_turn(partial(self._randn, out_features, in_features), num_weights * 2)
        exact = F.linear(x.float(), floating[0].float())
        work = {"bytes": num_weights * 2 + outside, "flops": flops}
        plain = [partial(F.linear, x, weight) for weight in floating]
        for bits in (4, 8):  # beside which the quantised ones stand
            yield self._row(f"W{bits}A16 linear", f"{name} M={num_rows}", "torch, 16 bits", plain, exact, work)

    def fp8(self, name: str, out_features: int, in_features: int, num_rows: int) -> Iterator[dict[str, Any]]:
        """Weights in fp8 with scales of blocks and of outputs, inputs rounded where that is done; and torch's products:
        of bfloat16 weights of the same shape, and of codes alone."""
        x, shape, is_few = self._randn(num_rows, in_features), f"{name} M={num_rows}", num_rows <= MOST_ROWS
        num_weights, outside = out_features * in_features, 2 * num_rows * (out_features + in_features)
        flops = 2 * num_rows * num_weights
        floating = self._in_turn(partial(self._randn, out_features, in_features), num_weights * 2)
        plain, of_plain = (
            [partial(F.linear, x, weight) for weight in floating],
            F.linear(x.float(), floating[0].float()),
        )
        for kernel, by_block in (("fp8 linear", True), ("fp8 linear by rows", False)):
            weights = self._in_turn(partial(self._fp8, out_features, in_features, by_block=by_block), num_weights)
            exact = F.linear(x.float(), weights[0].dequantize()) if is_few else linear_fp8_ref(x.float(), weights[0])
            # Where inputs are rounded too, the tensor cores are twice as quick.
            work = {"bytes": weights[0].num_bytes + outside, "flops": flops}
            work["flops_at_16_bits"] = flops if is_few else flops // 2
            calls = [partial(linear_fp8, x, weight, quick=True) for weight in weights]
            yield self._row(kernel, shape, "octavo", calls, exact, work)
            if self._device.type == "cuda" and not is_few and not by_block:
                yield self._row(kernel, shape, "torch, codes alone", self._scaled_mm(x, weights), None, work)
            work = {"bytes": num_weights * 2 + outside, "flops": flops}
            yield self._row(kernel, shape, "torch, 16 bits", plain, of_plain, work)

    def _scaled_mm(self, x: torch.Tensor, weights: Sequence[Fp8Weight]) -> list[Callable[[], object]]:
        """torch's products of codes with a scale for each row and output, of inputs that have been rounded before."""
        codes, scales = round_inputs(x, x.shape[1])
        return [
            partial(
                torch._scaled_mm,
                *(codes, weight.codes.T),
                scale_a=scales.T.contiguous(),
                scale_b=weight.scales.T.contiguous(),
                out_dtype=x.dtype,
                use_fast_accum=False,
            )
            for weight in weights
        ]

    def stack(self, s: MixtureShape) -> ExpertStack:
        """Random experts."""
        w13 = self._randn(s.num_experts, 2 * s.inner, s.hidden_size)
        return ExpertStack(w13, self._randn(s.num_experts, s.hidden_size, s.inner), None, None, 0, silu_and_mul)

    def coded_stack(self, s: MixtureShape) -> CodedExpertStack:
        """The same as MXFP4."""
        random = Random(Setting(self._device, self._dtype, 0, small=False))
        w13 = random_codes(random, "mxfp4", s.num_experts, 2 * s.inner, s.hidden_size)
        w2 = random_codes(random, "mxfp4", s.num_experts, s.hidden_size, s.inner)
        return CodedExpertStack(w13, w2, None, None, 0, silu_and_mul)

    def mixture(  # noqa: PLR0917,RUF100 - what a row says, and of what
        self,
        kernel: str,
        name: str,
        s: MixtureShape,
        num_tokens: int,
        make_stack: Callable[[], AnyExpertStack],
        bits: float,
    ) -> Iterator[dict[str, Any]]:
        """Grouping, both products and the sum, of weights of so many bits; and torch's grouped products alone."""
        stack = make_stack()
        per_expert = 3 * s.hidden_size * s.inner
        x = self._randn(num_tokens, s.hidden_size)
        of_experts = min(num_tokens * s.num_chosen, s.num_experts) * per_expert * bits / 8
        turns = max(1, min(_MOST_TURNS, math.ceil(self._beyond_l2 / of_experts)))
        routes: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(turns):
            logits = torch.randn(num_tokens, s.num_experts, device=self._device, generator=self._generator)
            weights, chosen = route_ref(logits, s.num_chosen)
            routes.append((weights, chosen.to(torch.int32)))
        met = experts_met(routes)
        work = {
            "bytes": int(met * per_expert * bits / 8 + 4 * num_tokens * s.hidden_size),
            "flops": 2 * num_tokens * s.num_chosen * per_expert,
        }
        exact = mixture_ref(x, *routes[0], stack).float()
        calls = [partial(mixture, x, weights, chosen, stack) for weights, chosen in routes]
        yield self._row(kernel, f"{name} B={num_tokens}", "octavo", calls, exact, work)
        if hasattr(F, "grouped_mm") and self._device.type == "cuda" and isinstance(stack, ExpertStack):
            sorted_calls = [self._grouped_mm(x, route[1], stack) for route in routes]
            yield self._row(kernel, f"{name} B={num_tokens}", "torch grouped_mm", sorted_calls, None, work)

    def _grouped_mm(self, x: torch.Tensor, chosen: torch.Tensor, stack: ExpertStack) -> Callable[[], object]:
        """torch's grouped products, of tokens that have been sorted before."""
        order = chosen.flatten().argsort(stable=True)
        ends = chosen.flatten().bincount(minlength=stack.w13.shape[0]).cumsum(0).to(torch.int32)
        sorted_x = x[order // chosen.shape[1]]
        w13, w2 = stack.w13.transpose(1, 2), stack.w2.transpose(1, 2)
        return lambda: F.grouped_mm(stack.act(F.grouped_mm(sorted_x, w13, offs=ends)), w2, offs=ends)

    def _row(  # noqa: PLR0917,RUF100 - what a row says
        self,
        kernel: str,
        shape: str,
        engine: str,
        calls: Sequence[Callable[[], Any]],
        exact: torch.Tensor | None,
        work: dict[str, int],
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"kernel": kernel, "shape": shape, "engine": engine, **work}
        try:
            out = calls[0]()
            if exact is not None:
                error = float((out.float() - exact).norm() / exact.norm())
                if not error < _MOST_ERROR:  # NaN is wrong too
                    return {**row, "us": 0.0, "note": f"WRONG: off by {error:.2e} of the norm"}
            timed = self._timer(*calls)
            return {**row, **timed.figures, **({"note": timed.how} if timed.how else {})}
        except Exception as error:  # noqa: BLE001,RUF100 - one that does not run does not end the others
            failure = worded(error)
        recover(self._device, failure)
        return {**row, "us": 0.0, "note": f"failed: {failure}"}

    def _in_turn(self, make: Callable[[], Any], num_bytes: int) -> list[Any]:
        return [make() for _ in range(max(1, min(_MOST_TURNS, -(-self._beyond_l2 // num_bytes))))]

    def _randn(self, *shape: int) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        x = torch.randn(*shape, device=self._device, dtype=self._dtype, generator=self._generator)
        return x.mul_(scale)

    def _fp8(self, out_features: int, in_features: int, *, by_block: bool) -> Fp8Weight:
        return quantize_fp8(self._randn(out_features, in_features), by_block=by_block)

    def _codes(self, out_features: int, in_features: int, bits: int) -> QuantizedWeight:
        low, high = (0, 16) if bits == 4 else (-128, 128)
        codes = torch.randint(
            low, high, (out_features, in_features), device=self._device, generator=self._generator, dtype=torch.int16
        )
        groups = -(-in_features // 128)
        scales = torch.rand(out_features, groups, device=self._device, generator=self._generator)
        return QuantizedWeight.from_codes(codes, scales.mul_(1 / high).to(self._dtype), bits=bits, group_size=128)
