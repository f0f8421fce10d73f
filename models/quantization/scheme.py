"""What a checkpoint's configuration says about how its weights are quantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...kernels import fp8_weight
from ..errors import QuantizedModelError, WeightsError
from . import mxfp4

Method = Literal["gptq", "awq", "compressed-tensors", "mxfp4", "fp8"]

_LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")

_SUPPORTED = (
    "supported are gptq (4 and 8 bits), awq (4 bits, gemm), compressed-tensors (weight-only int4 and int8, and fp8), "
    "fp8 (e4m3) and mxfp4 (GPT-OSS's experts). "
    "Take such a checkpoint, or the one in bfloat16 with --quantization int8 or int4"
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of linear layers are stored.

    Attributes:
        bits: of a code, 4 or 8.
        group_size: consecutive inputs that share a scale; -1 for all inputs of an output.
        symmetric: there are no zero points: codes are signed.
        zeros_minus_one: GPTQ's first format, which stores each zero point less one.
        packed: codes share 32-bit words; False: one int8 each, or one e4m3.
        static_inputs: of fp8: the checkpoint has a scale for a layer's inputs; False: each token gets its own.
    """

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    zeros_minus_one: bool = False
    packed: bool = True
    static_inputs: bool = False


def read_scheme(folder: Path) -> Scheme | None:
    """The scheme that a checkpoint's config.json names, None where its weights are floating.

    Raises:
        QuantizedModelError: a method, a number of bits or an option that is not supported; the message names it.
        WeightsError: config.json cannot be read.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    stated = config.get("quantization_config") if isinstance(config, dict) else None
    if stated is None and isinstance(config, dict):  # where earlier releases of compressed-tensors put it
        stated = config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, dict):
        raise QuantizedModelError(f"quantization_config in {path} is not an object")
    match stated.get("quant_method"):
        case "gptq":
            return _gptq(stated)
        case "awq":
            return _awq(stated)
        case "compressed-tensors":
            return _compressed_tensors(stated)
        case "fp8":
            return _fp8(stated)
        case "mxfp4" if config.get("model_type") == "gpt_oss":
            return Scheme(method="mxfp4", bits=4, group_size=mxfp4.GROUP, symmetric=True)
        case other:
            raise QuantizedModelError(
                f"the weights of {folder} are quantised ({other}), which is not supported; {_SUPPORTED}"
            )


def _gptq(stated: Mapping[str, Any]) -> Scheme:
    bits = _one_of("gptq", stated, "bits", (4, 8))
    checkpoint_format = _one_of("gptq", stated, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    _one_of("gptq", stated, "pack_dtype", ("int32",), default="int32")
    if stated.get("dynamic"):
        raise _refused("gptq", "dynamic", stated["dynamic"], "another scheme for some layers is not supported")
    return Scheme(
        method="gptq",
        bits=bits,
        group_size=_group_size("gptq", stated, "group_size", bits),
        symmetric=False,  # zero points are stored either way
        zeros_minus_one=checkpoint_format == "gptq",
    )


def _awq(stated: Mapping[str, Any]) -> Scheme:
    bits = _one_of("awq", stated, "bits", (4,), default=stated.get("w_bit"))
    version = str(stated.get("version", "gemm")).lower()
    if version != "gemm":
        raise _refused("awq", "version", version, "supported is gemm")
    if not _one_of("awq", stated, "zero_point", (True, False), default=True):
        raise _refused("awq", "zero_point", False, "supported is true")
    key = "group_size" if "group_size" in stated else "q_group_size"
    return Scheme(method="awq", bits=bits, group_size=_group_size("awq", stated, key, bits), symmetric=False)


def _compressed_tensors(stated: Mapping[str, Any]) -> Scheme:
    name = "compressed-tensors"
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _refused(name, "config_groups", groups, "it must name at least one group")
    if stated.get("kv_cache_scheme") is not None:
        raise _refused(name, "kv_cache_scheme", stated["kv_cache_scheme"], "a quantised KV cache is not supported")
    if stated.get("sparsity_config") and stated["sparsity_config"].get("format", "dense") != "dense":
        raise _refused(name, "sparsity_config", stated["sparsity_config"], "supported are dense weights")
    if stated.get("transform_config"):
        raise _refused(name, "transform_config", stated["transform_config"], "transforms are not supported")
    schemes = [_compressed_group(stated, group) for group in groups.values()]
    if any(scheme != schemes[0] for scheme in schemes):
        raise _refused(name, "config_groups", sorted(groups), "supported is one scheme for all layers")
    return schemes[0]


def _compressed_group(stated: Mapping[str, Any], group: Mapping[str, Any]) -> Scheme:
    name = "compressed-tensors"
    layout = group.get("format") or stated.get("format")
    if layout == "float-quantized":
        return _compressed_fp8(group)
    if layout not in _LAYOUTS:
        raise _refused(name, "format", layout, f"supported are {', '.join(_LAYOUTS)}")
    for field in ("input_activations", "output_activations"):
        if group.get(field) is not None:
            raise _refused(name, field, group[field], "supported are weight-only schemes, where it is null")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise _refused(name, "weights", weights, "it must be an object")
    _one_of(name, weights, "type", ("int",), default="int")
    packed = layout == "pack-quantized"
    bits = _one_of(name, weights, "num_bits", (4, 8) if packed else (8,))
    strategy = _one_of(name, weights, "strategy", ("group", "channel"))
    _one_of(name, weights, "dynamic", (False,), default=False)
    return Scheme(
        method="compressed-tensors",
        bits=bits,
        group_size=-1 if strategy == "channel" else _group_size(name, weights, "group_size", bits),
        symmetric=bool(_one_of(name, weights, "symmetric", (True, False), default=True)),
        packed=packed,
    )


def _compressed_fp8(group: Mapping[str, Any]) -> Scheme:
    """Weights and inputs in e4m3: of inputs a scale a token, one of all, or of blocks one a token and 128 of them."""
    name = "compressed-tensors"
    weights, inputs = group.get("weights"), group.get("input_activations")
    for field, args in (("weights", weights), ("input_activations", inputs)):
        if not isinstance(args, dict):
            raise _refused(name, field, args, "with float-quantized weights and inputs are of 8 bits")
        _one_of(name, args, "type", ("float",))
        _one_of(name, args, "num_bits", (8,))
        _one_of(name, args, "symmetric", (True,), default=True)
    assert isinstance(weights, dict) and isinstance(inputs, dict)
    if group.get("output_activations") is not None:
        raise _refused(name, "output_activations", group["output_activations"], "supported is null")
    _one_of(name, weights, "dynamic", (False,), default=False)
    by_block = _one_of(name, weights, "strategy", ("tensor", "channel", "block")) == "block"
    if by_block:
        _check_block(name, weights, "block_structure")
        _one_of(name, inputs, "strategy", ("group",))
        _one_of(name, inputs, "group_size", (fp8_weight.BLOCK,))
        is_static = not _one_of(name, inputs, "dynamic", (True,))
    else:
        is_static = _one_of(name, inputs, "strategy", ("token", "tensor")) == "tensor"
        _one_of(name, inputs, "dynamic", (not is_static,), default=False)
    return _fp8_scheme(by_block=by_block, static_inputs=is_static)


def _fp8(stated: Mapping[str, Any]) -> Scheme:
    """As `transformers` writes it, with scales of blocks, and AutoFP8, with one of a matrix."""
    _one_of("fp8", stated, "fmt", ("e4m3",), default="e4m3")
    _one_of("fp8", stated, "scale_fmt", ("float",), default="float")
    is_static = _one_of("fp8", stated, "activation_scheme", ("dynamic", "static"), default="dynamic") == "static"
    by_block = stated.get("weight_block_size") is not None
    if by_block:
        _check_block("fp8", stated, "weight_block_size")
        _one_of("fp8", stated, "activation_scheme", ("dynamic",), default="dynamic")
    if stated.get("kv_cache_scheme") is not None:
        raise _refused("fp8", "kv_cache_scheme", stated["kv_cache_scheme"], "a quantised KV cache is not supported")
    return _fp8_scheme(by_block=by_block, static_inputs=is_static)


def _fp8_scheme(*, by_block: bool, static_inputs: bool) -> Scheme:
    group_size = fp8_weight.BLOCK if by_block else -1
    return Scheme("fp8", bits=8, group_size=group_size, symmetric=True, packed=False, static_inputs=static_inputs)


def _check_block(method: str, stated: Mapping[str, Any], field: str) -> None:
    if stated.get(field) != [fp8_weight.BLOCK] * 2:
        raise _refused(method, field, stated.get(field), f"supported is {[fp8_weight.BLOCK] * 2}")


def _group_size(method: str, stated: Mapping[str, Any], field: str, bits: int) -> int:
    size = stated.get(field)
    unit = 32 if bits == 4 else 16
    if type(size) is not int or (size != -1 and (size < 1 or size % unit)):
        raise _refused(method, field, size, f"with {bits} bits it must be a multiple of {unit}, or -1")
    return size


def _one_of(method: str, stated: Mapping[str, Any], field: str, values: tuple[Any, ...], default: Any = None) -> Any:
    value = stated.get(field, default)
    if not any(type(value) is type(allowed) and value == allowed for allowed in values):
        raise _refused(method, field, value, f"supported: {', '.join(map(str, values))}")
    return value


def _refused(method: str, field: str, value: Any, reason: str) -> QuantizedModelError:
    return QuantizedModelError(f"quantization_config ({method}) has {field}={value!r}: {reason}. {_SUPPORTED}")
