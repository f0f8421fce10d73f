"""What the small kernels take on a GPU: norms, rotary embedding, activations, embedding, sampling, log-probabilities.

Inputs take turns, and the L2 cache is overwritten before each round of them, so that no call finds there what an
earlier one read. A row says how many bytes a call must move at least, so that whoever knows the bandwidth can say what
share of it was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton

from ..kv_quantization import row_width
from . import embedding, gated_activation, logprobs, rms_norm, rotary, sampling
from .cases import Case, OnCase, Row, rows_of
from .device_time import Timed

BEYOND_L2 = 256 * 1024**2  # bytes that take turns: several times an H200's 60 MB
_MOST_TURNS = 32
_HIDDEN_SIZES = {"0.6B": 1024, "8B": 4096}
_INTERMEDIATE_SIZES = {"0.6B": 3072, "8B": 12288}
_HEADS = {"0.6B": (16, 8), "8B": (32, 8)}  # queries, keys; 128 wide
_VOCAB_SIZE = 151_936
_NUM_TOKENS = (1, 256, 8192)

Call = Callable[[], object]


def cold_time(calls: list[Call]) -> Timed:
    """Time of a call that finds nothing in the cache; `calls` do the same on other data and take turns.

    All of them in one CUDA graph, whose replays are timed: else what starting a short kernel costs would be measured.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # compiles
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    tenths = triton.testing.do_bench(graph.replay, warmup=10, rep=50, quantiles=[0.5, 0.1, 0.9])
    us, low_us, high_us = (float(ms) * 1e3 / len(calls) for ms in tenths)
    return Timed(us, low_us=low_us, high_us=high_us)


