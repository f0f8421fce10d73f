"""A dense layer of bfloat16 whose weights have been rounded to whole numbers, once: one meaning for any number of rows.

Each 64 inputs of a row of weights share a power of two, as do those of a row of `x`, and their products are summed
exactly; csrc/linear_whole.c says how near that is to what is stored. `linear_dense_quick` has the same bits from 24
rows on, where it pays to round weights as they are needed. Weights that are kept rounded take the memory that they take
in bfloat16 and one part in 64 more, and fewer rows wait for that alone: so what may not depend on the number of rows
need not be summed in floats, which for many takes half as long again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import cpu_build, huge_pages
from .cpu_build import CODE, POINTER, SIZE

_GROUP, _PANEL = 64, 16  # inputs that share a power of two, and columns beside each other, as in csrc/linear_whole.c


@dataclass(frozen=True, slots=True, eq=False)
class RoundedWeight:
    """`[out_features, in_features]` weights as whole numbers times powers of two. Make one with `round_weight`.

    Attributes:
        memory: int16, for each 16 columns, the last of them filled up, the numbers `[in_features / 2, 16, 2]`; behind
            all of those the bits of the powers in bfloat16, for each 16 columns `[in_features / 64, 16]`.
    """

    memory: torch.Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        """Of what it multiplies."""
        return torch.bfloat16

    @property
    def device(self) -> torch.device:
        return self.memory.device

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def dequantize(self) -> torch.Tensor:
        """The numbers it stands for, float32, a copy: so called as a quantised weight's are."""
        num_rows, num_inputs = self.shape
        num_panels, num_groups = -(-num_rows // _PANEL), num_inputs // _GROUP
        codes, powers = self.memory.split_with_sizes(
            [num_panels * _PANEL * num_inputs, num_panels * _PANEL * num_groups]
        )
        rows = codes.view(num_panels, num_inputs // 2, _PANEL, 2).transpose(1, 2).reshape(-1, num_groups, _GROUP)
        factors = powers.view(torch.bfloat16).view(num_panels, num_groups, _PANEL).transpose(1, 2)
        return (rows.float() * factors.reshape(-1, num_groups, 1).float()).view(-1, num_inputs)[:num_rows]


def multiplies_whole_numbers() -> bool:
    """Whether this CPU multiplies bfloat16 quicker in whole numbers than in floats: one with AVX2, or AVX-512 and VNNI.

    With AVX-512 and no AMX 512 rows take 0.45 of the time that oneDNN takes with bfloat16 instructions, and 16 rows of
    stored numbers as well (`python -m octavo.kernels.bench_cpu --products`).
    """
    kernels = _kernels()
    return kernels is not None and kernels.octavo_rounded_size(_GROUP, _PANEL) > 0


def round_weight(*parts: torch.Tensor) -> RoundedWeight | None:
    """A matrix rounded; None where it is to be multiplied in floats: by its dtype and sizes, and what the CPU has.

    Args:
        parts: each `[some of out_features, in_features]`, behind each other; they are read where they lie.
    """
    kernels = _kernels()
    if kernels is None or any(part.dtype is not torch.bfloat16 or part.device.type != "cpu" for part in parts):
        return None
    if any(part.shape[0] % _PANEL for part in parts[:-1]):
        parts = (torch.cat(parts),)
    num_rows, num_inputs = sum(part.shape[0] for part in parts), parts[0].shape[1]
    size: int = kernels.octavo_rounded_size(num_inputs, num_rows)
    if size == 0:
        return None
    memory = huge_pages.empty((size,), torch.int16)
    first = 0
    for part in map(torch.Tensor.contiguous, parts):
        kernels.octavo_round_weights(
            *(part.data_ptr(), memory.data_ptr(), num_inputs, num_rows, first, part.shape[0]),
            torch.get_num_threads(),
        )
        first += part.shape[0]
    huge_pages.merge_pages(memory)
    return RoundedWeight(memory, (num_rows, num_inputs))


def linear_rounded(x: torch.Tensor, weight: RoundedWeight) -> torch.Tensor:
    """`x @ weight.T`.

    Args:
        x: `[num_tokens, in_features]`, bfloat16.

    Returns:
        `[num_tokens, out_features]`, the same. Each element is bitwise the same, whatever else is in the batch and
        however many threads there are.

    Raises:
        MemoryError: no memory for the kernel's scratch.
        ValueError: sizes or dtypes that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype is not weight.dtype:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and the weight takes {weight.dtype} [num_tokens, {weight.shape[1]}]"
        )
    kernels = _kernels()
    assert kernels is not None, "they have rounded the weight"
    x = x.contiguous()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    status = kernels.octavo_linear_rounded(
        *(x.data_ptr(), weight.address, out.data_ptr(), x.shape[0], weight.shape[1], weight.shape[0]),
        torch.get_num_threads(),
    )
    if status != 0:
        raise MemoryError("linear_rounded could not allocate its scratch memory")
    return out


_kernels = cpu_build.declared(
    octavo_rounded_size=(SIZE, SIZE, SIZE),
    octavo_round_weights=(None, POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, CODE),
    octavo_linear_rounded=(CODE, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, CODE),
)
