"""Command-line flags of the engine, under the names vLLM's users know."""

from __future__ import annotations

import argparse
from typing import Any

from .accelerator import resolve_device
from .flag_values import json_object, number, positive, seconds
from .performance_mode import fill_in


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that become an `EngineConfig`; their defaults are the struct's."""
    _add_model_flags(parser)
    _add_device_flags(parser)
    _add_memory_flags(parser)
    _add_scheduling_flags(parser)
    _add_process_flags(parser)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        default=None,
        help="folder, GGUF file or hub name; without one, the model shipped with octavo",
    )
    group.add_argument("--tokenizer", help="folder or hub name, if not the model's own")
    group.add_argument("--revision", help="hub revision of config, tokenizer and weights alike")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="of weights and KV"
    )
    group.add_argument(
        "--model-impl", default="auto", choices=["auto", "native", "transformers"], help="which implementation"
    )
    group.add_argument(
        "--quantization",
        default="auto",
        choices=["auto", "int8", "int4"],
        help="quantise floating weights at load (the output projection to int8); auto: as the checkpoint has them",
    )
    group.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        help="a request's logits are the same bits alone and in any batch; default: where that costs nothing (what it "
        "costs here is measured by octavo bench offline --peers octavo-deterministic octavo-not-deterministic)",
    )
    group.add_argument(
        "--load-format",
        default="auto",
        choices=["auto", "dummy"],
        help="dummy: random weights, made on the device; the folder needs a config.json and a tokenizer, no weights",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings")
    group.add_argument("--offline", action="store_true", help="never contact the hub (HF_HUB_OFFLINE works too)")
    group.add_argument("--chat-template", help="jinja file or text, if not the tokenizer's own")
    group.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|vllm|PATH",
        help="where requests that name none take temperature, top_k, top_p, min_p, repetition_penalty and max_tokens "
        "from: the checkpoint's generation_config.json, nowhere, or such a file or its folder (whose max_new_tokens "
        "bounds every answer)",
    )
    group.add_argument(
        "--override-generation-config",
        metavar="JSON",
        type=json_object,
        default={},
        help="values that win over the file's, such as '{\"temperature\": 0.6}'; max_new_tokens bounds every answer",
    )


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("device")
    group.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU where torch can use one"
    )
    group.add_argument(
        "--performance-mode",
        default="balanced",
        choices=["throughput", "balanced", "interactivity"],
        help="decides --max-num-seqs, --max-num-batched-tokens, --pipeline-depth, --gpu-memory-utilization, "
        "--cuda-graph-sizes and --cuda-graph-tokens where they are not given, for the device; what they are is said "
        "at start",
    )
    group.add_argument(
        "--cuda-graph-sizes",
        nargs="*",
        metavar="ROWS",
        type=positive,
        help="rows of decode steps that a GPU replays from a captured graph; with nothing behind it: no graphs. "
        "Default: the mode's",
    )
    group.add_argument(
        "--cuda-graph-tokens",
        nargs="*",
        metavar="TOKENS",
        type=positive,
        help="prompts' tokens of steps, with decodes beside them, that a GPU replays from a captured graph; with "
        "nothing behind it: such steps are launched kernel by kernel. Default: the mode's",
    )


def _add_memory_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--max-model-len", type=number, help="longest prompt plus output; default: what model and memory allow"
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32", "int8", "fp8"],
        help="of keys and values; int8 and fp8 (e4m3) have a scale for each token and head",
    )
    group.add_argument("--block-size", type=number, default=16, help="tokens in a KV block, 1 to 256")
    group.add_argument(
        "--kv-cache-memory-bytes", type=number, help="size of the KV cache (2G, 512M); default: measured"
    )
    group.add_argument(
        "--gpu-memory-utilization",
        "--memory-utilization",
        dest="memory_utilization",
        type=float,
        help="when the KV cache is measured: on a CPU its share of free memory, on a GPU the share of all memory for "
        "everything. Default: the mode's (0.5; 0.9 on a GPU)",
    )
    group.add_argument("--num-gpu-blocks-override", dest="num_blocks", type=number, help="exact number of KV blocks")
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse KV of equal prefixes",
    )


