"""A dense layer whose weights lie packed, once, for oneDNN: for CPUs that multiply tiles of bfloat16 (AMX).

There oneDNN is quickest, and quicker yet where it need not lay a matrix out for each product. Linear layers of one
step of Qwen3-0.6B's shape on 2 cores with AMX, by `F.linear` and packed: 104 and 76 ms for one row, 112 and 79 for 8,
136 and 91 for 32; with weights on huge pages 79 and 65 for one, 92 and 77 for 32.

There is one copy, the packed one. Up to `FEW_ROWS` rows wait for memory alone, and a kernel of ours that reads the same
memory multiplies them, so that such a step stays one call (see `decoder_stack`) and takes what reading takes. It knows
one layout, panels of columns, and `Packer` looks, shape by shape, whether it is what has come out. Where oneDNN refuses
or packs in another way, or there is no C library, matrices stay as they are.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from . import cpu_build, huge_pages
from .cpu_build import CODE, POINTER, SIZE
from .linear_dense import linear_dense

log = logging.getLogger(__name__)

FEW_ROWS = 4  # as in csrc/linear_packed.c
_PANELS = (64, 48, 32, 16)  # columns, of which csrc/linear_packed.c knows what to do with
_UNITS = {torch.bfloat16: 2, torch.float32: 1}  # inputs beside each other
_HINTED_ROWS = 32  # for which oneDNN chooses its layout: a batch of decodes
_LEAST_BYTES = 1024**2  # of a matrix: smaller ones stay in the caches, however they lie
_MOST_WRONG = 0.02  # of the norm of products, that one way of multiplying may differ from the other


class MatrixLibrary(Protocol):
    """What packs matrices, and multiplies by them."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """`[out_features, in_features]` in a tensor of its own kind; raises RuntimeError where it cannot."""
        ...

    def multiply(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """`x @ weight.T` of what `pack` has given."""
        ...

    def memory(self, packed: torch.Tensor) -> torch.Tensor:
        """What that holds, in the order of memory, `[n]` of its dtype: a view."""
        ...


class OneDNN:
    """The `MatrixLibrary` that comes with torch."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _HINTED_ROWS)
        return packed

    def multiply(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return product

    def memory(self, packed: torch.Tensor) -> torch.Tensor:
        num_bytes = torch.ops.mkldnn._nbytes(packed)
        held = (ctypes.c_char * num_bytes).from_address(torch.ops.mkldnn.data_ptr(packed))
        return torch.frombuffer(held, dtype=packed.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """`[out_features, in_features]` weights as oneDNN holds them. Make one with a `Packer`.

    Attributes:
        packed: oneDNN's tensor, which has no address that torch knows.
        library: that multiplies by it.
        panel: columns beside each other: what lies there is `[out_features / panel, in_features / unit, panel, unit]`,
            the last panel filled up, a unit being two inputs of bfloat16 or one of float32.
        address: where that begins.
    """

    packed: torch.Tensor
    library: MatrixLibrary
    shape: tuple[int, int]
    panel: int
    address: int

    @property
    def dtype(self) -> torch.dtype:
        return self.packed.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def dequantize(self) -> torch.Tensor:
        """The plain matrix, a copy: so called as a quantised weight's is, in whose place it may stand."""
        unit = _UNITS[self.dtype]
        panels = self.library.memory(self.packed).view(-1, self.shape[1] // unit, self.panel, unit)
        return panels.transpose(1, 2).reshape(-1, self.shape[1])[: self.shape[0]]


class Packer:
    """Packs a model's matrices; of each shape the first is looked at closely, to tell what becomes of the others."""

    def __init__(self, library: MatrixLibrary | None = None) -> None:
        self._library = library or OneDNN()
        self._panels: dict[tuple[torch.dtype, int, int], int | None] = {}

    def pack(self, weight: torch.Tensor) -> PackedWeight | None:
        """`weight` packed; None where it stays as it is.

        Args:
            weight: `[out_features, in_features]`.
        """
        unit = _UNITS.get(weight.dtype)
        num_rows, num_inputs = weight.shape
        if _kernels() is None or unit is None or num_inputs % unit or weight.nbytes < _LEAST_BYTES:
            return None
        shape = (weight.dtype, num_rows, num_inputs)
        if self._panels.get(shape, 0) is None:
            return None
        try:
            packed = self._library.pack(weight)
            memory = self._library.memory(packed)
            if shape not in self._panels:
                self._panels[shape] = None
                self._panels[shape] = self._examine(weight, packed, memory)
        except (RuntimeError, AttributeError) as error:  # torch without oneDNN, without the operator, or a CPU too old
            log.warning("linear_packed.off shape=%r reason=%r", list(weight.shape), str(error).partition("\n")[0])
            self._panels[shape] = None
            return None
        panel = self._panels[shape]
        if panel is None:
            return None
        huge_pages.collapse(memory)
        return PackedWeight(packed, self._library, (num_rows, num_inputs), panel, memory.data_ptr())

    def _examine(self, weight: torch.Tensor, packed: torch.Tensor, memory: torch.Tensor) -> int:
        """The columns of a panel.

        Raises:
            RuntimeError: it lies in another way, or what comes of multiplying is wrong.
        """
        fitting = [panel for panel in _PANELS if _lies_in_panels(memory, weight, panel)]
        if len(fitting) != 1:
            raise RuntimeError("oneDNN has packed it in a layout that is not known here")
        found = PackedWeight(packed, self._library, (weight.shape[0], weight.shape[1]), fitting[0], memory.data_ptr())
        rows = torch.randn(FEW_ROWS + 1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        for x in (rows, rows[:1]):
            expected = linear_dense(x, weight).float()
            if not (linear_packed(x, found).float() - expected).norm() <= _MOST_WRONG * expected.norm():
                raise RuntimeError("products with the packed matrix are wrong")
        return fitting[0]


def linear_packed(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """`x @ weight.T`, summed in float32.

    Args:
        x: `[num_tokens, in_features]`, of the weight's dtype.

    Returns:
        `[num_tokens, out_features]`, the same. Up to `FEW_ROWS` rows each element is bitwise the same, whatever else is
        in the batch and however many threads there are; of more oneDNN promises no such thing.

    Raises:
        MemoryError: no memory for the kernel's scratch.
        ValueError: sizes or dtypes that do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.shape[1] or x.dtype is not weight.dtype:
        raise ValueError(
            f"x is {x.dtype} {list(x.shape)} and the weight takes {weight.dtype} [num_tokens, {weight.shape[1]}]"
        )
    x = x.contiguous()
    kernels = _kernels()
    if x.shape[0] > FEW_ROWS or kernels is None:
        return weight.library.multiply(x, weight.packed)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    status = kernels.octavo_linear_packed(
        *(x.data_ptr(), weight.address, out.data_ptr(), x.shape[0], weight.shape[1], weight.shape[0]),
        *(weight.panel, cpu_build.DTYPE_CODES[x.dtype], torch.get_num_threads()),
    )
    if status != 0:
        raise MemoryError("linear_packed could not allocate its scratch memory")
    return out


def _lies_in_panels(memory: torch.Tensor, weight: torch.Tensor, panel: int) -> bool:
    """Whether `memory` holds `weight` as `PackedWeight` says."""
    num_rows, num_inputs = weight.shape
    unit, num_panels = _UNITS[weight.dtype], -(-num_rows // panel)
    if memory.numel() != num_panels * panel * num_inputs:
        return False
    panels = memory.view(num_panels, num_inputs // unit, panel, unit).transpose(1, 2)
    units = weight.view(num_rows, num_inputs // unit, unit)
    whole, rest = divmod(num_rows, panel)
    if not torch.equal(panels[:whole], units[: num_rows - rest].view(whole, panel, *units.shape[1:])):
        return False
    return rest == 0 or torch.equal(panels[whole, :rest], units[num_rows - rest :])


_kernels = cpu_build.declared(
    octavo_linear_packed=(CODE, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, CODE, CODE)
)
