"""Every kernel against its meaning in float64, on whatever device: fresh random inputs, outputs that are poisoned.

CI proves the same in Triton's interpreter and in more cases; what only a device can show is bfloat16 (which the
interpreter gets wrong), what the compiler made of the code, and races. `small` sizes are for the interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .. import clamped_swiglu, device_sampling, gated_activation, linear_quantized, mixture, rms_norm, rotary, sampling
from ..attention_batch import AttentionBatch
from ..embedding import embed_ref
from ..kv_quantization import dequantize, quantize_ref, row_width
from ..paged_attention import paged_attention_ref
from . import embedding as gpu_embedding
from . import expert_groups as gpu_groups
from . import gated_activation as gpu_activation
from . import linear as gpu_linear
from . import linear_quantized as gpu_linear_quantized
from . import logprobs as gpu_logprobs
from . import mixture as gpu_mixture
from . import paged_attention as gpu_attention
from . import rms_norm as gpu_rms_norm
from . import rotary as gpu_rotary
from . import sampling as gpu_sampling

# Relative error (of norms) allowed in each dtype. A product of float32 may be done in tf32.
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how the checks are made.

    Attributes:
        seed: of all inputs.
        small: sizes for the interpreter.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    small: bool

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    @property
    def bound(self) -> float:
        return BOUND[self.dtype]


Found = Iterator[tuple[str, float, float]]
"""Case, error, and the bound that it has to keep within."""


class _Random:
    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.generator = setting.generator()

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        s = self._setting
        return (torch.randn(shape, device=s.device, generator=self.generator) * scale).to(s.dtype)

    def floats(self, *shape: int) -> torch.Tensor:
        """Float32 whatever the dtype: hardly any two are equal."""
        return torch.randn(shape, device=self._setting.device, generator=self.generator)

    def randint(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, device=self._setting.device, generator=self.generator)


def error_of(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where anything is NaN."""
    if out.shape != exact.shape or bool(torch.isnan(out).any()):
        return float("inf")
    norm = float(exact.double().norm())
    return float((out.double() - exact.double()).norm()) / (norm or 1.0)


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    """0 if the bits are the same, else 1."""
    return float(not torch.equal(one, other))


def check_rms_norm(s: Setting) -> Found:
    random = _Random(s)
    for tokens, hidden in ((3, 64), (5, 100)) if s.small else ((1, 4096), (300, 1024), (7, 80), (64, 5120)):
        x, residual, weight = random.randn(tokens, hidden), random.randn(tokens, hidden), random.randn(hidden)
        exact = rms_norm.rms_norm_ref(x.double(), weight.double(), 1e-6)
        yield f"{tokens}x{hidden}", error_of(gpu_rms_norm.rms_norm(x, weight, 1e-6), exact), s.bound
        summed = (x.double() + residual.double()).to(s.dtype)
        out, after = gpu_rms_norm.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
        exact = rms_norm.rms_norm_ref(summed.double(), weight.double(), 1e-6)
        error = max(error_of(out, exact), error_of(after, summed.double()))
        yield f"{tokens}x{hidden} with residual", error, s.bound


def check_activation(s: Setting) -> Found:
    random = _Random(s)
    for tokens, inner in ((3, 40),) if s.small else ((1, 12288), (300, 3072), (7, 100)):
        gate_up = random.randn(tokens, 2 * inner)
        exact = gated_activation.silu_and_mul_ref(gate_up.double())
        yield f"silu {tokens}x{inner}", error_of(gpu_activation.silu_and_mul(gate_up), exact), s.bound
        exact = gated_activation.gelu_tanh_and_mul_ref(gate_up.double())
        yield f"gelu {tokens}x{inner}", error_of(gpu_activation.gelu_tanh_and_mul(gate_up), exact), s.bound


def check_embedding(s: Setting) -> Found:
    random = _Random(s)
    weight = random.randn(50 if s.small else 151936, 48 if s.small else 1024)
    ids = random.randint(0, weight.shape[0], 9 if s.small else 300)
    ids[2], ids[5] = -1, weight.shape[0]  # of padding
    yield "ids beyond both ends", differs(gpu_embedding.embed(ids, weight), embed_ref(ids, weight)), 0.5


