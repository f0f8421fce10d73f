"""Compare the C kernels with torch on this CPU: `python -m octavo.kernels.bench_cpu [--threads N] [--repeats N]`.

With `--weights` it compares bfloat16 weights with int8 and int4 ones instead: all linear layers of one step.
With `--kv` it compares dtypes of the KV cache: one layer's attention.
With `--products` it compares ways to multiply a bfloat16 layer with torch's, and with the processor's multipliers.

Prints medians in microseconds and torch / C. The shapes are those of Qwen3-0.6B (16 heads, 8 KV heads, head_dim 128,
hidden 1024, intermediate 3072). The two sides take turns, so that load from elsewhere falls on both.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from . import cpu_build, huge_pages
from .attention_batch import AttentionBatch
from .attention_kind import AttentionKind
from .gated_activation import silu_and_mul, silu_and_mul_ref
from .kv_quantization import row_width
from .linear_dense import linear_dense, linear_dense_quick
from .linear_quantized import linear_quantized
from .linear_rounded import RoundedWeight, linear_rounded, round_weight
from .paged_attention import paged_attention, paged_attention_ref, write_kv
from .quantized_weight import LinearWeight, QuantizedWeight
from .rms_norm import rms_norm, rms_norm_ref
from .rotary import rotary_and_write, rotary_and_write_ref
from .weight_quantization import quantize

_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, _BLOCK_SIZE = 16, 8, 128, 16
_KIND = AttentionKind(_HEAD_DIM**-0.5)
_HIDDEN, _INTERMEDIATE = 1024, 3072
_MEASURED_NS = 1_000_000  # short operations are repeated until a measurement takes about this long
_NUM_LAYERS = 28
_BITS_AND_GROUP = {"int8": (8, 64), "int4": (4, 32)}  # as `--quantization` makes them
_LINEARS = {
    "qkv": (4096, _HIDDEN),
    "o": (_HIDDEN, 2048),
    "gate_up": (2 * _INTERMEDIATE, _HIDDEN),
    "down": (_HIDDEN, _INTERMEDIATE),
    "lm_head": (151936, _HIDDEN),
}


def main() -> None:
    """Run all comparisons and print a table."""
    parser = argparse.ArgumentParser(prog="python -m octavo.kernels.bench_cpu", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--weights", action="store_true", help="compare kinds of weights; 2.5 GB")
    parser.add_argument("--kv", action="store_true", help="compare dtypes of the KV cache")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32], help="for --weights")
    parser.add_argument("--products", action="store_true", help="GFLOP/s of one thread by the number of rows")
    args = parser.parse_args()
    kernels = cpu_build.library()
    if kernels is None:
        raise SystemExit("there is no C library to compare: see the log line above")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.weights:
        _weights(args.rows, args.repeats)
        return
    if args.products:
        _products(kernels, (1, 2, 4, 8, 16, 32, 64, 128, 512), args.repeats)
        return
    if args.kv:
        for num_rows, context in ((8, 192), (8, 2048)):
            _kv_dtypes(num_rows, context, args.repeats)
        return
    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {args.repeats}, us")
    print(f"{'what':44} {'torch':>10} {'C':>10} {'torch/C':>8}")
    for dtype in (torch.bfloat16, torch.float32):
        for num_rows, context, num_new in ((8, 192, 1), (32, 192, 1), (8, 2048, 1), (1, 512, 512)):
            _attention(num_rows, context, num_new, dtype, args.repeats)
        for num_tokens in (1, 32):
            _token_operations(num_tokens, dtype, args.repeats)
    for name, (out_features, in_features) in _LINEARS.items():
        for num_tokens in (1, 8, 32, 128, 512):
            _linear(name, out_features, in_features, num_tokens, args.repeats)


def _report(name: str, theirs: Callable[[], object], ours: Callable[[], object], repeats: int) -> None:
    times: tuple[list[int], list[int]] = ([], [])
    theirs()
    ours()
    start = time.perf_counter_ns()
    ours()
    num_calls = max(1, _MEASURED_NS // max(1, time.perf_counter_ns() - start))
    for _ in range(repeats):
        for operation, taken in zip((theirs, ours), times, strict=True):
            start = time.perf_counter_ns()
            for _ in range(num_calls):
                operation()
            taken.append((time.perf_counter_ns() - start) // num_calls)
    torch_us, c_us = (statistics.median(taken) / 1000 for taken in times)
    print(f"{name:44} {torch_us:10.1f} {c_us:10.1f} {torch_us / c_us:8.2f}", flush=True)


def _kv_dtypes(num_rows: int, context: int, repeats: int) -> None:
    """Time one layer's decode attention over caches of each dtype, in turn; prints medians of CPU time in us."""
    blocks_per_row = context // _BLOCK_SIZE
    num_blocks = num_rows * blocks_per_row
    batch = AttentionBatch(
        query_start=torch.arange(num_rows + 1, dtype=torch.int32),
        context_lens=torch.full((num_rows,), context, dtype=torch.int32),
        block_tables=torch.arange(num_blocks).view(num_rows, blocks_per_row).int(),
        slot_mapping=torch.arange(num_rows * context),
        block_size=_BLOCK_SIZE,
        max_query_len=1,
        max_context_len=context,
        num_decodes=num_rows,
    )
    k, v = torch.randn(2, num_rows * context, _NUM_KV_HEADS, _HEAD_DIM).unbind()
    q = torch.randn(num_rows, _NUM_HEADS, _HEAD_DIM)
    operands = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        compute = dtype if dtype is torch.float32 else torch.bfloat16
        shape = (num_blocks, _NUM_KV_HEADS, _BLOCK_SIZE, row_width(_HEAD_DIM, dtype))
        k_cache, v_cache = (torch.zeros(shape).to(dtype) for _ in range(2))
        write_kv(k.to(compute), v.to(compute), k_cache, v_cache, batch.slot_mapping)
        operands[dtype] = (q.to(compute), k_cache, v_cache)
    times: dict[torch.dtype, list[int]] = {dtype: [] for dtype in operands}
    for _ in range(repeats):
        for dtype, (query, k_cache, v_cache) in operands.items():
            started = time.thread_time_ns()
            paged_attention(query, k_cache, v_cache, batch, _KIND)
            times[dtype].append(time.thread_time_ns() - started)
    taken = (f"{str(dtype)[6:]} {statistics.median(some) / 1000:,.0f}" for dtype, some in times.items())
    print(f"attention {num_rows}x{context}, CPU us: {', '.join(taken)}", flush=True)


