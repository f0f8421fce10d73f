"""Configuration of the whole graph, checked once at the edge; nothing writes to it afterwards."""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

import msgspec

from ..messages.errors import InvalidConfigError
from .accelerator import resolve_device
from .generation_config import GenerationConfig
from .performance_mode import fill_in

MAX_BLOCK_SIZE = 256
_AT_LEAST: dict[str, int] = {
    "max_model_len": 2,  # one prompt and one output token
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "block_size": 1,
    "kv_cache_memory_bytes": 1,
    "num_blocks": 1,
    "max_num_queued_requests": 1,
    "max_num_queued_tokens": 1,
    "pipeline_depth": 1,
    "num_threads": 1,
    "max_logprobs": -1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "max_restarts": 0,
    "long_prefill_token_threshold": 0,
}


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to serve and with how much.

    Attributes:
        model: folder, GGUF file or hub name; None is the model that ships with octavo.
        tokenizer: folder or hub name; None is the model's own.
        revision: hub revision, for config, tokenizer and weights alike.
        served_model_names: names clients may use; empty means the model's name as given.
        dtype: of weights and KV; `auto` takes the checkpoint's (float32 where the CPU is slower otherwise).
        model_impl: `auto` prefers our own implementation, `transformers` never uses it.
        quantization: `int8` or `int4` quantises floating weights at load; `auto` takes them as they are stored.
        deterministic: a row's logits are the same bits alone and in any batch, for native implementations; None: where
            that costs nothing (`Engine.is_deterministic` says whether it does).
        kv_cache_dtype: of keys and values; `int8` and `fp8` halve them, at a small error.
        cpu_affinity: `auto` binds each computing thread to a core unless that would do harm; `off`; or cores, `0-3,8`,
            shared out evenly among the ranks and replicas on this host.
        in_process: every actor on the caller's event loop, the executor on a thread; otherwise engine and executors are
            processes of their own, which are replaced when they die while every stream goes on.
        tensor_parallel_size: processes that share each layer.
        pipeline_parallel_size: stages that share the layers.
        data_parallel_size: replicas of the model, behind a router.
        enable_expert_parallel: of a mixture of experts, those who share a layer hold whole experts.
        routing: how the router chooses among replicas.
        max_restarts: of an executor within a minute; None leaves room to find a request that kills it.
        device: what executors compute on; `auto` takes a GPU where there is one that torch can use.
        performance_mode: names the settings of `performance_mode.ModeSettings`, for those that `make_config` is not
            given; here each is as it stands.
        cuda_graph_sizes: rows of decode steps that a GPU replays from a graph; empty for no graphs. Ascending.
        cuda_graph_tokens: prompts' tokens of steps that it replays likewise, with decodes; empty for none. Ascending.
        load_format: `dummy` takes random weights in place of a checkpoint's, from its config.json alone; for
            benchmarks.
        generation_config: where requests that name no temperature, top_k, top_p, min_p, repetition_penalty or
            max_tokens take them from: `auto` is the checkpoint's generation_config.json, `vllm` none, else the path of
            such a file or of its folder. Programs take them with `Engine.default_sampling_params`.
        override_generation_config: values that win over those of the file.
        max_model_len: longest prompt plus output; None takes the checkpoint's, lowered to what the KV cache holds.
        max_num_seqs: requests in one step.
        max_num_batched_tokens: tokens in one step, prompt and output together.
        block_size: tokens in a KV block, 1 to 256.
        kv_cache_memory_bytes: size of the KV cache; None measures free memory.
        memory_utilization: when the KV cache is measured: on a CPU the share of free memory it may take, on a GPU the
            share of all memory that weights, activations, graphs and KV cache may take together.
        num_blocks: exact number of KV blocks, for tests; None derives it.
        enable_prefix_caching: reuse KV of equal prefixes.
        max_num_queued_requests, max_num_queued_tokens: bounds of the waiting queue; past them requests are refused.
        priority_aging_s: waiting this long is worth one level of priority.
        long_prefill_token_threshold: most tokens of one prompt in a step, so that short prompts pass long ones; 0: no
            limit but `max_num_batched_tokens`.
        pipeline_depth: steps in flight, 1 or more.
        seed: for requests that bring none.
        num_threads: of torch on the CPU; None leaves torch's choice.
        trust_remote_code: run code that a checkpoint brings. Off unless asked for.
        chat_template: path of a jinja file, or the template itself; None takes the tokenizer's.
        offline: never contact the hub.
        max_logprobs: most alternatives a request may ask for; -1 means no bound.
        journal: folder in which what scheduler and KV allocator hear is recorded, for `octavo sim replay`; None for
            none.
        journal_prompts: record token ids as they are, not as hashes that no text can be recovered from.

    Raises:
        InvalidConfigError: a number is out of its range.
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
    journal: str | None = None
    journal_prompts: bool = False
    quantization: Literal["auto", "int8", "int4"] = "auto"
    deterministic: bool | None = None
    kv_cache_dtype: Literal["auto", "bfloat16", "float16", "float32", "int8", "fp8"] = "auto"
    cpu_affinity: str = "auto"
    in_process: bool = True
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    routing: Literal["round_robin", "least_loaded", "prefix_aware"] = "prefix_aware"
    max_restarts: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    performance_mode: Literal["throughput", "balanced", "interactivity"] = "balanced"
    cuda_graph_sizes: tuple[int, ...] = ()
    cuda_graph_tokens: tuple[int, ...] = ()
    load_format: Literal["auto", "dummy"] = "auto"
    generation_config: str = "auto"
    override_generation_config: GenerationConfig = GenerationConfig()
    long_prefill_token_threshold: int = 0

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidConfigError(f"{name} is {value}, but must be at least {least}", field=name)
        if self.block_size > MAX_BLOCK_SIZE:
            raise InvalidConfigError(
                f"block_size is {self.block_size}, but must be from 1 to {MAX_BLOCK_SIZE}", field="block_size"
            )
        if not 0.0 < self.memory_utilization <= 1.0:
            raise InvalidConfigError(
                f"memory_utilization is {self.memory_utilization}, but is a share: more than 0, at most 1",
                field="memory_utilization",
            )
        num_processes = self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size
        if self.in_process and num_processes > 1:
            raise InvalidConfigError(
                f"tensor, pipeline and data parallel sizes make {num_processes} executors, but in_process has one: "
                "leave in_process out (--in-process)",
                field="in_process",
            )
        for name, what in (("cuda_graph_sizes", "rows"), ("cuda_graph_tokens", "tokens")):
            sizes = getattr(self, name)
            if any(size < 1 for size in sizes) or list(sizes) != sorted(set(sizes)):
                raise InvalidConfigError(
                    f"{name} are {', '.join(map(str, sizes))}, but must be numbers of {what} from 1 up, ascending",
                    field=name,
                )
        if self.journal_prompts and self.journal is None:
            raise InvalidConfigError(
                "journal_prompts is set, but there is no journal: name one (--journal DIR)", field="journal_prompts"
            )
        if not (math.isfinite(self.priority_aging_s) and self.priority_aging_s >= 0.0):
            raise InvalidConfigError(
                f"priority_aging_s is {self.priority_aging_s}, but must be a number of seconds from 0 up",
                field="priority_aging_s",
            )


class NodesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other hosts that lend processes for executors (`octavo node`).

    Attributes:
        listen: `tcp://host:port` that nodes join at; `0.0.0.0` for every interface.
        num_nodes: that are waited for before the model is loaded.
        keys: key file of this host.
        allow_list: file of the nodes' public keys.
        plain_loopback: do without keys, on a loopback address.
        local_executors: how many executors run on this host, the first ones; None: its even share, rounded down.
        timeout_s: how long executors may wait for a node, at the start and whenever one was lost.

    Raises:
        InvalidConfigError: what is missing, or makes no sense.
    """

    listen: str
    num_nodes: int = 1
    keys: str = ""
    allow_list: str = ""
    plain_loopback: bool = False
    local_executors: int | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.num_nodes < 1:
            raise InvalidConfigError(f"nodes is {self.num_nodes}, but must be at least 1", field="num_nodes")
        if self.local_executors is not None and self.local_executors < 0:
            raise InvalidConfigError("local_executors must not be negative", field="local_executors")
        if bool(self.keys) != bool(self.allow_list):
            raise InvalidConfigError(
                "a key file needs an allow-list of the nodes' public keys beside it, and the other way round "
                "(--keys FILE --allow-list FILE)",
                field="keys" if self.allow_list else "allow_list",
            )
        if self.keys and self.plain_loopback:
            raise InvalidConfigError("there are keys: leave plain_loopback out", field="plain_loopback")


def make_config(fields: dict[str, Any]) -> EngineConfig:
    """An `EngineConfig` of loosely typed fields, such as keyword arguments or parsed flags.

    What `performance_mode` decides and `fields` leave out is what that mode says for the device.

    Raises:
        InvalidConfigError: an unknown field, a value of a wrong type or out of range.
    """
    known = EngineConfig.__struct_fields__
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f": did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"
            raise InvalidConfigError(f"there is no configuration field {name!r}{hint}", field=name)
    device = fields.get("device", "auto")
    if device in ("auto", "cpu", "cuda"):  # what else it is, the conversion refuses
        fields = fill_in(fields, resolve_device(device))
    try:
        return msgspec.convert(fields, EngineConfig, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise InvalidConfigError(f"{path.rstrip('`')}: {message}", field=path.rstrip("`") or None) from None