def check_rotary(s: Setting) -> Found:
    random = _Random(s)
    tokens = 5 if s.small else 200
    cases = ((4, 2, 16, True, None),) if s.small else ((16, 8, 128, True, None), (32, 8, 128, False, None))
    for heads, kv_heads, width, has_norm, _ in cases:
        q, k, v = (random.randn(tokens, count, width) for count in (heads, kv_heads, kv_heads))
        table = torch.randn(1000, width, device=s.device, generator=random.generator)
        positions = random.randint(0, 1000, tokens)
        q_weight, k_weight = (random.randn(width), random.randn(width)) if has_norm else (None, None)
        slots = torch.randperm(8 * 32, device=s.device, generator=random.generator)[:tokens]
        slots[1] = -1
        caches = [torch.full((8, kv_heads, 32, width), float("nan"), dtype=s.dtype, device=s.device) for _ in range(2)]
        exact_caches = [cache.double() for cache in caches]
        exact = [x.double() for x in (q, k, v)]
        rotary.rotary_and_write_ref(
            *(*exact, table, positions, *exact_caches, slots),
            q_weight=None if q_weight is None else q_weight.double(),
            k_weight=None if k_weight is None else k_weight.double(),
            eps=1e-6,
        )
        gpu_rotary.rotary_and_write(
            *(q, k, v, table, positions, *caches, slots), q_weight=q_weight, k_weight=k_weight, eps=1e-6
        )
        name = f"{heads}/{kv_heads} x {width}{' with norm' if has_norm else ''}"
        error = max(error_of(out, right) for out, right in zip((q, k), exact, strict=False))
        yield f"{name}, in place", error, s.bound
        # What was not to be written still is NaN, and nothing else is.
        untouched = max(
            float(not torch.equal(cache.isnan(), right.isnan()))
            for cache, right in zip(caches, exact_caches, strict=True)
        )
        yield f"{name}, other slots", untouched, 0.5
        written = max(
            error_of(cache.nan_to_num(), right.nan_to_num()) for cache, right in zip(caches, exact_caches, strict=True)
        )
        yield f"{name}, cache", written, s.bound


@dataclass(frozen=True, slots=True)
class Attention:
    """`(new, context)` tokens of each row, and what kind of attention."""

    rows: tuple[tuple[int, int], ...]
    heads: int = 8
    kv_heads: int = 2
    width: int = 128
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        kinds = [word for word in ("sinks", "alibi", "fp8") if getattr(self, word)]
        kinds += [f"window {self.window}"] if self.window else []
        kinds += [f"cap {self.softcap:g}"] if self.softcap else []
        rows = f"{len(self.rows)} rows to {max(context for _, context in self.rows)}"
        return " ".join([rows, f"{self.heads}/{self.kv_heads}x{self.width} page {self.block_size}", *kinds])


_DECODE = ((1, 1), (1, 17), (1, 1000), (1, 4095), (1, 333))
_MIXED = ((1, 70), (5, 5), (130, 400), (1, 1), (64, 64), (3, 2000))
_SMALL_DECODE = ((1, 1), (1, 17), (1, 40))
_SMALL_MIXED = ((1, 20), (5, 5), (7, 30))

CASES = (
    Attention(_DECODE),
    Attention(_MIXED),
    Attention(((2048, 2048),), heads=32, kv_heads=8),
    Attention(((1, 30000),), heads=32, kv_heads=8),
    Attention(tuple((1, 900 + 7 * row) for row in range(200)), heads=16, kv_heads=8),
    Attention(_MIXED, width=64, block_size=32),
    Attention(_MIXED, width=80),
    Attention(_MIXED, width=256, block_size=64),
    Attention(_MIXED, window=100),
    Attention(_MIXED, softcap=30.0),
    Attention(_MIXED, sinks=True, width=64, window=128),
    Attention(_MIXED, alibi=True),
    Attention(_MIXED, fp8=True),
    Attention(_DECODE, fp8=True, block_size=128),
    Attention(_MIXED, heads=4, kv_heads=4, block_size=256),
)
SMALL_CASES = (
    Attention(_SMALL_DECODE, heads=4, width=16),
    Attention(_SMALL_MIXED, heads=4, width=16, window=9, sinks=True),
)


