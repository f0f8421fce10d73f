"""GPUs by name: what a step-time model and a budget of memory need to know of them.

Rates are the vendors' dense figures (no 2:4 sparsity). Memory is what the driver reports, which is less than the number
on the box. Consumer cards are listed with float32 accumulation, which inference uses.

Sources: NVIDIA data sheets of A100, H100, H200, HGX B200, L4, L40S, A10, T4, RTX A6000, the Ada and Blackwell
architecture white papers (RTX 4090, RTX 5090, RTX PRO 6000); AMD data sheets of MI300X and MI325X.
"""

from __future__ import annotations

import difflib
import math

import msgspec

from ...messages.errors import InvalidConfigError

_MIB = 1 << 20


class GpuSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of GPU.

    Attributes:
        memory_bytes: total that the driver reports.
        num_sms: streaming multiprocessors (compute units), among which a kernel's blocks of work are dealt out.
        bandwidth: of its memory, bytes/s.
        bf16_flops: dense, per second; float16 is the same.
        fp8_flops: dense, per second; 0: no fp8 units, such weights are computed in bf16.
        link_bandwidth: to another GPU of the node, bytes/s each way.
        link_latency_ns: of one small all-reduce between two of them.
        price_per_hour: US dollars on demand. A round default among RunPod's and Lambda Cloud's public lists of 2025 and
            early 2026 (an H100 SXM 2.69 to 2.99, an H200 3.59, a B200 about 5.9); prices move, so pass your own where
            money decides.
    """

    name: str
    memory_bytes: int
    num_sms: int
    bandwidth: float
    bf16_flops: float
    fp8_flops: float
    link_bandwidth: float
    link_latency_ns: int
    price_per_hour: float

    def __post_init__(self) -> None:
        for field in ("memory_bytes", "num_sms", "bandwidth", "bf16_flops", "link_bandwidth"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{field}={value} of GPU {self.name} must be a number above 0")
        for field in ("fp8_flops", "link_latency_ns", "price_per_hour"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{field}={value} of GPU {self.name} must be a number from 0 up")

    def flops(self, dtype: str) -> float:
        """FLOP/s of matrix products with weights of `dtype` (names as in `model_shape.BITS`).

        float32 is taken as a sixteenth of bf16: the ratio of A100 and, nearly, of H100, whose units for it are the
        ordinary ones. Integer weights are widened to bf16.
        """
        if dtype == "float32":
            return self.bf16_flops / 16
        if dtype == "fp8" and self.fp8_flops:
            return self.fp8_flops
        return self.bf16_flops


# name, memory MiB, SMs, GB/s, bf16 and fp8 TFLOP/s, link GB/s each way, link us, $/h. NVLink latency is of the order
# that AIConfigurator measured for vLLM's all-reduce of small messages on H100 (4 us), PCIe's that of a ring (20 us).
_ROWS: tuple[tuple[str, int, int, float, float, float, float, int, float], ...] = (
    ("A100-40GB", 40960, 108, 1555, 312, 0, 300, 6, 1.29),
    ("A100-80GB", 81920, 108, 2039, 312, 0, 300, 6, 1.79),
    ("H100-SXM", 81559, 132, 3350, 989, 1979, 450, 5, 2.99),
    ("H100-PCIe", 81559, 114, 2039, 756, 1513, 64, 20, 2.49),
    ("H200-SXM", 143771, 132, 4800, 989, 1979, 450, 5, 3.79),
    ("H20", 97871, 78, 4000, 148, 296, 450, 5, 1.99),
    ("B200", 183359, 148, 8000, 2250, 4500, 900, 5, 5.89),
    ("L4", 23034, 58, 300, 121, 242, 32, 20, 0.49),
    ("L40S", 46068, 142, 864, 362, 733, 32, 20, 0.99),
    ("A10", 23028, 72, 600, 125, 0, 32, 20, 0.75),
    ("T4", 15360, 40, 320, 65, 0, 16, 25, 0.35),
    ("RTX-A6000", 49140, 84, 768, 155, 0, 32, 20, 0.80),
    ("RTX-3090", 24576, 82, 936, 71, 0, 32, 20, 0.43),
    ("RTX-4090", 24564, 128, 1008, 165, 330, 32, 20, 0.69),
    ("RTX-5090", 32607, 170, 1792, 209, 419, 64, 20, 0.89),
    ("RTX-PRO-6000", 97887, 188, 1792, 503, 1007, 64, 20, 1.79),
    ("RTX-PRO-6000-Server", 97887, 188, 1597, 503, 1007, 64, 20, 1.79),
    ("MI300X", 196592, 304, 5300, 1307, 2614, 448, 10, 2.49),
    ("MI325X", 262128, 304, 6000, 1307, 2614, 448, 10, 2.99),
)
GPUS: tuple[GpuSpec, ...] = tuple(
    GpuSpec(
        name=name,
        memory_bytes=mem_mib * _MIB,
        num_sms=num_sms,
        bandwidth=gb_per_s * 1e9,
        bf16_flops=bf16_tflops * 1e12,
        fp8_flops=fp8_tflops * 1e12,
        link_bandwidth=link_gb_per_s * 1e9,
        link_latency_ns=link_latency_us * 1000,
        price_per_hour=price,
    )
    for name, mem_mib, num_sms, gb_per_s, bf16_tflops, fp8_tflops, link_gb_per_s, link_latency_us, price in _ROWS
)

_ALIASES: dict[str, str] = {
    "a100": "A100-80GB",
    "a10040": "A100-40GB",
    "a10080": "A100-80GB",
    "a100sxm": "A100-80GB",
    "a100sxm440gb": "A100-40GB",
    "a100sxm480gb": "A100-80GB",
    "a10g": "A10",
    "h100": "H100-SXM",
    "h10080gb": "H100-SXM",
    "h100sxm5": "H100-SXM",
    "h10080gbhbm3": "H100-SXM",
    "h200": "H200-SXM",
    "4090": "RTX-4090",
    "5090": "RTX-5090",
    "3090": "RTX-3090",
    "a6000": "RTX-A6000",
    "pro6000": "RTX-PRO-6000",
    "rtx6000pro": "RTX-PRO-6000",
    "rtxpro6000blackwell": "RTX-PRO-6000",
    "rtxpro6000blackwellserver": "RTX-PRO-6000-Server",
    "rtxpro6000blackwellworkstation": "RTX-PRO-6000",
    "b200sxm": "B200",
}
_NOISE = ("nvidia", "amd", "instinct", "geforce", "tesla", "edition", "gpu")


def _plain(name: str) -> str:
    """Letters and digits, in lower case, without the words that mean nothing."""
    plain = "".join(char for char in name.lower() if char.isalnum())
    for word in _NOISE:
        plain = plain.replace(word, "")
    return plain


_BY_PLAIN_NAME: dict[str, GpuSpec] = {_plain(gpu.name): gpu for gpu in GPUS}
_BY_PLAIN_NAME.update({alias: _BY_PLAIN_NAME[_plain(name)] for alias, name in _ALIASES.items()})


def find_gpu(name: str) -> GpuSpec:
    """The GPU of this name; case, punctuation and the vendor's name do not matter (`NVIDIA h100_sxm`).

    Raises:
        InvalidConfigError: there is none; the message names the nearest and all.
    """
    plain = _plain(name)
    if plain in _BY_PLAIN_NAME:
        return _BY_PLAIN_NAME[plain]
    near = difflib.get_close_matches(plain, _BY_PLAIN_NAME, n=1, cutoff=0.5)
    hint = f"did you mean {_BY_PLAIN_NAME[near[0]].name}? " if near else ""
    raise InvalidConfigError(
        f"there is no GPU {name!r} in the table: {hint}There are: {', '.join(gpu.name for gpu in GPUS)}", field="gpu"
    )


def gpu_in(text: str) -> GpuSpec | None:
    """The GPU that a file's or folder's name speaks of (`run7_h100_sxm_llama`); the longest name found, or None."""
    words = "".join(char if char.isalnum() else " " for char in text.lower()).split()
    found = ""
    for begin in range(len(words)):
        for end in range(begin + 1, min(begin + 5, len(words)) + 1):
            plain = _plain("".join(words[begin:end]))
            # A bare number may mean anything.
            if plain in _BY_PLAIN_NAME and not plain.isdigit() and len(plain) > len(found):
                found = plain
    return _BY_PLAIN_NAME.get(found)
