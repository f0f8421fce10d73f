"""What an executor computes with: a model, its KV cache, and how much of it fits."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import psutil
import torch

from ...kernels.attention_batch import AttentionBatch
from ...models.interface import CausalLM, KVCache
from ...models.registry import load_model
from ..kv_allocator.sizing import KVCachePlan, size_kv_cache
from .standing_batch import StepArrays


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of one executor.

    Attributes:
        model_path: folder of the checkpoint.
        dtype: `auto`, or a torch dtype's name.
        model_impl: `auto`, `native` or `transformers`.
        max_model_len: None takes what checkpoint and KV cache allow.
        max_num_seqs: requests in one step.
        pipeline_depth: steps in flight.
        block_size: tokens in a KV block.
        num_blocks: exact number of blocks, or None.
        kv_cache_memory_bytes: size of the KV cache, or None to measure free memory.
        memory_utilization: share of the measured free memory to take.
        num_threads: of torch; None leaves its choice.
        trust_remote_code: run code that the checkpoint brings.
        quantization: `int8` or `int4` quantises floating weights at load; `auto` takes them as they are stored.
        deterministic: a row's logits are the same bits alone and in any batch.
    """

    model_path: str
    dtype: str = "auto"
    model_impl: Literal["auto", "native", "transformers"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    pipeline_depth: int = 2
    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    memory_utilization: float = 0.5
    num_threads: int | None = None
    trust_remote_code: bool = False
    quantization: Literal["auto", "int8", "int4"] = "auto"
    deterministic: bool = False


def plan_kv_cache(config: ExecutorConfig, *, bytes_per_token: int, max_position: int, free_bytes: int) -> KVCachePlan:
    """Divide memory into KV blocks.

    Args:
        config: what was asked for.
        bytes_per_token: KV of one token, all layers.
        max_position: longest context of the checkpoint.
        free_bytes: memory that nothing uses.

    Raises:
        KVCacheTooSmallError: `config.max_model_len` was given and does not fit, or nothing does.
    """
    kv_bytes = config.kv_cache_memory_bytes
    if kv_bytes is None:
        kv_bytes = int(free_bytes * config.memory_utilization)
    return size_kv_cache(
        kv_bytes=kv_bytes,
        bytes_per_token=bytes_per_token,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_model_len=config.max_model_len,
        max_position=max_position,
        max_num_seqs=config.max_num_seqs,
    )


def free_memory_bytes(device: torch.device) -> int:
    """Memory that the KV cache could take on this device, after the weights."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


class Device:
    """A loaded model and its KV cache; the only code that touches weights and KV tensors."""

    def __init__(self, config: ExecutorConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        started = time.monotonic()
        self.model: CausalLM = load_model(
            Path(config.model_path),
            dtype=config.dtype,
            model_impl=config.model_impl,
            trust_remote_code=config.trust_remote_code,
            max_model_len=config.max_model_len,
            quantization=config.quantization,
            deterministic=config.deterministic,
        )
        self.load_seconds = time.monotonic() - started
        bytes_per_token = sum(spec.bytes_per_token(self.model.dtype) for spec in self.model.kv_cache_specs)
        self.plan = plan_kv_cache(
            config,
            bytes_per_token=bytes_per_token,
            max_position=self.model.max_position,
            free_bytes=free_memory_bytes(self.model.device),
        )
        self._block_size = config.block_size
        self._kv_caches: list[KVCache] = []
        self.reset()

    @property
    def kv_cache_bytes(self) -> int:
        return self.plan.num_blocks * self.plan.bytes_per_block

    def reset(self) -> None:
        """Give the KV cache back and take a new one: zeros, so that no stale value is ever read as a number."""
        self._kv_caches.clear()
        shape = (self.plan.num_blocks, self._block_size)
        for spec in self.model.kv_cache_specs:
            self._kv_caches.append(
                KVCache(
                    k=self._zeros(shape[0], spec.num_kv_heads, shape[1], spec.k_head_dim),
                    v=self._zeros(shape[0], spec.num_kv_heads, shape[1], spec.v_head_dim),
                )
            )

    def _zeros(self, *shape: int) -> torch.Tensor:
        if self.model.device.type != "cpu":
            return torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        # numpy asks the system for zero pages, which cost nothing until they are written; torch would write them all.
        num_bytes = math.prod(shape) * self.model.dtype.itemsize
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(self.model.dtype).view(shape)

    @torch.inference_mode()
    def forward(self, arrays: StepArrays) -> torch.Tensor:
        """Compute the step's tokens; returns hidden states `[num_tokens, hidden_size]`."""
        device = self.model.device
        batch = AttentionBatch(
            query_start=torch.from_numpy(arrays.query_start).to(device),
            context_lens=torch.from_numpy(arrays.context_lens).to(device),
            block_tables=torch.from_numpy(arrays.block_tables).to(device),
            slot_mapping=torch.from_numpy(arrays.slot_mapping).to(device),
            block_size=self._block_size,
            max_query_len=arrays.max_query_len,
            max_context_len=arrays.max_context_len,
            num_decodes=arrays.num_decodes,
        )
        return self.model.forward(
            torch.from_numpy(arrays.input_ids).to(device),
            torch.from_numpy(arrays.positions).to(device),
            batch,
            self._kv_caches,
        )

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, token_indices: torch.Tensor | None = None) -> torch.Tensor:
        """Float32 logits `[n, vocab_size]` of all rows of `hidden`, or of those chosen."""
        chosen = hidden if token_indices is None else hidden.index_select(0, token_indices.to(hidden.device))
        return self.model.compute_logits(chosen)