def _case(name: str, shape: str, num_bytes: int, make: Callable[[], Call]) -> Case:
    """Time `make()()`, with as many inputs as do not fit the cache."""
    turns = min(_MOST_TURNS, max(2, -(-BEYOND_L2 // num_bytes)))

    def run() -> list[Row]:
        return [{**cold_time([make() for _ in range(turns)]).figures, "bytes": num_bytes}]

    return Case({"kernel": name, "shape": shape}, run)


def _norms(device: torch.device) -> Iterator[Case]:
    for model, hidden_size in _HIDDEN_SIZES.items():
        for num_tokens in _NUM_TOKENS:

            def make(num_tokens: int = num_tokens, hidden_size: int = hidden_size) -> Call:
                x, residual = (torch.randn(num_tokens, hidden_size, device=device).bfloat16() for _ in range(2))
                weight = torch.ones(hidden_size, device=device, dtype=torch.bfloat16)
                return lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-6)

            yield _case("add_rms_norm", f"{model} {num_tokens}x{hidden_size}", 8 * num_tokens * hidden_size, make)


def _activations(device: torch.device) -> Iterator[Case]:
    for model, size in _INTERMEDIATE_SIZES.items():
        for num_tokens in _NUM_TOKENS:

            def make(num_tokens: int = num_tokens, size: int = size) -> Call:
                gate_up = torch.randn(num_tokens, 2 * size, device=device).bfloat16()
                return lambda: gated_activation.silu_and_mul(gate_up)

            yield _case("silu_and_mul", f"{model} {num_tokens}x{size}", 6 * num_tokens * size, make)


def _embeddings(device: torch.device) -> Iterator[Case]:
    weight = torch.randn(_VOCAB_SIZE, _HIDDEN_SIZES["8B"], device=device, dtype=torch.bfloat16)
    for num_tokens in _NUM_TOKENS:

        def make(num_tokens: int = num_tokens) -> Call:
            ids = torch.randint(_VOCAB_SIZE, (num_tokens,), device=device)
            return lambda: embedding.embed(ids, weight)

        yield _case("embed", f"8B {num_tokens}x{weight.shape[1]}", 4 * num_tokens * weight.shape[1], make)


def _rotaries(device: torch.device) -> Iterator[Case]:
    head_dim, block_size = 128, 16
    table = torch.randn(40960, head_dim, device=device)
    weight = torch.ones(head_dim, device=device, dtype=torch.bfloat16)
    for model, (num_heads, num_kv_heads) in _HEADS.items():
        for num_tokens in _NUM_TOKENS:
            for cache_dtype in (torch.bfloat16, torch.float8_e4m3fn):
                width = row_width(head_dim, cache_dtype)

                def make(
                    num_tokens: int = num_tokens,
                    num_heads: int = num_heads,
                    num_kv_heads: int = num_kv_heads,
                    width: int = width,
                    cache_dtype: torch.dtype = cache_dtype,
                ) -> Call:
                    sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
                    fused = torch.randn(num_tokens, sum(sizes), device=device).bfloat16()
                    q, k, v = (x.view(num_tokens, -1, head_dim) for x in torch.split(fused, sizes, dim=-1))
                    shape = (-(-num_tokens // block_size), num_kv_heads, block_size, width)
                    caches = [torch.zeros(shape, dtype=torch.uint8, device=device).to(cache_dtype) for _ in range(2)]
                    slots = torch.randperm(shape[0] * block_size, device=device)[:num_tokens]
                    positions = torch.randint(len(table), (num_tokens,), device=device)
                    return lambda: rotary.rotary_and_write(
                        *(q, k, v, table, positions, caches[0], caches[1], slots),
                        q_weight=weight,
                        k_weight=weight,
                    )

                # Queries and keys are read and written, values read; the caches written.
                moved = 4 * (num_heads + num_kv_heads) * head_dim + 2 * num_kv_heads * head_dim
                moved += 2 * num_kv_heads * width * cache_dtype.itemsize + 4 * head_dim
                name = "rotary_and_write" if cache_dtype is torch.bfloat16 else "rotary_and_write fp8"
                yield _case(name, f"{model} {num_tokens}x({num_heads}+{num_kv_heads})x128", num_tokens * moved, make)


SAMPLING_MIXES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50 top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
}


def _sampling_call(device: torch.device, num_rows: int, scale: float, mix: dict[str, float]) -> Call:
    logits = torch.randn(num_rows, _VOCAB_SIZE, device=device) * scale
    temperature = torch.full((num_rows,), mix.get("temperature", 0.6), device=device)
    top_k = torch.full((num_rows,), int(mix.get("top_k", 0)), dtype=torch.int32, device=device)
    top_p = torch.full((num_rows,), mix.get("top_p", 1.0), device=device)
    min_p = torch.full((num_rows,), mix.get("min_p", 0.0), device=device)
    seeds = torch.randint(1 << 62, (num_rows,), device=device)
    positions = torch.arange(num_rows, device=device)
    filtered = any(name in mix for name in ("top_k", "top_p", "min_p"))
    return lambda: sampling.sample_on_device(
        logits, temperature, top_k, top_p, min_p, seeds, positions, filtered=filtered
    )


def _samplings(device: torch.device) -> Iterator[Case]:
    for num_rows in (1, 256):
        for name, mix in SAMPLING_MIXES.items():
            # Flat, as random logits are, where a top-p keeps tens of thousands; and peaked, as a model's are.
            for kind, scale in (("flat", 0.6), ("peaked", 3.0)):

                def make(num_rows: int = num_rows, scale: float = scale, mix: dict[str, float] = mix) -> Call:
                    return _sampling_call(device, num_rows, scale, mix)

                # Read once where nothing is filtered, else twice.
                reads = 2 if {"top_k", "top_p", "min_p"} & mix.keys() else 1
                num_bytes = 4 * num_rows * _VOCAB_SIZE * reads
                yield _case(f"sample {name}", f"{num_rows}x{_VOCAB_SIZE} {kind}", num_bytes, make)


def _logprobs(device: torch.device) -> Iterator[Case]:
    for num_rows in (1, 256):
        for num_top in (0, 20):

            def make(num_rows: int = num_rows, num_top: int = num_top) -> Call:
                logits = torch.randn(num_rows, _VOCAB_SIZE, device=device)
                token_ids = torch.randint(_VOCAB_SIZE, (num_rows,), device=device)
                return lambda: logprobs.logprobs_on_device(logits, token_ids, num_top)

            yield _case(f"logprobs top {num_top}", f"{num_rows}x{_VOCAB_SIZE}", 4 * num_rows * _VOCAB_SIZE, make)


def rows(
    device: torch.device, *, first_case: int = 0, on_case: OnCase = lambda _number, _of, _what: None
) -> Iterator[Row]:
    """Time everything on a CUDA device.

    Yields:
        Of each case its `kernel`, `shape`, `us`, the median, and `bytes`, the fewest that it must move.
    """
    parts = (_samplings, _logprobs, _rotaries, _norms, _activations, _embeddings)
    cases = [case for part in parts for case in part(device)]
    with torch.cuda.device(device):
        yield from rows_of(cases, device, first=first_case, on_case=on_case)