def _attention(num_rows: int, context: int, num_new: int, dtype: torch.dtype, repeats: int) -> None:
    blocks_per_row = -(-context // _BLOCK_SIZE)
    num_blocks = num_rows * blocks_per_row
    k_cache, v_cache = torch.randn(2, num_blocks, _NUM_KV_HEADS, _BLOCK_SIZE, _HEAD_DIM).to(dtype).unbind()
    q = torch.randn(num_rows * num_new, _NUM_HEADS, _HEAD_DIM).to(dtype)
    batch = AttentionBatch(
        query_start=torch.arange(num_rows + 1, dtype=torch.int32) * num_new,
        context_lens=torch.full((num_rows,), context, dtype=torch.int32),
        block_tables=torch.randperm(num_blocks).view(num_rows, blocks_per_row).int(),
        slot_mapping=torch.zeros(num_rows * num_new, dtype=torch.int64),  # not read: nothing is written
        block_size=_BLOCK_SIZE,
        max_query_len=num_new,
        max_context_len=context,
        num_decodes=num_rows if num_new == 1 else 0,
    )
    _report(
        f"attention {num_rows}x{context}, {num_new} new, {dtype}",
        lambda: paged_attention_ref(q, k_cache, v_cache, batch, _KIND),
        lambda: paged_attention(q, k_cache, v_cache, batch, _KIND),
        repeats,
    )


def _token_operations(num_tokens: int, dtype: torch.dtype, repeats: int) -> None:
    x, weight = torch.randn(num_tokens, _HIDDEN).to(dtype), torch.ones(_HIDDEN, dtype=dtype)
    suffix = f"{num_tokens} tokens, {dtype}"
    _report(f"rms_norm {suffix}", lambda: rms_norm_ref(x, weight, 1e-6), lambda: rms_norm(x, weight, 1e-6), repeats)
    gate_up = torch.randn(num_tokens, 2 * _INTERMEDIATE).to(dtype)
    _report(f"silu_and_mul {suffix}", lambda: silu_and_mul_ref(gate_up), lambda: silu_and_mul(gate_up), repeats)
    q, k, v = (torch.randn(num_tokens, heads, _HEAD_DIM).to(dtype) for heads in (_NUM_HEADS, *[_NUM_KV_HEADS] * 2))
    table, positions = torch.randn(num_tokens, _HEAD_DIM), torch.arange(num_tokens)
    k_cache, v_cache = torch.zeros(2, num_tokens, _NUM_KV_HEADS, _BLOCK_SIZE, _HEAD_DIM, dtype=dtype).unbind()
    gain = torch.ones(_HEAD_DIM, dtype=dtype)
    arguments = (q, k, v, table, positions, k_cache, v_cache, positions)
    _report(
        f"qk norm, rotary and write {suffix}",
        lambda: rotary_and_write_ref(*arguments, q_weight=gain, k_weight=gain),
        lambda: rotary_and_write(*arguments, q_weight=gain, k_weight=gain),
        repeats,
    )


def _linear(name: str, out_features: int, in_features: int, num_tokens: int, repeats: int) -> None:
    x, weight = torch.randn(num_tokens, in_features).bfloat16(), torch.randn(out_features, in_features).bfloat16()
    shape = f"{name} {out_features}x{in_features}, {num_tokens} tokens"
    if num_tokens == 1 or (num_tokens <= 32 and out_features < 100000):  # the others take seconds a repeat
        _report(f"{shape}, bf16", lambda: F.linear(x, weight), lambda: linear_dense(x, weight), repeats)
    if num_tokens > 32 and out_features > 100000:  # a head sees no more rows than there are requests
        return
    x32, weight32 = x.float(), weight.float()
    _report(f"{shape}, torch in f32", lambda: F.linear(x32, weight32), lambda: linear_dense(x, weight), repeats)


def _products(kernels: ctypes.CDLL, nums_rows: Sequence[int], repeats: int) -> None:
    """Time the widest layer on one thread, its weights from memory; prints medians in GFLOP/s of CPU time.

    The processor's own is of as many independent multiply-adds as fill it, timed in turn with the others: where it is
    lower, somebody else was on the core.
    """
    torch.set_num_threads(1)
    kernels.octavo_multiply_adds.argtypes, kernels.octavo_multiply_adds.restype = (ctypes.c_int64,), ctypes.c_float
    rounds, flops_a_round = 2_000_000, 12 * 2 * kernels.octavo_vector_lanes()
    out_features, in_features = _LINEARS["gate_up"]
    weights = [
        huge_pages.place([torch.randn(out_features, in_features).mul_(0.03).bfloat16()], torch.bfloat16)
        for _ in range(8)  # more than a last-level cache holds
    ]
    wide, stored = weights[0].float(), [round_weight(weight) for weight in weights]
    ways: dict[str, Callable[[torch.Tensor], object]] = {
        "bfloat16": lambda x: [linear_dense(x, weight) for weight in weights],
        "quick": lambda x: [linear_dense_quick(x, weight) for weight in weights],
        "stored rounded": lambda x: [linear_rounded(x, weight) for weight in stored if weight is not None],
        "torch, bfloat16": lambda x: [F.linear(x, weight) for weight in weights],
        "torch, float32": lambda x: [F.linear(x.float(), wide) for _ in weights],
    }
    if None in stored:  # the processor multiplies in floats
        del ways["stored rounded"]
    print(f"linear {out_features}x{in_features}, GFLOP/s of CPU time on one thread, median of {repeats}")
    print(f"{'rows':>4} {'processor':>10}" + "".join(f"{name:>18}" for name in ways))
    for num_rows in nums_rows:
        x = torch.randn(num_rows, in_features).bfloat16()
        flops = len(weights) * 2 * num_rows * out_features * in_features
        rates: dict[str, list[float]] = {name: [] for name in ways}
        mosts = []
        for _ in range(repeats):
            started = time.thread_time_ns()
            kernels.octavo_multiply_adds(rounds)
            mosts.append(rounds * flops_a_round / (time.thread_time_ns() - started))
            for name, multiply in ways.items():
                started = time.thread_time_ns()
                multiply(x)
                rates[name].append(flops / (time.thread_time_ns() - started))
        most = statistics.median(mosts)
        medians = [statistics.median(some) for some in rates.values()]
        print(
            f"{num_rows:>4} {most:>10.1f}" + "".join(f"{rate:>10.1f} ({rate / most:5.2f})" for rate in medians),
            flush=True,
        )


def _weights(nums_rows: list[int], repeats: int) -> None:
    """Time all linear layers of a step with weights of each kind, in turn.

    Prints medians in ms, CPU time of the calling thread and so of one thread only, and bfloat16's over each.
    """
    random = {name: torch.randn(shape).mul_(0.03).bfloat16() for name, shape in _LINEARS.items()}
    head = random.pop("lm_head")
    int8_head = quantize(head, bits=8, group_size=64)  # with int4 as well
    layers = [weight for _ in range(_NUM_LAYERS) for weight in random.values()]
    kinds: dict[str, list[LinearWeight]] = {
        "bfloat16": [round_weight(weight) or huge_pages.place([weight], torch.bfloat16) for weight in (*layers, head)]
    }
    for kind, (bits, group_size) in _BITS_AND_GROUP.items():
        kinds[kind] = [*(quantize(weight, bits=bits, group_size=group_size) for weight in layers), int8_head]
    print(
        f"linear layers of a step, CPU ms, median of {repeats}\n{'rows':>4}" + "".join(f"{kind:>18}" for kind in kinds)
    )
    for num_rows in nums_rows:
        inputs = {size: torch.randn(num_rows, size).bfloat16() for _, size in _LINEARS.values()}
        times: dict[str, list[int]] = {kind: [] for kind in kinds}
        for _ in range(repeats):
            for kind, weights in kinds.items():
                started = time.thread_time_ns()
                for weight in weights:
                    if isinstance(weight, QuantizedWeight):
                        linear_quantized(inputs[weight.in_features], weight, quick=True)
                    elif isinstance(weight, RoundedWeight):
                        linear_rounded(inputs[weight.shape[1]], weight)
                    elif isinstance(weight, torch.Tensor):
                        linear_dense_quick(inputs[weight.shape[1]], weight)
                times[kind].append(time.thread_time_ns() - started)
        taken = {kind: statistics.median(some) / 1e6 for kind, some in times.items()}
        row = "".join(f"{ms:10.1f} ({taken['bfloat16'] / ms:4.2f}x)" for ms in taken.values())
        print(f"{num_rows:>4}{row}", flush=True)


if __name__ == "__main__":
    main()
