"""The sizes of a model that decide how long a step takes and how much memory it needs."""

from __future__ import annotations

import msgspec

from ...actors.kv_allocator.sizing import kv_row_bytes
from ...messages.errors import InvalidConfigError

BITS: dict[str, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8": 8, "int8": 8, "int4": 4}


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's sizes.

    Attributes:
        intermediate_size: of a dense layer's MLP; 0 where every layer has experts.
        max_model_len: longest sequence the checkpoint was made for.
        gated_mlp: three matrices in an MLP rather than two.
        tied_embeddings: the output matrix is the embedding table.
        attention_bias: parameters of biases in one layer's attention.
        norms_per_layer: gains of `hidden_size` in a layer.
        qk_norm: gains of `head_dim` on queries and keys.
        num_experts, num_active_experts: routed experts of a layer, and how many a token visits; 0: dense.
        expert_size: intermediate size of one expert.
        shared_expert_size: intermediate size of what every token visits beside them; 0: none.
        num_dense_layers: of `num_layers`, those with a dense MLP, in a model with experts.
        sliding_window: tokens that a layer with a window looks back; 0: none.
        num_sliding_layers: layers with a window.
        other_params: learned positions, the last norm's bias; read once a step at most, never multiplied with.
        weight_dtype, kv_dtype: keys of `BITS`.
        hub_name: of the checkpoint on the hub; empty: not known.
    """

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    attention_bias: int = 0
    norms_per_layer: int = 2
    qk_norm: bool = False
    num_experts: int = 0
    num_active_experts: int = 0
    expert_size: int = 0
    shared_expert_size: int = 0
    num_dense_layers: int = 0
    sliding_window: int = 0
    num_sliding_layers: int = 0
    other_params: int = 0
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    hub_name: str = ""

    def __post_init__(self) -> None:
        for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if self.max_model_len < 2:
            raise ValueError(f"max_model_len={self.max_model_len} must be at least 2")
        if self.num_experts and not 1 <= self.num_active_experts <= self.num_experts:
            raise ValueError(
                f"num_active_experts={self.num_active_experts} must be from 1 to num_experts={self.num_experts}"
            )
        for field in ("weight_dtype", "kv_dtype"):
            if getattr(self, field) not in BITS:
                raise ValueError(f"{field}={getattr(self, field)!r} must be one of {', '.join(BITS)}")

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def attention_params(self) -> int:
        """Weights of one layer's four projections, biases included."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return 2 * self.hidden_size * (q_size + kv_size) + self.attention_bias

    @property
    def expert_params(self) -> int:
        """Weights of one expert."""
        return (3 if self.gated_mlp else 2) * self.hidden_size * self.expert_size

    @property
    def head_params(self) -> int:
        """Weights that turn a hidden state into logits."""
        return self.vocab_size * self.hidden_size

    @property
    def dense_params(self) -> int:
        """Weights of all layers that every token meets: attention, dense MLPs, routers, shared experts."""
        matrices = 3 if self.gated_mlp else 2
        dense_mlp = matrices * self.hidden_size * self.intermediate_size
        if not self.gated_mlp:
            dense_mlp += self.hidden_size + self.intermediate_size  # biases, which models of this kind have
        num_moe = self.num_moe_layers
        return (
            self.num_layers * self.attention_params
            + (self.num_layers - num_moe) * dense_mlp
            + num_moe * self.hidden_size * (self.num_experts + matrices * self.shared_expert_size)
        )

    @property
    def num_params(self) -> int:
        """All parameters, a tied embedding counted once."""
        norms = self.norms_per_layer * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return (
            self.dense_params
            + self.num_moe_layers * self.num_experts * self.expert_params
            + self.num_layers * norms
            + self.hidden_size
            + (1 if self.tied_embeddings else 2) * self.head_params
            + self.other_params
        )

    @property
    def num_active_params(self) -> int:
        """Parameters that one token is multiplied with."""
        return self.dense_params + self.num_moe_layers * self.num_active_experts * self.expert_params + self.head_params

    @property
    def weight_bytes(self) -> int:
        """Memory of all parameters."""
        return -(-self.num_params * BITS[self.weight_dtype] // 8)

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads that one GPU of `tp` holds; at least one, a copy of another's if need be."""
        return max(1, self.num_kv_heads // tp)

    def kv_bytes_per_token(self, tp: int = 1) -> int:
        """KV cache that a token takes on each GPU of a tensor-parallel group, all layers."""
        heads = self.kv_heads_per_rank(tp)
        return 2 * self.num_layers * heads * kv_row_bytes(self.head_dim, self.kv_dtype, BITS[self.kv_dtype])

    def with_dtype(self, dtype: str, kv_dtype: str | None = None) -> ModelShape:
        """The same model in another precision; KV in the weights' where those are floats of 16 bits or more.

        Raises:
            InvalidConfigError: not a key of `BITS`.
        """
        dtype = "bfloat16" if dtype == "auto" and self.weight_dtype not in BITS else dtype
        weight_dtype = self.weight_dtype if dtype == "auto" else dtype
        for field, value in (("dtype", weight_dtype), ("kv_dtype", kv_dtype)):
            if value is not None and value not in BITS:
                raise InvalidConfigError(f"{field} is {value!r}, but must be auto or {', '.join(BITS)}", field=field)
        if kv_dtype is None:
            kv_dtype = self.kv_dtype if dtype == "auto" else weight_dtype if BITS[weight_dtype] >= 16 else "bfloat16"
        return msgspec.structs.replace(self, weight_dtype=weight_dtype, kv_dtype=kv_dtype)
