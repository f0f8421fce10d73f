"""Configuration of an executor and of its process; importable without torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from ...messages.ids import Epoch
from ..runtime.addresses import EDGE_INCARNATION, TcpSettings

KVCacheDtype = Literal["auto", "bfloat16", "float16", "float32", "int8", "fp8"]


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
        memory_utilization: on a CPU the share of free memory that the KV cache takes, on a GPU the share of all memory
            that everything takes together.
        num_threads: to compute with; None takes the physical cores of one NUMA node, or what a quota is worth.
        trust_remote_code: run code that the checkpoint brings.
        quantization: `int8` or `int4` quantises floating weights at load; `auto` takes them as they are stored.
        deterministic: a row's logits are the same bits alone and in any batch; None: where that costs nothing.
        kv_cache_dtype: `auto` keeps keys and values in the model's dtype; `int8` and `fp8` (e4m3) with a scale for each
            token and head.
        cpu_affinity: `auto` binds each thread to a core of its own unless that would do harm, `off` never; or the
            cores, such as `0-3,8`, of which each executor on this host takes as many.
        tensor_parallel_size: processes that share each layer.
        pipeline_parallel_size: stages that share the layers; all in all there are as many processes as the product.
        expert_parallel: of a mixture of experts, those that share a layer hold whole experts.
        init_method: where the processes meet, `file:///path` or `tcp://host:port`; see `ParallelConfig`.
        collective_timeout_s: a process that keeps others waiting for so long counts as lost.
        check_ranks: compare what the ranks of a stage sample, each step; for tests.
        device: what to compute on; `auto` takes a GPU where torch can use one.
        load_format: `dummy` takes random weights, from the configuration alone.
        max_num_batched_tokens: tokens in one step; a GPU's memory for activations is measured with so many.
        cuda_graph_sizes: rows of decode steps that are captured as graphs on a GPU, ascending; empty for none.
        cuda_graph_tokens: prompts' tokens of steps that are captured likewise, with decodes; empty for none.
        replica, num_replicas: which of how many on this host share the cores of `cpu_affinity`.
        gpu: which of this host's GPUs, if it computes on one; they are counted round. None: the current one; a group's
            ranks on this host take theirs in turn.
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
    deterministic: bool | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel: bool = False
    init_method: str = ""
    collective_timeout_s: float = 300.0
    check_ranks: bool = False
    cpu_affinity: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    max_num_batched_tokens: int = 2048
    cuda_graph_sizes: tuple[int, ...] = ()
    cuda_graph_tokens: tuple[int, ...] = ()
    replica: int = 0
    num_replicas: int = 1
    gpu: int | None = None


class ExecutorProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor process is told at its start.

    Attributes:
        child, incarnation: who it is.
        rank: of the group.
        epoch: of the steps to come.
        engine_name, engine: name and incarnation of the engine that sends them; 0 if it is not there yet.
        run_dir: of the sockets.
        config: the same for every rank. Of several ranks without an `init_method`, `MeetAt` brings it.
        log_format: as `configure_logs` takes it.
        edge_incarnation: of edge 0.
        tcp: how it listens, on another host than edge 0; None: by ipc.
        edge_endpoint, edge_key: where edge 0 is, for another host, and the CURVE public key of edge 0's host.
        address: of this host, for ranks on other hosts; empty: all are on this one.
    """

    child: str
    incarnation: int
    rank: int
    epoch: Epoch
    engine_name: str
    engine: int
    run_dir: str
    config: ExecutorConfig
    log_format: str = "auto"
    edge_incarnation: int = EDGE_INCARNATION
    tcp: TcpSettings | None = None
    edge_endpoint: str = ""
    edge_key: str = ""
    address: str = ""
