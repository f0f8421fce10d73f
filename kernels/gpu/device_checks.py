"""Every kernel against its meaning in float64, on whatever device: fresh random inputs, outputs that are poisoned.

CI proves the same in Triton's interpreter and in more cases; what only a device can show is bfloat16 (which the
interpreter gets wrong), what the compiler made of the code, and races. `small` sizes are for the interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from .. import device_sampling, gated_activation, rms_norm, rotary, sampling
from ..embedding import embed_ref
from ..kv_quantization import is_quantized, quantize_ref, row_width
from . import embedding as gpu_embedding
from . import gated_activation as gpu_activation
from . import logprobs as gpu_logprobs
from . import rms_norm as gpu_rms_norm
from . import rotary as gpu_rotary
from . import sampling as gpu_sampling
from .cases import Case, OnCase, Row, rows_of
from .check_attention import check_attention
from .check_logit_processing import check_logit_processing
from .check_mixture_codes import check_mixture_codes
from .check_products import check_fp8_linear, check_linear, check_mixture, check_quantized_linear, check_routing
from .check_setting import Found, Random, Setting, differs, error_of, share_that_differs
from .kv_write import write_kv


def check_rms_norm(s: Setting) -> Found:
    random = Random(s)
    for tokens, hidden in ((3, 64), (5, 100)) if s.small else ((1, 4096), (300, 1024), (7, 80), (64, 5120)):
        x, residual, weight = random.randn(tokens, hidden), random.randn(tokens, hidden), random.randn(hidden)
        exact = rms_norm.rms_norm_ref(x.double(), weight.double(), 1e-6)
        yield f"{tokens}x{hidden}", error_of(gpu_rms_norm.rms_norm(x, weight, 1e-6), exact), s.bound
        summed = (x.double() + residual.double()).to(s.dtype)
        after = residual.clone()
        out = gpu_rms_norm.add_rms_norm(x, after, weight, 1e-6)
        exact = rms_norm.rms_norm_ref(summed.double(), weight.double(), 1e-6)
        error = max(error_of(out, exact), error_of(after, summed.double()))
        yield f"{tokens}x{hidden} with residual", error, s.bound


def check_activation(s: Setting) -> Found:
    random = Random(s)
    for tokens, inner in ((3, 40),) if s.small else ((1, 12288), (300, 3072), (7, 100)):
        gate_up = random.randn(tokens, 2 * inner)
        exact = gated_activation.silu_and_mul_ref(gate_up.double())
        yield f"silu {tokens}x{inner}", error_of(gpu_activation.silu_and_mul(gate_up), exact), s.bound
        exact = gated_activation.gelu_tanh_and_mul_ref(gate_up.double())
        yield f"gelu {tokens}x{inner}", error_of(gpu_activation.gelu_tanh_and_mul(gate_up), exact), s.bound


def check_embedding(s: Setting) -> Found:
    random = Random(s)
    weight = random.randn(50 if s.small else 151936, 48 if s.small else 1024)
    ids = random.randint(0, weight.shape[0], 9 if s.small else 300)
    ids[2], ids[5] = -1, weight.shape[0]  # of padding
    yield "ids beyond both ends", differs(gpu_embedding.embed(ids, weight), embed_ref(ids, weight)), 0.5


def check_rotary(s: Setting) -> Found:
    random = Random(s)
    tokens = 5 if s.small else 200
    cases = ((4, 2, 16, True),) if s.small else ((16, 8, 128, True), (32, 8, 128, False))
    for heads, kv_heads, width, has_norm in cases:
        q, k, v = (random.randn(tokens, count, width) for count in (heads, kv_heads, kv_heads))
        table = torch.randn(1000, width, device=s.device, generator=random.generator)
        positions = random.randint(0, 1000, tokens)
        q_weight, k_weight = (random.randn(width), random.randn(width)) if has_norm else (None, None)
        slots = torch.randperm(8 * 32, device=s.device, generator=random.generator)[:tokens]
        slots[1] = -1
        caches = [torch.full((8, kv_heads, 32, width), float("nan"), dtype=s.dtype, device=s.device) for _ in range(2)]
        exact_caches = [cache.double() for cache in caches]
        exact = [x.double() for x in (q, k, v)]
        if s.computes:
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
            differs(cache.isnan(), right.isnan()) for cache, right in zip(caches, exact_caches, strict=True)
        )
        yield f"{name}, other slots", untouched, 0.5
        written = max(
            error_of(cache.nan_to_num(), right.nan_to_num()) for cache, right in zip(caches, exact_caches, strict=True)
        )
        yield f"{name}, cache", written, s.bound


def check_kv_write(s: Setting) -> Found:
    """Written rows bit for bit, quantised ones too; by the kernel of its own and behind the rotation."""
    random = Random(s)
    tokens, kv_heads, width, block_size = (5, 2, 16, 4) if s.small else (300, 8, 128, 16)
    num_blocks = -(-tokens // block_size) + 2
    slots = torch.randperm(num_blocks * block_size, device=s.device, generator=random.generator)[:tokens]
    table = torch.cat((torch.ones(9, width // 2), torch.zeros(9, width // 2)), dim=1).to(s.device)  # turns nothing
    positions = random.randint(0, 9, tokens)
    for cache_dtype in (s.dtype, torch.float8_e4m3fn, torch.int8):
        q, k, v = (random.randn(tokens, kv_heads, width) for _ in range(3))
        shape = (num_blocks, kv_heads, block_size, row_width(width, cache_dtype))
        for way in ("alone", "rotary"):
            caches = [torch.full(shape, 77, dtype=torch.int8, device=s.device).to(cache_dtype) for _ in range(2)]
            if way == "alone":
                write_kv(k, v, caches[0], caches[1], slots)
            else:
                gpu_rotary.rotary_and_write(q, k.clone(), v, table, positions, caches[0], caches[1], slots)
            rows = [quantize_ref(x, cache_dtype) if is_quantized(cache_dtype) else x for x in (k, v)]
            for cache, right in zip(caches, rows, strict=True):
                stored = cache.view(torch.uint8).transpose(1, 2).flatten(0, 1).index_select(0, slots)
                yield f"{str(cache_dtype)[6:]} {way}", differs(stored, right.contiguous().view(torch.uint8)), 0.5


def check_sampling(s: Setting) -> Found:
    random = Random(s)
    num_rows, vocab_size = (6, 300) if s.small else (256, 151936)
    logits = random.floats(num_rows, vocab_size) * 3.0
    row = torch.arange(num_rows, device=s.device)
    temperature = torch.where(row % 3 == 0, 0.0, 0.6 + 0.1 * (row % 5)).float()
    top_k = torch.where(row % 4 == 1, 20, 0).to(torch.int32)
    top_p = torch.where(row % 5 == 2, 0.9, 1.0).float()
    min_p = torch.where(row % 7 == 3, 0.05, 0.0).float()
    seeds, positions = random.randint(-(2**62), 2**62, num_rows), random.randint(0, 5000, num_rows)
    params = (temperature, top_k, top_p, min_p, seeds, positions)
    out = torch.full((num_rows,), -7, dtype=torch.int64, device=s.device)
    gpu_sampling.sample_on_device(logits, *params, out=out)
    expected = out
    if s.computes:
        expected = device_sampling.sample_on_device_ref(logits.cpu(), *(value.cpu() for value in params)).to(s.device)
    # A draw that falls on the edge between two tokens may go to either: sums are done in another order.
    yield f"{num_rows} x {vocab_size}, other tokens", share_that_differs(out, expected), 0.005
    greedy = temperature < sampling.GREEDY_EPS
    yield f"{num_rows} x {vocab_size}, greedy", differs(out.where(greedy, 0), logits.argmax(1).where(greedy, 0)), 0.5
    spoilt = logits.clone()
    spoilt[0, 5] = float("nan")
    tokens = gpu_sampling.sample_on_device(spoilt, *params)
    yield "a row with NaN has none", differs(tokens[:1], torch.full_like(tokens[:1], sampling.NO_TOKEN)), 0.5
    yield "its neighbours do not mind", differs(tokens[1:], out[1:]), 0.5


def check_logprobs(s: Setting) -> Found:
    random = Random(s)
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
    "kv_write": check_kv_write,
    "paged_attention": check_attention,
    "linear": check_linear,
    "linear_quantized": check_quantized_linear,
    "linear_fp8": check_fp8_linear,
    "routing": check_routing,
    "mixture": check_mixture,
    "mixture_codes": check_mixture_codes,
    "logit_processing": check_logit_processing,
    "sampling": check_sampling,
    "logprobs": check_logprobs,
}


_OF_FLOATS = ("sampling", "logprobs", "logit_processing", "routing")
"""Read float32 whatever the dtype of a model: once is enough."""


def rows(
    device: torch.device,
    *,
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    seed: int = 0,
    small: bool = False,
    only: Sequence[str] = tuple(CHECKS),
    first_case: int = 0,
    on_case: OnCase = lambda _number, _of, _what: None,
) -> Iterator[Row]:
    """A row for each case as soon as it is known: its error beside its bound, and what went wrong if anything did.

    Raises:
        DeviceLostError: a check took the device with it; the others are for another process, from the case after on.
    """
    cases = [
        Case(
            {"kernel": name, "dtype": dtype, "shape": dtype, "error": 0.0, "bound": 1.0, "ok": False},
            partial(_rows_of, name, dtype, Setting(device, getattr(torch, dtype), seed, small)),
        )
        for number, dtype in enumerate(dtypes)
        for name in only
        if not number or name not in _OF_FLOATS
    ]
    for row in rows_of(cases, device, first=first_case, on_case=on_case):
        yield row if "failures" in row else {**row, "failures": [row["note"]]}


def _rows_of(name: str, dtype: str, setting: Setting) -> Iterator[Row]:
    num_cases, started = 0, time.perf_counter()
    for case, error, bound in CHECKS[name](setting):
        num_cases += 1
        ok = error <= bound  # NaN is wrong too
        yield {
            "shape": f"{case}, {dtype}",
            "error": error,
            "bound": bound,
            "ok": ok,
            "failures": [] if ok else [f"{case}: {error:.2e}"],
            "seconds": time.perf_counter() - started,
        }
        started = time.perf_counter()
    if not num_cases:
        yield {"failures": ["no case"]}
