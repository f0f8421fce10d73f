"""What every native family's model is around its layers: the vocabulary's two ends, a stage's layers, the last norm."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ..kernels.attention_batch import AttentionBatch
from ..kernels.decoder_stack import DecoderStack, StackLayer, decoder_stack
from ..kernels.linear_packed import Packer
from ..kernels.rms_norm import add_rms_norm
from .attention import Attention, LayerSizes, TakeGain, take_gain
from .interface import KVCache, KVCacheSpec
from .layers import WeightKind, linear_for, weight_kinds
from .mixture import MixtureOfExperts, stack_on_device
from .mlp import GatedMLP
from .packing import pack_layers
from .parallel import ParallelGroup, alone
from .quantization.reader import inseparable_inputs, open_weights
from .quantization.scheme import Scheme
from .random_weights import RandomWeights
from .rotary import rotary_table
from .sharding import check_sizes, share_heads, stage_layers
from .vocabulary import Vocabulary
from .weights import WeightReader


class DecoderSettings(LayerSizes, Protocol):
    """What a family's settings have in common; `windows` has an entry for each layer, 0 for none."""

    @property
    def windows(self) -> tuple[int, ...]: ...


class DecoderLayer(Protocol):
    """Adds its contributions to the residual stream."""

    @property
    def attention(self) -> Attention: ...
    @property
    def mlp(self) -> GatedMLP | MixtureOfExperts: ...

    def forward(
        self,
        x: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        cache: KVCache,
        *,
        pending: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add to the residual stream `x` `[num_tokens, hidden_size]`, in place, all but the last contribution.

        Args:
            pending: what the layer before has left to be added, `[num_tokens, hidden_size]`; None: nothing.

        Returns:
            What is left to be added: the norm that comes next does that in its own pass.
        """
        ...

    def for_stack(self, cos_sin: torch.Tensor) -> StackLayer | None:
        """The same as a `StackLayer`; None where it is none."""
        ...


class Decoder(ABC):
    """A native `CausalLM`; a family says what its layers are and how its sizes divide.

    Args:
        folder: the checkpoint, with safetensors.
        config: its `transformers` configuration.
        dtype: of weights, activations and KV.
        max_model_len: positions to prepare for; None takes the configuration's.
        quantization: how the checkpoint's weights are quantised, or what to quantise them to; None: floating.
        group: the ranks that serve the model together; None: this process alone.

    Raises:
        UnsupportedModelError: an option that is not implemented here.
        WeightsError: the files do not hold the model.
    """

    take_gain: TakeGain = staticmethod(take_gain)
    """How a norm's factor is read."""

    is_deterministic = False
    """A row's logits are the same bits alone and in any batch: see `deterministic.make_deterministic`."""

    def __init__(
        self,
        folder: Path,
        config: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int | None = None,
        quantization: Scheme | RandomWeights | Literal["int8", "int4"] | None = None,
        group: ParallelGroup | None = None,
    ) -> None:
        self.group = group = group or alone()
        self.vocab_size: int = config.vocab_size
        self.max_position: int = config.max_position_embeddings
        self.dtype = dtype
        self.device = device
        settings = self.read_settings(config)
        s: DecoderSettings = settings
        num_layers = len(s.windows)
        split_inputs, num_experts = self.divided(settings)
        check_sizes(
            *(group, num_layers, s.num_heads, s.num_kv_heads, self.vocab_size, split_inputs),
            unit=inseparable_inputs(folder, quantization),
            num_experts=num_experts,
        )
        layers = stage_layers(group, num_layers)
        num_kv_heads = share_heads(group, s.num_heads, s.num_kv_heads, s.head_dim).num_kv_heads
        self.kv_cache_specs = tuple(KVCacheSpec(num_kv_heads, s.head_dim, s.head_dim) for _ in layers)
        self._hidden_size, self._eps = s.hidden_size, s.eps
        self.linear = linear_for(dtype, device)
        self._cos_sin = self.rotary_tables(
            config, settings, layers, min(max_model_len or self.max_position, self.max_position)
        )
        with (
            torch.inference_mode(),
            open_weights(folder, dtype=dtype, device=device, quantization=quantization) as reader,
        ):
            self.vocabulary = Vocabulary(
                reader, self.vocab_size, s.hidden_size, tied=config.tie_word_embeddings, group=group
            )
            self.layers = [self.read_layer(reader, f"model.layers.{index}", settings, index) for index in layers]
            reader.leave(*(f"model.layers.{index}." for index in range(num_layers) if index not in layers))
            self._norm = self.take_gain(reader, "model.norm.weight", s.hidden_size)
            reader.finish()
            stack_on_device([layer.mlp for layer in self.layers], device)

    # ---- a family's own ----

    @abstractmethod
    def read_settings(self, config: Any) -> Any:
        """The family's `DecoderSettings`; raises `UnsupportedModelError`."""

    @abstractmethod
    def read_layer(self, reader: WeightReader, prefix: str, settings: Any, index: int) -> DecoderLayer:
        """One layer, from the weights below `prefix`."""

    @abstractmethod
    def divided(self, settings: Any) -> tuple[Mapping[str, int], int]:
        """What ranks divide as inputs of a matrix, by name, and the number of experts; see `check_sizes`."""

    def rotary_tables(self, config: Any, settings: Any, layers: range, max_len: int) -> list[torch.Tensor]:
        """The angles of each layer of this stage."""
        return [rotary_table(config, settings.head_dim, max_len, device=self.device)] * len(layers)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` to `[num_tokens, hidden_size]`."""
        return self.vocabulary.embed(input_ids)

    def pack(self) -> None:
        """Lay out dense matrices for the CPU's own instructions, where it has some for the model's dtype.

        Call it after loading, and not for deterministic arithmetic, which lays them out in a way of its own.
        """
        if self.device.type == "cpu" and self.linear.packs:
            with torch.inference_mode():
                pack_layers(((layer.attention, layer.mlp) for layer in self.layers), Packer().pack)

    # ---- CausalLM ----

    @functools.cached_property
    def stack(self) -> DecoderStack | None:
        """The layers as one call; None where a layer is no such, or ranks have to meet within it."""
        uniform = all(layer.attention.linear == self.linear == layer.mlp.linear for layer in self.layers)
        if self.device.type != "cpu" or self.group.tp_size > 1 or not uniform:
            return None
        layers = [layer.for_stack(cos_sin) for layer, cos_sin in zip(self.layers, self._cos_sin, strict=True)]
        known = [layer for layer in layers if layer is not None]
        if not known or len(known) < len(layers):
            return None
        return decoder_stack(known, dtype=self.dtype, quick=self.linear.quick)

    @functools.cached_property
    def _kinds(self) -> frozenset[WeightKind]:
        """The kinds of weights that a stack multiplies by."""
        dense = [(layer.attention, layer.mlp) for layer in self.layers if isinstance(layer.mlp, GatedMLP)]
        return weight_kinds(
            (weight for attention, mlp in dense for weight in (attention.qkv, attention.o, mlp.gate_up, mlp.down)),
            self.dtype,
        )

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch, kv_caches: list[KVCache]
    ) -> torch.Tensor:
        """See `CausalLM.forward`. Call under `torch.inference_mode()`."""
        if self.group.is_first_stage:
            x = self.embed(input_ids)
        else:
            x = self.group.receive_activations(len(input_ids), self._hidden_size, dtype=self.dtype, device=self.device)
        pending: torch.Tensor | None = None
        stack = self.stack if self.linear.is_in_c(len(x), self._kinds) else None
        if stack is not None:
            stack.run(x, positions, batch, [(cache.k, cache.v) for cache in kv_caches])
        else:
            for layer, cos_sin, cache in zip(self.layers, self._cos_sin, kv_caches, strict=True):
                pending = layer.forward(x, cos_sin, positions, batch, cache, pending=pending)
        if not self.group.is_last_stage:
            if pending is not None:
                x.add_(pending)
            self.group.send_activations(x)
            return x
        return add_rms_norm(pending, x, self._norm, self._eps)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `CausalLM.compute_logits`."""
        return self.vocabulary.logits(hidden, self.linear)
