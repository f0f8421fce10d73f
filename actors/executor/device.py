"""What an executor computes with: a model, its KV cache, and how much of it fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import psutil
import torch

from ...kernels.attention_batch import AttentionBatch
from ...kernels.kv_quantization import row_width
from ...messages.errors import InvalidConfigError
from ...models.interface import CausalLM, KVCache
from ...models.parallel import ParallelGroup, alone
from ...models.registry import load_model
from ..kv_allocator.sizing import KVCachePlan, size_kv_cache
from .config import ExecutorConfig, KVCacheDtype
from .cpu_affinity import CpuAffinity
from .gpu_memory import GpuMemoryPlan, as_table, log_fields, share_out
from .memory_profile import (
    ExecutorMemory,
    GraphExtent,
    does_not_fit,
    largest_step,
    measured_memory,
    memory_now,
    small_caches,
)
from .standing_batch import StepArrays

_KV_DTYPES: dict[KVCacheDtype, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


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


def resolve_device(asked: str, gpu: int | None = None) -> torch.device:
    """What to compute on.

    Args:
        gpu: which of this host's, counted round; None: the current one.

    Raises:
        InvalidConfigError: a GPU was asked for, and torch can use none.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no GPU that it can use"
        raise InvalidConfigError(
            f"device is cuda, but torch {torch.__version__} {built}: install a driver and a build of torch for it, or "
            "take --device cpu",
            field="device",
        )
    if gpu is not None:
        torch.cuda.set_device(gpu % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def free_memory_bytes(device: torch.device) -> int:
    """Memory that the KV cache could take on this device, after the weights."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


class Device:
    """A loaded model and its KV cache, or one rank's part of both; the only code that touches weights and KV tensors.

    Args:
        config: what to load and how much to hold.
        group: the ranks that serve the model together; None: this process alone.
        on_placed: is called with what will be computed on, and the number of ranks on this host, before loading.
        on_loaded: is called when the weights are there, before anything is computed.
    """

    def __init__(
        self,
        config: ExecutorConfig,
        group: ParallelGroup | None = None,
        *,
        on_placed: Callable[[torch.device, int], object] = lambda _where, _num_ranks: None,
        on_loaded: Callable[[], object] = lambda: None,
    ) -> None:
        self.group = group or alone()
        index, ranks = self.group.place_on_host()
        place = (config.replica * ranks + index, config.num_replicas * ranks)
        self._affinity = CpuAffinity(config.cpu_affinity, config.num_threads, ranks=ranks, place=place)
        torch.set_num_threads(self._affinity.choice.num_threads)
        started = time.monotonic()
        gpu = config.gpu if config.gpu is not None or ranks == 1 else place[0]
        where = resolve_device(config.device, gpu)
        on_placed(where, ranks)
        before = memory_now(where) if where.type == "cuda" else None
        try:
            with self._affinity.near_memory():
                self.model: CausalLM = load_model(
                    Path(config.model_path),
                    dtype=config.dtype,
                    model_impl=config.model_impl,
                    trust_remote_code=config.trust_remote_code,
                    device=str(where),
                    max_model_len=config.max_model_len,
                    quantization=config.quantization,
                    deterministic=config.deterministic,
                    group=self.group,
                    load_format=config.load_format,
                )
        except torch.OutOfMemoryError as error:
            raise does_not_fit(config, "weights", where, error) from error
        self.load_seconds = time.monotonic() - started
        on_loaded()
        self.kv_dtype = _KV_DTYPES.get(config.kv_cache_dtype, self.model.dtype)
        self._block_size = config.block_size
        self._kv_caches: list[KVCache] = []
        self.gpu_plan = None if before is None else self._share_out(config, before)
        self.plan = self._plan(config)
        self.reset()

    @property
    def is_deterministic(self) -> bool:
        """A row's logits are the same bits alone and in any batch: as asked, or as costs nothing."""
        return bool(getattr(self.model, "is_deterministic", False))

    def bind_threads(self) -> None:
        """Bind the calling thread and its workers to their cores; to be called once, on the thread that will step."""
        self._affinity.apply(computes=self.model.device.type == "cpu")

    def _share_out(self, config: ExecutorConfig, before: ExecutorMemory) -> GpuMemoryPlan:
        """Measure the largest step on the GPU and give the KV cache what is left.

        Raises:
            InvalidConfigError: nothing is left, or less than was asked for; the message has the numbers.
        """
        model, where, block_size = self.model, self.model.device, self._block_size
        longest = min(config.max_model_len or model.max_position, model.max_position)
        if self.group.pp_size > 1 or not getattr(model, "fits_graphs", True):  # as `load_runner` has it
            config = msgspec.structs.replace(config, cuda_graph_sizes=(), cuda_graph_tokens=())
        loaded, extent = memory_now(where), GraphExtent.of(config)
        largest = largest_step(config.max_num_batched_tokens, config.max_num_seqs, longest, block_size)
        of_graph = largest_step(max(1, extent.most_tokens), max(1, extent.most_tokens), longest, block_size)
        activations = graph_bytes = 0
        try:
            num_cached = max(largest.max_context_len, of_graph.max_context_len)
            self._kv_caches = small_caches(model, self.kv_dtype, num_cached, block_size, where)
            if self.group.pp_size == 1:  # stages would wait for each other; what they sample with is kept back anyway
                activations = self._peak_bytes(largest, config.max_num_seqs)
                graph_bytes = self._peak_bytes(of_graph, extent.most_samples) if extent.num_graphs else 0
        except torch.OutOfMemoryError as error:
            raise does_not_fit(config, "step", where, error) from error
        finally:
            self._kv_caches = []
        measured = measured_memory(
            config,
            model=model,
            before=before,
            loaded=loaded,
            after=memory_now(where),
            activations=activations,
            of_graph=graph_bytes,
            max_model_len=longest,
        )
        asked, asked_as = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
        if config.num_blocks is not None:
            per_token = sum(spec.bytes_per_token(self.kv_dtype) for spec in model.kv_cache_specs)
            asked, asked_as = config.num_blocks * block_size * per_token, "num_blocks"
        return share_out(measured, memory_utilization=config.memory_utilization, asked_bytes=asked, asked_as=asked_as)

    def _peak_bytes(self, arrays: StepArrays, num_samples: int) -> int:
        """Most that torch allocates for a step and the logits of so many of its tokens."""
        where = self.model.device
        before = torch.cuda.memory_allocated(where)
        torch.cuda.reset_peak_memory_stats(where)
        self.logits(self.forward(arrays)[:num_samples])
        return torch.cuda.max_memory_allocated(where) - before

    def memory_report(self) -> tuple[dict[str, object], str] | None:
        """Fields for a log line and a table of how a GPU's memory is shared out; None on a CPU."""
        plan, blocks = self.gpu_plan, self.plan
        if plan is None:
            return None
        return (
            log_fields(plan, num_blocks=blocks.num_blocks, bytes_per_block=blocks.bytes_per_block),
            as_table(
                plan,
                num_blocks=blocks.num_blocks,
                bytes_per_block=blocks.bytes_per_block,
                block_size=self._block_size,
            ),
        )

    def _plan(self, config: ExecutorConfig) -> KVCachePlan:
        """As `plan_kv_cache`; of several ranks all take what the one with least room has, so that ids mean the same."""
        group, device = self.group, self.model.device
        bytes_per_token = sum(spec.bytes_per_token(self.kv_dtype) for spec in self.model.kv_cache_specs)
        group.agree_on("the dtype", f"{self.model.dtype}, KV {self.kv_dtype}")
        num_ranks_here = group.num_ranks_on_host()  # each has loaded now, and what is free stays so
        free_bytes = free_memory_bytes(device)
        if device.type == "cpu":
            free_bytes //= num_ranks_here
        if self.gpu_plan is not None and config.num_blocks is None:
            config = msgspec.structs.replace(config, kv_cache_memory_bytes=self.gpu_plan.kv_bytes)
        if group.world_size > 1 and config.num_blocks is None:
            kv_bytes = config.kv_cache_memory_bytes
            if kv_bytes is None:
                kv_bytes = int(free_bytes * config.memory_utilization)
            bytes_per_block = bytes_per_token * config.block_size
            least = group.minimum(kv_bytes // bytes_per_block) * bytes_per_block
            config = msgspec.structs.replace(config, kv_cache_memory_bytes=least)
        return plan_kv_cache(
            config, bytes_per_token=bytes_per_token, max_position=self.model.max_position, free_bytes=free_bytes
        )

    @property
    def kv_cache_bytes(self) -> int:
        return self.plan.num_blocks * self.plan.bytes_per_block

    @property
    def kv_caches(self) -> list[KVCache]:
        """One of each of the model's `kv_cache_specs`."""
        return self._kv_caches

    def reset(self) -> None:
        """Give the KV cache back and take a new one: zeros, so that no stale value is ever read as a number.

        On a GPU it stays where it is, as captured graphs remember.
        """
        if self._kv_caches and self.model.device.type != "cpu":
            for cache in self._kv_caches:
                cache.k.view(torch.uint8).zero_()
                cache.v.view(torch.uint8).zero_()
            return
        self._kv_caches.clear()
        shape = (self.plan.num_blocks, self._block_size)
        for spec in self.model.kv_cache_specs:
            self._kv_caches.append(
                KVCache(
                    k=self._zeros(shape[0], spec.num_kv_heads, shape[1], row_width(spec.k_head_dim, self.kv_dtype)),
                    v=self._zeros(shape[0], spec.num_kv_heads, shape[1], row_width(spec.v_head_dim, self.kv_dtype)),
                )
            )

    def _zeros(self, *shape: int) -> torch.Tensor:
        if self.model.device.type != "cpu":
            return torch.zeros(shape, dtype=self.kv_dtype, device=self.model.device)
        # numpy asks the system for zero pages, which cost nothing until they are written; torch would write them all.
        num_bytes = math.prod(shape) * self.kv_dtype.itemsize
        return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(self.kv_dtype).view(shape)

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
