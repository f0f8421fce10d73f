"""`--deterministic`: a model whose logits for a row are the same bits alone and in any batch.

Of what a step computes, the C kernels for attention, norms, rotary embedding, quantised linears, matrices that were
rounded to whole numbers and most activations keep that promise anyway. Here the rest is replaced: torch's matrix
products, soft cap and exact gelu; and the layers' bfloat16 matrices are rounded also where torch multiplies them
quicker. On a GPU norms, rotary embedding and everything elementwise keep it, and attention, products and mixtures do
when they are asked to. Where nothing has to be replaced that takes longer then, `costs_nothing` and the promise is kept
unasked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..kernels import linear_deterministic as kernels
from ..kernels.linear_dense import linear_dense_quick
from ..kernels.linear_rounded import round_weight
from ..kernels.quantized_weight import LinearWeight
from .decoder import Decoder
from .errors import UnsupportedModelError
from .gemma import GemmaForCausalLM
from .interface import CausalLM
from .layers import GATED_ACTIVATIONS, Linear, WeightKind, rounds_weights, weight_kinds
from .mixture import MixtureOfExperts
from .packing import pack_layers


def costs_nothing(model: CausalLM) -> bool:
    """Whether a model that has just been loaded computes as quickly with `make_deterministic`.

    So it does on a CPU whose quickest products are our own kernels'. They give a row the same bits in any batch but for
    matrices that are quantised or would be rounded and cannot be, where it is quicker to treat many rows in another way
    than few; and ranks that add up their parts of a layer would have to do that in one order.
    """
    if not isinstance(model, Decoder) or model.device.type != "cpu" or not kernels.is_available():
        return False
    kinds = weight_kinds(_matrices(model), model.dtype)
    if model.group.tp_size > 1 or kinds & {WeightKind.QUANTIZED, WeightKind.PACKED}:
        return False
    if rounds_weights(model.dtype, model.device):
        return WeightKind.DENSE not in kinds
    return model.linear.dense is linear_dense_quick


def _matrices(model: Decoder) -> Iterator[LinearWeight]:
    if model.vocabulary.head is not None:
        yield model.vocabulary.head
    for layer in model.layers:
        yield from (layer.attention.qkv, layer.attention.o)
        for part in layer.mlp.experts.values() if isinstance(layer.mlp, MixtureOfExperts) else (layer.mlp,):
            yield from (part.gate_up, part.down)


def make_deterministic(model: CausalLM) -> CausalLM:
    """Switch a native model that has just been loaded over to arithmetic that no batch can change.

    Raises:
        UnsupportedModelError: its implementation or this machine cannot keep the promise.
    """
    if not isinstance(model, Decoder):
        raise UnsupportedModelError(
            f"--deterministic: {type(model).__name__} computes a token in another way in another batch; only native "
            "implementations do not. Leave the flag out, or take a model of a native family"
        )
    is_cpu = model.device.type == "cpu"
    if not is_cpu and model.device.type != "cuda":
        raise UnsupportedModelError(f"--deterministic: there are kernels for CPUs and CUDA, not for {model.device}")
    if is_cpu and not kernels.is_available():
        raise UnsupportedModelError(
            "--deterministic needs the C kernels, and they could not be built: install gcc or clang (and do not set "
            "OCTAVO_CPU_KERNELS=0); the log says what failed. Or leave the flag out"
        )
    linear = Linear(kernels.linear_deterministic)
    acts = {GATED_ACTIVATIONS["gelu"]: kernels.gelu_and_mul_deterministic} if is_cpu else {}
    model.is_deterministic = True
    model.linear = linear
    model.group.sums_in_order = True
    for layer in model.layers:
        layer.attention.linear, layer.attention.batch_invariant = linear, True
        layer.mlp.use(linear, acts)
        if isinstance(layer.mlp, MixtureOfExperts):
            layer.mlp.batch_invariant = True
    if is_cpu and model.dtype is torch.bfloat16:
        with torch.inference_mode():
            pack_layers(((layer.attention, layer.mlp) for layer in model.layers), round_weight)
    if is_cpu and isinstance(model, GemmaForCausalLM):
        model.softcap = kernels.softcap_deterministic_
    return model