def _add_scheduling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheduling")
    group.add_argument("--max-num-seqs", type=number, help="requests in one step; default: the mode's (256)")
    group.add_argument(
        "--max-num-batched-tokens", type=number, help="tokens in one step; default: the mode's (2048; 8192 on a GPU)"
    )
    group.add_argument(
        "--max-num-queued-reqs", dest="max_num_queued_requests", type=number, default=4096, help="then 429"
    )
    group.add_argument(
        "--max-num-queued-tokens", type=number, default=8_000_000, help="prompt tokens waiting; then 429"
    )
    group.add_argument(
        "--priority-aging",
        dest="priority_aging_s",
        metavar="SECONDS",
        type=seconds,
        default=10.0,
        help="waiting this long is worth one level of priority; 0: priorities alone decide",
    )
    group.add_argument(
        "--long-prefill-token-threshold",
        metavar="TOKENS",
        type=number,
        default=0,
        help="most tokens of one prompt in a step, so that short prompts pass long ones; 0: no limit but the step's",
    )
    group.add_argument(
        "--pipeline-depth",
        type=number,
        help="steps in flight; 1: each waits for the one before. Default: the mode's (2)",
    )
    group.add_argument("--seed", type=int, default=0, help="of requests that bring none")
    group.add_argument("--num-threads", type=number, help="torch's threads on the CPU")
    group.add_argument("--max-logprobs", type=int, default=20, help="most alternatives a request may ask for")
    group.add_argument(
        "--journal",
        metavar="DIR",
        help="record every scheduling decision, for `octavo sim replay` (prompts are hashed), and, of `octavo serve`, "
        "the requests that are open: after a crash, clients get the rest of their streams with Last-Event-ID",
    )
    group.add_argument("--journal-prompts", action="store_true", help="record token ids in the journal, not hashes")


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--in-process",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="engine and executor inside this process; otherwise each is a process of its own, which is replaced when "
        "it dies while every stream goes on. Default: processes for `octavo serve`, in process for other commands",
    )
    group.add_argument(
        "--tensor-parallel-size", "-tp", type=positive, default=1, help="executors that share each layer"
    )
    group.add_argument(
        "--pipeline-parallel-size", "-pp", type=positive, default=1, help="stages of executors that share the layers"
    )
    group.add_argument("--data-parallel-size", "-dp", type=positive, default=1, help="replicas of the model")
    group.add_argument(
        "--enable-expert-parallel",
        action="store_true",
        help="of a mixture of experts, those who share a layer hold whole experts",
    )
    group.add_argument(
        "--routing",
        default="prefix_aware",
        choices=["round_robin", "least_loaded", "prefix_aware"],
        help="how a request's replica is chosen",
    )
    group.add_argument(
        "--max-restarts",
        type=number,
        help="of an executor within a minute; default: enough to find a request that kills it",
    )
    group.add_argument(
        "--cpu-affinity",
        default="auto",
        metavar="CORES",
        help="cores that computing threads are bound to, such as 0-3,8; auto: one each unless that would do harm; off",
    )


ENGINE_FIELDS = (
    "model",
    "tokenizer",
    "revision",
    "dtype",
    "model_impl",
    "quantization",
    "deterministic",
    "trust_remote_code",
    "offline",
    "chat_template",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "kv_cache_memory_bytes",
    "memory_utilization",
    "num_blocks",
    "enable_prefix_caching",
    "max_num_queued_requests",
    "max_num_queued_tokens",
    "priority_aging_s",
    "pipeline_depth",
    "seed",
    "num_threads",
    "max_logprobs",
    "journal",
    "journal_prompts",
    "kv_cache_dtype",
    "in_process",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "routing",
    "max_restarts",
    "cpu_affinity",
    "device",
    "performance_mode",
    "cuda_graph_sizes",
    "cuda_graph_tokens",
    "load_format",
    "generation_config",
    "override_generation_config",
    "long_prefill_token_threshold",
)


FIELDS_WITHOUT_ENGINE_FLAG = {"served_model_names": "--served-model-name, of `octavo serve` alone"}
"""Fields of `EngineConfig` that `add_engine_flags` leaves out, and why."""


def engine_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `EngineConfig` from parsed flags."""
    fields = {name: getattr(arguments, name) for name in ENGINE_FIELDS}
    if fields["in_process"] is None:  # several executors are several processes
        sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
        fields["in_process"] = all(fields[size] == 1 for size in sizes)
    for name in ("cuda_graph_sizes", "cuda_graph_tokens"):
        if fields[name] is not None:
            fields[name] = tuple(fields[name])
    return fill_in(fields, resolve_device(fields["device"]))