def _attention_inputs(
    case: Attention, s: Setting
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, AttentionBatch, dict[str, Any]]:
    random = _Random(s)
    blocks = [-(-context // case.block_size) for _, context in case.rows]
    order = torch.randperm(sum(blocks) + 1, device=s.device, generator=random.generator).to(torch.int32)
    table = torch.full((len(blocks), max(blocks)), 2**30, dtype=torch.int32, device=s.device)  # read, it would crash
    start = 0
    for row, count in enumerate(blocks):
        table[row, :count] = order[start : start + count]
        start += count
    new = [count for count, _ in case.rows]
    query_start = torch.tensor([0, *new], device=s.device).cumsum(0).to(torch.int32)
    batch = AttentionBatch(
        query_start=query_start,
        context_lens=torch.tensor([context for _, context in case.rows], dtype=torch.int32, device=s.device),
        block_tables=table,
        slot_mapping=torch.full((sum(new),), -1, dtype=torch.int64, device=s.device),
        block_size=case.block_size,
        max_query_len=max(new),
        max_context_len=max(context for _, context in case.rows),
        num_decodes=len(new) if max(new) == 1 else 0,
    )
    shape = (sum(blocks) + 1, case.kv_heads, case.block_size, case.width)
    caches = [random.randn(*shape) for _ in range(2)]
    if case.fp8:
        kv_dtype = torch.float8_e4m3fn
        caches = [quantize_ref(cache, kv_dtype) for cache in caches]
        assert caches[0].shape[-1] == row_width(case.width, kv_dtype)
    options: dict[str, Any] = {"scale": case.width**-0.5, "sliding_window": case.window, "softcap": case.softcap}
    options["sinks"] = random.randn(case.heads).float() if case.sinks else None
    options["alibi_slopes"] = (0.5 ** torch.arange(1, case.heads + 1, device=s.device)).float() if case.alibi else None
    return random.randn(sum(new), case.heads, case.width), caches[0], caches[1], batch, options


def check_attention(s: Setting) -> Found:
    for case in SMALL_CASES if s.small else CASES:
        q, k, v, batch, options = _attention_inputs(case, s)
        k_wide, v_wide = (dequantize(cache) if case.fp8 else cache for cache in (k, v))
        exact = paged_attention_ref(q.double(), k_wide.double(), v_wide.double(), _clipped(batch), **options)
        out = torch.full_like(q, float("nan"))
        gpu_attention.paged_attention(q, k, v, batch, **options, out=out)
        yield case.name, error_of(out, exact), s.bound
        same = gpu_attention.paged_attention(q, k, v, batch, **options, batch_invariant=True)
        yield f"{case.name}, invariant", error_of(same, exact), s.bound
        if not case.fp8 and len(case.rows) > 1:
            yield f"{case.name}, a row alone", _alone_differs(q, k, v, batch, options, same), 0.5
    if not s.small:  # the same twice: a race would show
        q, k, v, batch, options = _attention_inputs(CASES[4], s)
        outs = [gpu_attention.paged_attention(q, k, v, batch, **options) for _ in range(20)]
        yield "the same twenty times", max(differs(outs[0], out) for out in outs), 0.5


def _clipped(batch: AttentionBatch) -> AttentionBatch:
    """The batch with block tables that a reference may index."""
    return AttentionBatch(
        query_start=batch.query_start,
        context_lens=batch.context_lens,
        block_tables=batch.block_tables.clamp(max=0).where(batch.block_tables == 2**30, batch.block_tables),
        slot_mapping=batch.slot_mapping,
        block_size=batch.block_size,
        max_query_len=batch.max_query_len,
        max_context_len=batch.max_context_len,
        num_decodes=batch.num_decodes,
    )


def _alone_differs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: AttentionBatch,
    options: dict[str, Any],
    together: torch.Tensor,
) -> float:
    """Whether a row's bits depend on its neighbours, in the variant that promises that they do not."""
    row = len(batch.context_lens) - 1
    begin, end = int(batch.query_start[row]), int(batch.query_start[row + 1])
    context = int(batch.context_lens[row])
    alone = AttentionBatch(
        query_start=torch.tensor([0, end - begin], dtype=torch.int32, device=q.device),
        context_lens=batch.context_lens[row:],
        block_tables=batch.block_tables[row:, : -(-context // batch.block_size)].contiguous(),
        slot_mapping=batch.slot_mapping[begin:end],
        block_size=batch.block_size,
        max_query_len=end - begin,
        max_context_len=context,
        num_decodes=int(end - begin == 1),
    )
    out = gpu_attention.paged_attention(q[begin:end], k, v, alone, **options, batch_invariant=True)
    return differs(out, together[begin:end])


def check_linear(s: Setting) -> Found:
    random = _Random(s)
    sizes = ((24, 64),) if s.small else ((6144, 4096), (4096, 12288), (151936, 1024), (1000, 1000))
    for outs, ins in sizes:
        weight, bias = random.randn(outs, ins, scale=ins**-0.5), random.randn(outs)
        for num_rows in (1, 3) if s.small else (1, 2, 7, 16, 40):
            x = random.randn(num_rows, ins)
            exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
            yield f"{num_rows}x{ins}->{outs}", error_of(gpu_linear.linear(x, weight, bias), exact), s.bound
        out = gpu_linear.linear_deterministic(x, weight, bias)
        yield f"{num_rows}x{ins}->{outs} deterministic", error_of(out, exact), s.bound
        alone = gpu_linear.linear_deterministic(x[-1:], weight, bias)
        yield f"{ins}->{outs}, a row alone", differs(alone, out[-1:]), 0.5


def check_quantized_linear(s: Setting) -> Found:
    random = _Random(s)
    outs, ins = (32, 128) if s.small else (4096, 4096)
    floating = random.randn(outs, ins, scale=ins**-0.5).float()
    for bits, group_size in ((8, 64), (4, 32)) if s.small else ((8, 64), (8, -1), (4, 32), (4, 128)):
        weight = linear_quantized.quantize(floating.cpu(), bits=bits, group_size=group_size).to(s.device)
        wide = gpu_linear_quantized.widen(weight, torch.float32).double()
        for num_rows in (2,) if s.small else (1, 16, 40, 300):
            x = random.randn(num_rows, ins)
            exact = x.double() @ wide.T
            for quick in (True, False):
                out = gpu_linear_quantized.linear_quantized(x, weight, quick=quick)
                yield (
                    f"{bits} bits by {group_size}, {num_rows} rows{', quick' if quick else ''}",
                    error_of(out, exact),
                    s.bound,
                )


def check_mixture(s: Setting) -> Found:
    random = _Random(s)
    experts, chosen_each, hidden, inner = (4, 2, 32, 24) if s.small else (64, 8, 2048, 768)
    clamped = clamped_swiglu.ClampedSwiGLU()

    def clamped_exactly(gate_up: torch.Tensor) -> torch.Tensor:
        return clamped_swiglu.clamped_swiglu_ref(gate_up, clamped.alpha, clamped.limit)

    kinds: tuple[tuple[str, mixture.GatedActivation, mixture.GatedActivation, bool], ...] = (
        ("silu", gated_activation.silu_and_mul, gated_activation.silu_and_mul_ref, False),
        ("clamped swiglu, biases", clamped, clamped_exactly, True),
    )
    for kind, act, exact_act, has_bias in kinds:
        stack = mixture.ExpertStack(
            w13=random.randn(experts, 2 * inner, hidden, scale=hidden**-0.5),
            w2=random.randn(experts, hidden, inner, scale=inner**-0.5),
            b13=random.randn(experts, 2 * inner) if has_bias else None,
            b2=random.randn(experts, hidden) if has_bias else None,
            first=0,
            act=act,
        )
        for tokens in (3,) if s.small else (1, 30, 300, 3000):
            x = random.randn(tokens, hidden)
            weights, chosen = gpu_groups.route(random.randn(tokens, experts), chosen_each, normalizes=True)
            exact = _mixture_exactly(x, weights, chosen, stack, exact_act)
            name = f"{kind}, {tokens} tokens"
            yield name, error_of(gpu_mixture.mixture(x, weights, chosen, stack), exact), 2 * s.bound
            same = gpu_mixture.mixture(x, weights, chosen, stack, batch_invariant=True)
            yield f"{name}, invariant", error_of(same, exact), 2 * s.bound
            alone = gpu_mixture.mixture(x[-1:], weights[-1:], chosen[-1:], stack, batch_invariant=True)
            yield f"{name}, a token alone", differs(alone, same[-1:]), 0.5


def _mixture_exactly(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    stack: mixture.ExpertStack,
    act: mixture.GatedActivation,
) -> torch.Tensor:
    """In float64, one expert after the other."""
    wide, out = x.double(), torch.zeros_like(x, dtype=torch.float64)
    for expert in range(len(stack.w13)):
        token, place = torch.where(chosen == expert)
        b13 = None if stack.b13 is None else stack.b13[expert].double()
        b2 = None if stack.b2 is None else stack.b2[expert].double()
        inner = act(torch.nn.functional.linear(wide[token], stack.w13[expert].double(), b13))
        said = torch.nn.functional.linear(inner, stack.w2[expert].double(), b2)
        out.index_add_(0, token, said * weights[token, place].double().unsqueeze(1))
    return out


def check_routing(s: Setting) -> Found:
    random = _Random(s)
    for tokens, experts, count in ((5, 8, 2),) if s.small else ((300, 128, 8), (64, 32, 4), (7, 8, 2)):
        logits = random.floats(tokens, experts)
        weights, chosen = gpu_groups.route(logits, count, normalizes=True)
        exact_weights, exact_chosen = mixture.route_ref(logits.double(), count, normalizes=True)
        yield f"{tokens} of {count} from {experts}, experts", differs(chosen.long(), exact_chosen.long()), 0.5
        yield f"{tokens} of {count} from {experts}, weights", error_of(weights, exact_weights), 1e-5


def check_sampling(s: Setting) -> Found:
    random = _Random(s)
    num_rows, vocab_size = (6, 300) if s.small else (256, 151936)
    logits = random.floats(num_rows, vocab_size) * 3.0
    row = torch.arange(num_rows, device=s.device)
    temperature = torch.where(row % 3 == 0, 0.0, 0.6 + 0.1 * (row % 5)).float()
    top_k = torch.where(row % 4 == 1, 20, 0).to(torch.int32)
    top_p = torch.where(row % 5 == 2, 0.9, 1.0).float()
    min_p = torch.where(row % 7 == 3, 0.05, 0.0).float()
    seeds, positions = random.randint(-(2**62), 2**62, num_rows), random.randint(0, 5000, num_rows)
    params = (temperature, top_k, top_p, min_p, seeds, positions)
    expected = device_sampling.sample_on_device_ref(logits.cpu(), *(value.cpu() for value in params)).to(s.device)
    out = torch.full((num_rows,), -7, dtype=torch.int64, device=s.device)
    gpu_sampling.sample_on_device(logits, *params, out=out)
    # A draw that falls on the edge between two tokens may go to either: sums are done in another order.
    yield f"{num_rows} x {vocab_size}, other tokens", float((out != expected).float().mean()), 0.005
    greedy = temperature < sampling.GREEDY_EPS
    yield f"{num_rows} x {vocab_size}, greedy", differs(out[greedy], logits.argmax(1)[greedy]), 0.5
    spoilt = logits.clone()
    spoilt[0, 5] = float("nan")
    tokens = gpu_sampling.sample_on_device(spoilt, *params)
    yield "a row with NaN has none", float(int(tokens[0]) != sampling.NO_TOKEN), 0.5
    yield "its neighbours do not mind", differs(tokens[1:], out[1:]), 0.5


def check_logprobs(s: Setting) -> Found:
    random = _Random(s)
    num_rows, vocab_size, num_top = (3, 200, 4) if s.small else (64, 151936, 20)
    logits = random.floats(num_rows, vocab_size) * 3.0
    token_ids = random.randint(0, vocab_size, num_rows)
    chosen, ranks, top_ids, top_logprobs = gpu_logprobs.logprobs_on_device(logits, token_ids, num_top)
    exact = torch.log_softmax(logits.double(), dim=-1)
    picked = exact.gather(1, token_ids.unsqueeze(1))
    yield "of tokens", error_of(chosen, picked.squeeze(1)), 1e-5
    yield "of the likeliest", error_of(top_logprobs, exact.gather(1, top_ids.long())), 1e-5
    yield "the likeliest", differs(top_logprobs.double().sort(descending=True)[0], top_logprobs.double()), 0.5
    yield "ranks", differs(ranks.long(), (logits > logits.gather(1, token_ids.unsqueeze(1))).sum(1) + 1), 0.5


CHECKS: dict[str, Callable[[Setting], Found]] = {
    "rms_norm": check_rms_norm,
    "gated_activation": check_activation,
    "embedding": check_embedding,
    "rotary": check_rotary,
    "paged_attention": check_attention,
    "linear": check_linear,
    "linear_quantized": check_quantized_linear,
    "routing": check_routing,
    "mixture": check_mixture,
    "sampling": check_sampling,
    "logprobs": check_logprobs,
}


def rows(
    device: torch.device,
    *,
    dtypes: tuple[str, ...] = ("bfloat16", "float16"),
    seed: int = 0,
    small: bool = False,
    only: tuple[str, ...] = tuple(CHECKS),
) -> Iterator[dict[str, Any]]:
    """A row for each kernel and dtype: its worst case beside that case's bound, and what went wrong if anything did."""
    for dtype in dtypes:
        setting = Setting(device, getattr(torch, dtype), seed, small)
        for name in only:
            started = time.perf_counter()
            num_cases, worst, failures = 0, (0.0, "", 1.0), []
            try:
                for case, error, bound in CHECKS[name](setting):
                    num_cases += 1
                    if error / bound > worst[0] / worst[2] or not error <= bound:
                        worst = (error, case, bound)
                    if not error <= bound:
                        failures.append(f"{case}: {error:.2e}")
            except Exception as error:  # noqa: BLE001,RUF100 - one kernel's failure is a row, the others go on
                failures.append(f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")
            yield {
                "kernel": name,
                "shape": f"{num_cases} cases {dtype}",
                "ok": not failures and num_cases > 0,
                "error": worst[0],
                "bound": worst[2],
                "worst": worst[1],
                "failures": failures,
                "seconds": time.perf_counter() - started,
            }
