"""What the machine itself allows: how fast memory is read and matrices are multiplied, and what follows for a model."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open

_READ_BYTES = 512 * 1024**2  # far beyond any last-level cache
_STREAM_BYTES = 4 * 1024**2  # of a stream before the next set of streams begins
_NUM_STREAMS = 8
_LONG_S = 5.0
_PRODUCT = (512, 1024, 6144)  # rows, inputs, outputs: a prefill against the widest layer of a small model


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """Best figures of this machine, by the threads asked for.

    Attributes:
        read_gb_per_s: of weights that lie in huge pages, several streams a thread.
        read_one_stream_gb_per_s: the same memory from its beginning to its end.
        f32_tflop_per_s, bf16_tflop_per_s: `torch.mm` of random matrices.
    """

    num_threads: int
    read_gb_per_s: float
    read_one_stream_gb_per_s: float
    f32_tflop_per_s: float
    bf16_tflop_per_s: float


def measure_ceilings(num_threads: int, *, num_bytes: int = _READ_BYTES, repeats: int = 5) -> Ceilings:
    """Measure; takes a few seconds, and sets torch's threads while it does.

    Args:
        num_bytes: of memory to read, a multiple of 64 MiB for the stated number of streams; less reads less well.
        repeats: best of so many, as what disturbs only ever makes it slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            data = _random_floats(num_bytes)
            one_stream = num_bytes / _best_s(data.sum, repeats)
            return Ceilings(
                num_threads=num_threads,
                read_gb_per_s=max(one_stream, num_bytes / _best_s(_several_streams(data), repeats)) / 1e9,
                read_one_stream_gb_per_s=one_stream / 1e9,
                f32_tflop_per_s=_product_rate(torch.float32, repeats),
                bf16_tflop_per_s=_product_rate(torch.bfloat16, repeats),
            )
    finally:
        torch.set_num_threads(before)


def _random_floats(num_bytes: int) -> torch.Tensor:
    """Random numbers in huge pages where the system gives them; zeros might all be the same page, or compress."""
    memory = mmap.mmap(-1, num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).normal_(generator=torch.Generator().manual_seed(0))


def _several_streams(data: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Reads rows far from each other at once: a matrix times a vector walks several rows together."""
    width = max(1, min(_STREAM_BYTES // 4, data.numel() // _NUM_STREAMS))
    matrix = data[: data.numel() // width * width].view(-1, width)
    vector = torch.ones(width)
    return lambda: torch.mv(matrix, vector)


def _product_rate(dtype: torch.dtype, repeats: int) -> float:
    """TFLOP/s of a matrix product with random entries."""
    rows, inputs, outputs = _PRODUCT
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    w = torch.randn(inputs, outputs, generator=generator).to(dtype)
    # A CPU without instructions for the dtype can take half a minute for all rows.
    few = rows // 16
    seconds = _best_s(lambda: torch.mm(x[:few], w), 1) * (rows // few)
    if seconds < _LONG_S:
        seconds = _best_s(lambda: torch.mm(x, w), repeats)
    return 2 * rows * inputs * outputs / seconds / 1e12


def _best_s(run: Callable[[], object], repeats: int) -> float:
    run()  # threads, code and pages are there afterwards
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


class ModelTraffic(msgspec.Struct, frozen=True, kw_only=True):
    """What a step must read and multiply at least.

    Attributes:
        weight_bytes: read by each step, whatever its size; an embedding that is not the head's is only looked up.
        layer_weights: numbers in the layers, each multiplied once for each token; without embedding and head.
        kv_bytes_per_token: read for each token of context.
    """

    weight_bytes: float
    layer_weights: float
    kv_bytes_per_token: float

    def decode_ceiling(self, ceilings: Ceilings, concurrency: int, context: float) -> float:
        """Tokens a second that the read bandwidth allows at this mean context."""
        bytes_a_step = self.weight_bytes + concurrency * context * self.kv_bytes_per_token
        return concurrency * ceilings.read_gb_per_s * 1e9 / bytes_a_step

    def quantized(self, bits: float, head_bits: float, itemsize: int) -> ModelTraffic:
        """With weights that were floating, of `itemsize` bytes, quantised to so many bits, their scales included."""
        head_bytes = self.weight_bytes - self.layer_weights * itemsize
        return msgspec.structs.replace(
            self, weight_bytes=self.layer_weights * bits / 8 + head_bytes / itemsize * head_bits / 8
        )

    def prefill_ceiling(self, ceilings: Ceilings) -> float:
        """Tokens a second that the best matrix product allows; attention's own products not counted."""
        rate = max(ceilings.f32_tflop_per_s, ceilings.bf16_tflop_per_s)
        return rate * 1e12 / (2 * self.layer_weights)


_FLOATING = ("F32", "BF16", "F16", "F64", "F8_E4M3")
_INTEGER_BYTES = {"I64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # any other: 1


def model_traffic(folder: Path, *, itemsize: int, kv_bytes_per_token: float) -> ModelTraffic | None:
    """Traffic of a checkpoint in safetensors, from the headers of its files; None if there are none.

    Args:
        itemsize: bytes of a number once loaded; what is stored as an integer stays as it is.
    """
    weight_bytes = layer_weights = lookup_bytes = 0.0
    has_head = False
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                count = 1
                for size in part.get_shape():
                    count *= size
                kind = part.get_dtype()
                num_bytes = count * (itemsize if kind in _FLOATING else _INTEGER_BYTES.get(kind, 1))
                weight_bytes += num_bytes
                if "embed_tokens" in name or ".wte." in name:
                    lookup_bytes += num_bytes
                elif "lm_head" in name:
                    has_head = True
                elif len(part.get_shape()) == 2:
                    layer_weights += count
    if not weight_bytes:
        return None
    return ModelTraffic(
        weight_bytes=weight_bytes - (lookup_bytes if has_head else 0.0),
        layer_weights=layer_weights,
        kv_bytes_per_token=kv_bytes_per_token,
    )
