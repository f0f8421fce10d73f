"""The least time that a GPU could take: for a step, for a prompt, for the workload of 256 requests.

A floor is a sum over the parts of a model {dense linears, output head, routed experts, attention}, for each the larger
of what its bytes take at the read bandwidth and what its FLOPs take at the matrix rate. Activations, sampling, launches
and the host are free, so nothing reaches 100 %, and 80 to 85 % is excellent.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ...sim.step_time.model_shape import BITS, ModelShape
from .ceilings import Ceilings


def step_floor_s(model: ModelShape, ceilings: Ceilings, *, contexts: Sequence[int] | int, batch: int = 0) -> float:
    """Seconds of a decode step at least.

    Args:
        contexts: tokens of each row, or of every one of `batch` rows.
    """
    rows = len(contexts) if not isinstance(contexts, int) else batch
    seen = _seen(model, contexts, rows)
    return weights_floor_s(model, ceilings, num_tokens=rows, num_samples=rows) + attention_floor_s(
        model, ceilings, read=seen, pairs=seen
    )


def prefill_floor_s(model: ModelShape, ceilings: Ceilings, *, num_tokens: int) -> float:
    """Seconds of one prompt at least. Without the output head: the prompts of a step share one reading of it."""
    return weights_floor_s(model, ceilings, num_tokens=num_tokens, num_samples=0) + prompt_attention_floor_s(
        model, ceilings, num_tokens=num_tokens
    )


def mixed_floor_s(model: ModelShape, ceilings: Ceilings, *, context: int, batch: int, num_tokens: int) -> float:
    """Seconds of a step at least that decodes `batch` rows and computes a prompt beside them.

    Args:
        context: tokens of each row that decodes.
        num_tokens: of the prompt.
    """
    seen = _seen(model, context, batch)
    return (
        weights_floor_s(model, ceilings, num_tokens=batch + num_tokens, num_samples=batch + 1)
        + attention_floor_s(model, ceilings, read=seen, pairs=seen)
        + prompt_attention_floor_s(model, ceilings, num_tokens=num_tokens)
    )


def prompt_attention_floor_s(model: ModelShape, ceilings: Ceilings, *, num_tokens: int) -> float:
    """Seconds of a prompt's attention at least; the causal mask halves its products."""
    full, sliding = model.num_layers - model.num_sliding_layers, model.num_sliding_layers
    window = min(model.sliding_window, num_tokens)
    pairs = full * num_tokens**2 / 2 + sliding * (window**2 / 2 + (num_tokens - window) * window)
    return attention_floor_s(model, ceilings, read=num_tokens, pairs=pairs / model.num_layers)


def weights_floor_s(model: ModelShape, ceilings: Ceilings, *, num_tokens: int, num_samples: int) -> float:
    """Seconds of all products with weights: dense linears, head and experts, each the larger of its two times.

    Args:
        num_samples: rows that get logits; 0: the head is not read.
    """
    per_param = BITS[model.weight_dtype] / 8

    def part(num_params: float, flops: float) -> float:
        return max(num_params * per_param / ceilings.read_bytes_per_s, flops / ceilings.flops)

    dense = part(model.dense_params, 2.0 * model.dense_params * num_tokens)
    head = part(model.head_params, 2.0 * model.head_params * num_samples) if num_samples else 0.0
    experts = 0.0
    if model.num_experts:
        # Routing taken as uniform: an expert is read unless every token has missed it.
        missed = (1.0 - model.num_active_experts / model.num_experts) ** num_tokens
        met = model.num_moe_layers * model.num_experts * (1.0 - missed) * model.expert_params
        visits = model.num_moe_layers * model.num_active_experts * model.expert_params
        experts = part(met, 2.0 * visits * num_tokens)
    return dense + head + experts


def attention_floor_s(model: ModelShape, ceilings: Ceilings, *, read: float, pairs: float) -> float:
    """Seconds of attention, all layers.

    Args:
        read: tokens whose K and V are read, in a mean layer.
        pairs: of query and key that are multiplied, in a mean layer.
    """
    num_bytes = read * model.kv_bytes_per_token()
    flops = 4.0 * model.num_layers * model.num_heads * model.head_dim * pairs
    return max(num_bytes / ceilings.read_bytes_per_s, flops / ceilings.flops)


def _seen(model: ModelShape, contexts: Sequence[int] | int, rows: int) -> float:
    """Tokens that a decode step's rows look at, in a mean layer."""
    lengths = [contexts] * rows if isinstance(contexts, int) else contexts
    full, sliding = model.num_layers - model.num_sliding_layers, model.num_sliding_layers
    total = sum(lengths)
    windowed = sum(min(length, model.sliding_window) for length in lengths) if sliding else 0
    return (full * total + sliding * windowed) / model.num_layers


class WorkloadFloor(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that a workload takes at least, and of which parts.

    Attributes:
        prefill_s, linears_s, kv_s: of the prompts; of the decode steps' weights, and of the KV that they read.
        num_steps: decode steps.
        mean_batch, mean_context: over the decode steps, and over their rows.
    """

    prefill_s: float
    linears_s: float
    kv_s: float
    num_steps: int
    mean_batch: float
    mean_context: float
    num_output_tokens: int

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.linears_s + self.kv_s

    @property
    def tokens_per_s(self) -> float:
        return self.num_output_tokens / self.total_s


def workload_floor(model: ModelShape, ceilings: Ceilings, lengths: Sequence[tuple[int, int]]) -> WorkloadFloor:
    """All prompts prefilled in steps of many, then decoded together until each has its outputs.

    Args:
        lengths: `(prompt, output)` tokens of each request. The prefill gives the first output.
    """
    prompts = [prompt for prompt, _ in lengths]
    prefill_s = weights_floor_s(model, ceilings, num_tokens=sum(prompts), num_samples=0)
    prefill_s += sum(prompt_attention_floor_s(model, ceilings, num_tokens=prompt) for prompt in prompts)
    linears_s = kv_s = rows = tokens = 0.0
    num_steps = max(output for _, output in lengths) - 1
    for step in range(1, num_steps + 1):
        contexts = [prompt + step for prompt, output in lengths if output > step]
        linears_s += weights_floor_s(model, ceilings, num_tokens=len(contexts), num_samples=len(contexts))
        seen = _seen(model, contexts, len(contexts))
        kv_s += attention_floor_s(model, ceilings, read=seen, pairs=seen)
        rows += len(contexts)
        tokens += sum(contexts)
    return WorkloadFloor(
        prefill_s=prefill_s,
        linears_s=linears_s,
        kv_s=kv_s,
        num_steps=num_steps,
        mean_batch=rows / max(1, num_steps),
        mean_context=tokens / max(1.0, rows),
        num_output_tokens=sum(output for _, output in lengths),
    )
