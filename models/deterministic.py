"""`--deterministic`: a model whose logits for a row are the same bits alone and in any batch.

Of what a step computes, the C kernels for attention, norms, rotary embedding, quantised linears and most activations
keep that promise anyway. Here the rest is replaced: torch's matrix products, soft cap and exact gelu. The layers'
bfloat16 matrices are rounded to whole numbers, once, where the CPU multiplies those quicker: then any number of rows
has the bits that many rows have without `--deterministic`. On a GPU norms, rotary embedding and everything elementwise
keep it, and attention, products and mixtures do when they are asked to.
"""

from __future__ import annotations

import torch

from ..kernels import linear_deterministic as kernels
from ..kernels.linear_rounded import round_weight
from .decoder import Decoder
from .errors import UnsupportedModelError
from .gemma import GemmaForCausalLM
from .interface import CausalLM
from .layers import GATED_ACTIVATIONS, Linear
from .mixture import MixtureOfExperts
from .packing import pack_layers


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
