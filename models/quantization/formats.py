"""The tensors that each format stores for one linear layer, and the `QuantizedWeight` they mean.

Every function takes `[out_features, in_features]` of the layer and a `Take`, which hands out one of its tensors by its
last name. Sources are named with each format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...kernels.quantized_weight import QuantizedWeight
from .scheme import Scheme


class MalformedError(ValueError):
    """The tensors of a layer do not fit each other; the message says how."""


Take = Callable[[str, tuple[int, ...], tuple[torch.dtype, ...]], torch.Tensor]
"""`take(suffix, shape, dtypes)`; raises `MalformedError` where the tensor is of another shape or type."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INT32 = (torch.int32,)

# AutoAWQ's order: bits 4 i .. 4 i + 3 of a word hold column _AWQ_ORDER[i] of its eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def is_quantized(name: str, names: Callable[[str], bool], scheme: Scheme) -> bool:
    """Whether the file holds layer `name` quantised; one that was left out of it has a `weight` as ever."""
    if scheme.method != "compressed-tensors":
        return names(f"{name}.qweight")
    return names(f"{name}.weight_packed") if scheme.packed else names(f"{name}.weight_scale")


@dataclass(frozen=True, slots=True)
class Factors:
    """All of a layer's weight but its codes, as `QuantizedWeight` has it, and `[out_features, num_groups]`.

    Attributes:
        zeros: None where all are as they are without.
        input_order: None where inputs are in order.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    input_order: torch.Tensor | None

    def group_size(self, in_features: int) -> int:
        """As `QuantizedWeight.from_codes` takes it."""
        num_groups = self.scales.shape[1]
        return -1 if num_groups == 1 else in_features // num_groups


def read_layer(take: Take, has: Callable[[str], bool], shape: tuple[int, int], scheme: Scheme) -> QuantizedWeight:
    """The weight of one layer.

    Args:
        has: whether the layer has a tensor of this last name.

    Raises:
        MalformedError: tensors of other shapes or types, indices or factors that cannot be.
    """
    factors = read_factors(take, has, shape, scheme)
    codes = _READERS[scheme.method][1](take, shape, scheme)
    if factors.input_order is not None:
        codes = codes.index_select(1, factors.input_order)
    return QuantizedWeight.from_codes(
        (codes.to(torch.int16) - 128).to(torch.int8) if scheme.bits == 8 else codes,
        factors.scales,
        bits=scheme.bits,
        group_size=factors.group_size(shape[1]),
        zeros=factors.zeros,
        input_order=factors.input_order,
    )


def read_factors(take: Take, has: Callable[[str], bool], shape: tuple[int, int], scheme: Scheme) -> Factors:
    """As `read_layer`, without its codes, which are nearly all of what there is to be read."""
    out_features, in_features = shape
    per_word = 32 // scheme.bits
    group_size = in_features if scheme.group_size == -1 else scheme.group_size
    if in_features % group_size:
        raise MalformedError(f"its {in_features} inputs are not a multiple of group_size={group_size}")
    if scheme.packed and (
        in_features % per_word or (scheme.method != "compressed-tensors" and out_features % per_word)
    ):
        raise MalformedError(f"{list(shape)} cannot be packed {per_word} to a word")
    if scheme.method not in _READERS:
        raise MalformedError("no linear layer is stored in MXFP4, experts alone are")
    scales, zeros, order = _READERS[scheme.method][0](take, has, shape, scheme, in_features // group_size)
    if not bool(torch.isfinite(scales).all()):
        raise MalformedError("its scales are not all finite")
    if zeros is None:
        return Factors(scales, None, order)
    if scheme.bits == 8:
        zeros = zeros - 128
    plain_zero = 8 if scheme.bits == 4 else 0
    return Factors(scales, None if bool((zeros == plain_zero).all()) else zeros, order)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 `[a, b]` to its codes, uint8 `[a, b * 32 / bits]`, lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).view(words.shape[0], -1)


# Of each format the factors, zero points unsigned and `[out_features, num_groups]` (None: none are stored), and the
# codes, unsigned and `[out_features, in_features]`, inputs in the file's order.

_Found = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _gptq_factors(
    take: Take, has: Callable[[str], bool], shape: tuple[int, int], scheme: Scheme, groups: int
) -> _Found:
    """Source: AutoGPTQ, nn_modules/qlinear/qlinear_cuda_old.py (`pack`, `forward`); GPTQModel for `gptq_v2`.

    qweight packs consecutive inputs of one output, qzeros consecutive outputs of one group, both lowest bits first.
    The first format stores each zero point less one, and takes the sum modulo 2^bits.
    """
    out_features, in_features = shape
    qzeros = take("qzeros", (groups, out_features * scheme.bits // 32), _INT32)
    scales = take("scales", (groups, out_features), _FLOATS)
    zeros = unpack_words(qzeros, scheme.bits).to(torch.int16)
    if scheme.zeros_minus_one:
        zeros = (zeros + 1) & (2**scheme.bits - 1)
    order = None
    if has("g_idx"):
        order = _input_order(take("g_idx", (in_features,), (torch.int32, torch.int64)), groups)
    return scales.T, zeros.T, order


def _gptq_codes(take: Take, shape: tuple[int, int], scheme: Scheme) -> torch.Tensor:
    out_features, in_features = shape
    qweight = take("qweight", (in_features * scheme.bits // 32, out_features), _INT32)
    return unpack_words(qweight.T.contiguous(), scheme.bits)


def _awq_factors(
    take: Take, _has: Callable[[str], bool], shape: tuple[int, int], _scheme: Scheme, groups: int
) -> _Found:
    """Source: AutoAWQ, awq/modules/linear/gemm.py (`from_linear`) and awq/utils/packing_utils.py.

    qweight and qzeros both pack eight consecutive outputs of one input or group, in an order of their own.
    """
    qzeros = take("qzeros", (groups, shape[0] // 8), _INT32)
    scales = take("scales", (groups, shape[0]), _FLOATS)
    return scales.T, _in_awq_order(qzeros).to(torch.int16).T, None


def _awq_codes(take: Take, shape: tuple[int, int], _scheme: Scheme) -> torch.Tensor:
    return _in_awq_order(take("qweight", (shape[1], shape[0] // 8), _INT32)).T


def _in_awq_order(words: torch.Tensor) -> torch.Tensor:
    place = torch.tensor([_AWQ_ORDER.index(column) for column in range(8)])
    return unpack_words(words, 4).view(words.shape[0], -1, 8)[:, :, place].reshape(words.shape[0], -1)


def _compressed_factors(
    take: Take, has: Callable[[str], bool], shape: tuple[int, int], scheme: Scheme, groups: int
) -> _Found:
    """Source: compressed-tensors, compressors/pack_quantized (`pack_to_int32`) and naive_quantized.

    Signed codes and zero points, when packed shifted by 2^(bits - 1) to be unsigned: weight_packed holds consecutive
    inputs in a word, weight_zero_point consecutive outputs, lowest bits first.
    """
    out_features, in_features = shape
    per_word = 32 // scheme.bits
    scales = take("weight_scale", (out_features, groups), _FLOATS)
    zeros: torch.Tensor | None
    if scheme.symmetric:
        zeros = None
        if has("weight_zero_point"):  # some writers add zeros that mean nothing
            raise MalformedError("weight_zero_point is there, although the scheme is symmetric")
    elif scheme.packed:
        words = take("weight_zero_point", (-(-out_features // per_word), groups), _INT32)
        zeros = unpack_words(words.T.contiguous(), scheme.bits).T[:out_features].to(torch.int16)
    else:
        zeros = take("weight_zero_point", (out_features, groups), (torch.int8,)).to(torch.int16) - _lowest(scheme)
    order = None
    if has("weight_g_idx"):
        order = _input_order(take("weight_g_idx", (in_features,), (torch.int32, torch.int64)), groups)
    return scales, zeros, order


def _compressed_codes(take: Take, shape: tuple[int, int], scheme: Scheme) -> torch.Tensor:
    out_features, in_features = shape
    if not scheme.packed:
        return (take("weight", shape, (torch.int8,)).to(torch.int16) - _lowest(scheme)).to(torch.uint8)
    stated = take("weight_shape", (2,), (torch.int64, torch.int32))
    if stated.tolist() != [out_features, in_features]:
        raise MalformedError(f"weight_shape says {stated.tolist()} instead of {list(shape)}")
    return unpack_words(take("weight_packed", (out_features, in_features * scheme.bits // 32), _INT32), scheme.bits)


def _lowest(scheme: Scheme) -> int:
    """The smallest of signed codes."""
    return -(1 << (scheme.bits - 1))


def _input_order(group_of_input: torch.Tensor, num_groups: int) -> torch.Tensor | None:
    """Inputs sorted by their group, None where they are already.

    With GPTQ's `desc_act` groups are made of inputs of like importance, not of neighbours.
    """
    group = group_of_input.to(torch.int64)
    in_features = group.numel()
    if int(group.min()) < 0 or int(group.max()) >= num_groups:
        raise MalformedError(f"g_idx names groups {int(group.min())} to {int(group.max())} of {num_groups}")
    if not bool((group.bincount(minlength=num_groups) == in_features // num_groups).all()):
        raise MalformedError("g_idx does not give each group as many inputs as group_size")
    order = group.argsort(stable=True)
    return None if bool((order == torch.arange(in_features)).all()) else order


_READERS = {
    "gptq": (_gptq_factors, _gptq_codes),
    "awq": (_awq_factors, _awq_codes),
    "compressed-tensors": (_compressed_factors, _compressed_codes),
}
