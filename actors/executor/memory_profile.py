"""Measures what a model takes of a GPU's memory besides its KV cache: weights, and the largest step's activations."""

from __future__ import annotations

import msgspec
import numpy as np
import torch

from ...kernels.gpu.attention_config import MAX_CHUNK_BYTES
from ...kernels.kv_quantization import row_width
from ...kernels.logit_processing import memory_bytes
from ...messages.errors import InvalidConfigError
from ...models.interface import CausalLM, KVCache
from .config import ExecutorConfig
from .gpu.mixed_sizes import MixedSizes
from .gpu_memory import MeasuredMemory, graph_reserve, rounding_bytes, state_bytes
from .standing_batch import StepArrays

_PROMPT = 256  # tokens of each row of the measured step: the cache it needs is then small
_SAMPLER_CANDIDATES = 8192
_LOGITS_COPIES = 4  # of float32 logits, that the sampler for all kinds of parameters may hold at a time
_FEWEST_SEQS = 64  # that logits are kept back for: with a few rows at a time a prompt's would take long


class ExecutorMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of a GPU at some moment, in bytes: free of the device, and torch's own."""

    free: int
    total: int
    allocated: int
    reserved: int


def memory_now(device: torch.device) -> ExecutorMemory:
    """Reads the driver's and torch's counts; gives back what torch holds and does not use."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return ExecutorMemory(
        free=free,
        total=total,
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
    )


def largest_step(num_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int) -> StepArrays:
    """A step of prompts of `num_tokens` tokens together, or as many as so many requests can have.

    All rows share the same blocks, so that a small cache will do: their contents are of no account.
    """
    num_tokens = min(num_tokens, max_num_seqs * max_model_len)
    each = min(max_model_len, max(_PROMPT, -(-num_tokens // max_num_seqs)))
    counts = np.full(-(-num_tokens // each), each, dtype=np.int32)
    counts[-1] = num_tokens - each * (len(counts) - 1)
    positions = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    query_start = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])
    longest = int(counts.max())
    num_blocks = -(-longest // block_size)
    return StepArrays(
        input_ids=np.zeros(num_tokens, dtype=np.int64),
        positions=positions,
        slot_mapping=positions.copy(),  # block b of every row is block b of the cache
        query_start=query_start,
        context_lens=counts,
        block_tables=np.tile(np.arange(num_blocks, dtype=np.int32), (len(counts), 1)),
        max_query_len=longest,
        max_context_len=longest,
        num_decodes=int(np.argmax(counts != 1)) if longest > 1 else len(counts),
        sampling_tokens=(query_start[1:] - 1).astype(np.int64),
        sampling_requests=(),
    )


def small_caches(
    model: CausalLM, kv_dtype: torch.dtype, num_tokens: int, block_size: int, device: torch.device
) -> list[KVCache]:
    """Caches that hold so many tokens, for a step that is measured before the real ones are there."""
    num_blocks = -(-num_tokens // block_size)

    def zeros(num_kv_heads: int, head_dim: int) -> torch.Tensor:
        shape = (num_blocks, num_kv_heads, block_size, row_width(head_dim, kv_dtype))
        return torch.zeros(shape, dtype=kv_dtype, device=device)

    return [
        KVCache(k=zeros(spec.num_kv_heads, spec.k_head_dim), v=zeros(spec.num_kv_heads, spec.v_head_dim))
        for spec in model.kv_cache_specs
    ]


class GraphExtent(msgspec.Struct, frozen=True):
    """How many graphs are captured, and most tokens and samples of any of them."""

    num_graphs: int
    most_tokens: int
    most_samples: int

    @classmethod
    def of(cls, config: ExecutorConfig) -> GraphExtent:
        mixed_sizes = MixedSizes(config.max_num_seqs, config.cuda_graph_tokens)
        most_rows = max((*config.cuda_graph_sizes, mixed_sizes.most_rows), default=0)
        num_graphs = len(set(config.cuda_graph_sizes)) + len(list(mixed_sizes))
        return cls(num_graphs, max(most_rows, mixed_sizes.most_tokens), most_rows)


def measured_memory(
    config: ExecutorConfig,
    *,
    model: CausalLM,
    before: ExecutorMemory,
    loaded: ExecutorMemory,
    after: ExecutorMemory,
    activations: int,
    of_graph: int,
    max_model_len: int,
) -> MeasuredMemory:
    """Puts the readings together.

    Args:
        before: the model was loaded; `loaded`: it was; `after`: the largest step has run.
        activations: most that torch allocated for that step, its logits among it.
        of_graph: likewise, for a step of the largest graph's size.
    """
    vocab_size, extent = model.vocab_size, GraphExtent.of(config)
    workspaces = max(0, after.allocated - loaded.allocated)  # what libraries have kept since
    # The step samples only its last tokens; a decode step samples each row.
    logits = logits_rows(config.max_num_seqs) * vocab_size * 4
    chunks = MAX_CHUNK_BYTES if config.deterministic else 0
    return MeasuredMemory(
        total=before.total,
        foreign=max(0, before.total - before.free - before.reserved),
        weights=loaded.reserved,
        activations=max(activations, workspaces + logits),
        runtime=max(0, (before.free + before.reserved) - (after.free + after.reserved)),
        state=state_bytes(
            num_rows=config.max_num_seqs * (config.pipeline_depth + 1),
            num_step_rows=max(config.max_num_seqs, extent.most_samples),
            max_model_len=max_model_len,
            block_size=config.block_size,
        )
        + memory_bytes(config.max_num_seqs * (config.pipeline_depth + 1), vocab_size),
        graphs=graph_reserve(
            extent.num_graphs,
            largest_bytes=of_graph + extent.most_samples * sampler_bytes(vocab_size) + chunks,
            workspace_bytes=workspaces,
        ),
        rounding=rounding_bytes(2 * len(model.kv_cache_specs)),
    )


def logits_rows(max_num_seqs: int) -> int:
    """Rows of float32 logits that memory is kept back for."""
    return _LOGITS_COPIES * max(max_num_seqs, _FEWEST_SEQS)


def sampler_bytes(vocab_size: int) -> int:
    """What `device_sampling` takes for a row, beside its logits: a window of candidates, and a little for each group.

    See `kernels.gpu.sampling`: float32 values and int32 columns of `CAPACITY` candidates, one float32 for each group of
    at least 32 logits, and some words for each chunk of them.
    """
    return 8 * _SAMPLER_CANDIDATES + vocab_size // 8


def does_not_fit(config: ExecutorConfig, what: str, device: torch.device, error: Exception) -> InvalidConfigError:
    """The error for a model or a step that a GPU has no room for."""
    free, total = torch.cuda.mem_get_info(device)
    advice = {
        "weights": "quantise them (--quantization), spread them over more GPUs (--tensor-parallel-size), or end what "
        "else runs on this GPU",
        "step": f"lower --max-num-batched-tokens (it is {config.max_num_batched_tokens}) or --max-num-seqs "
        f"(it is {config.max_num_seqs})",
    }[what]
    return InvalidConfigError(
        f"the {'model' if what == 'weights' else 'largest step'} does not fit the GPU: {free / 2**30:.2f} of "
        f"{total / 2**30:.2f} GiB are free now ({str(error).splitlines()[0]}): {advice}",
        field="model" if what == "weights" else "max_num_batched_tokens",
    )
