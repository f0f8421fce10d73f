"""Configuration of the whole graph, checked once at the edge; nothing writes to it afterwards."""

from __future__ import annotations

from typing import Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to serve and with how much.

    Attributes:
        model: folder or hub name; None is the model that ships with octavo.
        tokenizer: folder or hub name; None is the model's own.
        revision: hub revision, for config, tokenizer and weights alike.
        served_model_names: names clients may use; empty means the model's name as given.
        dtype: of weights and KV; `auto` takes the checkpoint's (float32 where the CPU is slower otherwise).
        model_impl: `auto` prefers our own implementation, `transformers` never uses it.
        max_model_len: longest prompt plus output; None takes the checkpoint's, lowered to what the KV cache holds.
        max_num_seqs: requests in one step.
        max_num_batched_tokens: tokens in one step, prompt and output together.
        block_size: tokens in a KV block, 1 to 256.
        kv_cache_memory_bytes: size of the KV cache; None measures free memory.
        memory_utilization: share of free memory the KV cache may take when it is measured.
        num_blocks: exact number of KV blocks, for tests; None derives it.
        enable_prefix_caching: reuse KV of equal prefixes.
        max_num_queued_requests, max_num_queued_tokens: bounds of the waiting queue; past them requests are refused.
        priority_aging_s: waiting this long is worth one level of priority.
        pipeline_depth: steps in flight, 1 or more.
        seed: for requests that bring none.
        num_threads: of torch on the CPU; None leaves torch's choice.
        trust_remote_code: run code that a checkpoint brings. Off unless asked for.
        chat_template: path of a jinja file, or the template itself; None takes the tokenizer's.
        offline: never contact the hub.
        max_logprobs: most alternatives a request may ask for.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    served_model_names: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    model_impl: Literal["auto", "native", "transformers"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    memory_utilization: float = 0.5
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    max_num_queued_requests: int = 4096
    max_num_queued_tokens: int = 8_000_000
    priority_aging_s: float = 10.0
    pipeline_depth: int = 2
    seed: int = 0
    num_threads: int | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None
    offline: bool = False
    max_logprobs: int = 20
