"""What an engine's configuration means for each actor, and how its model is loaded."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ..actors.executor.config import ExecutorConfig, ExecutorProcessSpec
from ..actors.journal.actor import check_journal_path
from ..actors.kv_allocator.core import AllocatorConfig
from ..actors.scheduler.config import SchedulerConfig
from ..messages.errors import InvalidConfigError, InvalidRequestError
from ..messages.processes import ExecutorLoaded
from ..messages.system import StartProcess
from .config import EngineConfig
from .generation_config import FILE_NAME, named_file
from .graph import ModelFacts

if TYPE_CHECKING:
    from ..actors.executor.actor import ExecutorThread
    from ..actors.executor.device import Device
    from ..actors.tokenizer.hf_tokenizer import HFTokenizer


def check_options(priority: int, cache_salt: str, truncate_prompt_tokens: int, timeout_s: float | None) -> None:
    """Refuse options that an actor further on would stumble over.

    Raises:
        InvalidRequestError: which one, and what it must be.
    """
    for name, value in (("priority", priority), ("truncate_prompt_tokens", truncate_prompt_tokens)):
        if not isinstance(value, int) or abs(value) >= 2**31:
            raise InvalidRequestError(f"{name} is {value!r}, but must be an integer of 32 bits", param=name)
    if not isinstance(cache_salt, str):
        raise InvalidRequestError(f"cache_salt is {cache_salt!r}, but must be a string", param="cache_salt")
    if timeout_s is not None and not (isinstance(timeout_s, int | float) and 0 < timeout_s < math.inf):
        raise InvalidRequestError(
            f"timeout_s is {timeout_s!r}, but must be a number of seconds above 0, or None", param="timeout_s"
        )


def executor_config(config: EngineConfig, folder: Path) -> ExecutorConfig:
    """What the executor loads, and with how much."""
    return ExecutorConfig(
        model_path=str(folder),
        dtype=config.dtype,
        model_impl=config.model_impl,
        quantization=config.quantization,
        deterministic=config.deterministic,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        pipeline_depth=config.pipeline_depth,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        kv_cache_memory_bytes=config.kv_cache_memory_bytes,
        memory_utilization=config.memory_utilization,
        num_threads=config.num_threads,
        trust_remote_code=config.trust_remote_code,
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        expert_parallel=config.enable_expert_parallel,
        kv_cache_dtype=config.kv_cache_dtype,
        cpu_affinity=config.cpu_affinity,
        device=config.device,
        load_format=config.load_format,
        max_num_batched_tokens=config.max_num_batched_tokens,
        cuda_graph_sizes=config.cuda_graph_sizes,
        cuda_graph_tokens=config.cuda_graph_tokens,
    )


def executor_process_spec(
    config: EngineConfig,
    folder: str,
    facts: ModelFacts | ExecutorLoaded | None,
    start: StartProcess,
    *,
    rank: int,
    engine_name: str,
    run_dir: str,
    log_format: str,
    edge_incarnation: int,
    address: str = "",
    is_one_host: bool = False,
) -> ExecutorProcessSpec:
    """What an executor process is told; `facts`, once known, hold for every process that follows.

    Args:
        address: of this host for others; empty: the whole group is on this one, and meets by a file.
        is_one_host: every replica is on this one.
    """
    number = int(start.child.rpartition(" ")[2])
    # Executors of this host are the first ones; a node counts its own.
    executor = msgspec.structs.replace(executor_config(config, Path(folder)), gpu=number)
    if is_one_host:
        replica = number // (config.tensor_parallel_size * config.pipeline_parallel_size)
        executor = msgspec.structs.replace(executor, replica=replica, num_replicas=config.data_parallel_size)
    if config.tensor_parallel_size * config.pipeline_parallel_size > 1 and not address:
        # The ranks of a group start in the same epoch, though one of them may have been started more often.
        executor = msgspec.structs.replace(
            executor, init_method=f"file://{run_dir}/{engine_name.replace(' ', '-')}.group.{start.epoch}"
        )
    if facts is not None:
        executor = msgspec.structs.replace(executor, num_blocks=facts.num_blocks, max_model_len=facts.max_model_len)
    return ExecutorProcessSpec(
        child=start.child,
        incarnation=start.incarnation,
        rank=rank,
        epoch=start.epoch,
        engine_name=engine_name,
        engine=start.engine,
        run_dir=run_dir,
        config=executor,
        log_format=log_format,
        edge_incarnation=edge_incarnation,
        address=address,
    )


def allocator_config(config: EngineConfig, facts: ModelFacts) -> AllocatorConfig:
    """What the KV allocator gives out, once the executor has said how much there is."""
    return AllocatorConfig(
        num_blocks=facts.num_blocks,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
    )


def scheduler_config(config: EngineConfig, facts: ModelFacts) -> SchedulerConfig:
    """What the scheduler shares out, once the executor has said how much there is."""
    return SchedulerConfig(
        num_blocks=facts.num_blocks,
        block_size=config.block_size,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        pipeline_depth=config.pipeline_depth,
        max_num_queued_requests=config.max_num_queued_requests,
        max_num_queued_tokens=config.max_num_queued_tokens,
        priority_aging_ns=int(config.priority_aging_s * 1e9),
        enable_prefix_caching=config.enable_prefix_caching,
        long_prefill_threshold=config.long_prefill_token_threshold,
    )


def journal_file(folder: str | None, engine_name: str = "engine") -> str | None:
    """The file in the journal's folder in which an engine records; makes the folder.

    Raises:
        InvalidConfigError: no folder or no file can be made there.
    """
    if folder is None:
        return None
    path = Path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        raise InvalidConfigError(f"journal {folder} is a file, but must be a folder", field="journal") from None
    except OSError as error:
        raise InvalidConfigError(
            f"journal {folder} cannot be made: {error.strerror or error}. Give a folder that may be written to",
            field="journal",
        ) from None
    file = str(path / f"{engine_name.replace(' ', '-')}.journal")
    check_journal_path(file)
    return file


_LOADING = threading.Lock()


def load(
    folder: Path, tokenizer_folder: Path, config: EngineConfig, executor: ExecutorThread
) -> tuple[HFTokenizer, Device]:
    """Load tokenizer and model, one after the other and one engine at a time.

    Both import parts of `transformers` as they need them, and those imports fail now and then when two threads make
    them at once ("partially initialized module", for its circular imports).
    """
    with _LOADING:
        return _load_tokenizer(folder, tokenizer_folder, config), executor.load()


def tokenizer_folder_of(config: EngineConfig, folder: Path) -> Path:
    """Where the tokenizer is: with the model in `folder`, unless another is asked for."""
    from ..actors.executor.locate import locate_model

    if config.tokenizer is None:
        return folder
    return locate_model(config.tokenizer, revision=config.revision, offline=config.offline, weights=False)[0]


def load_tokenizer_of(config: EngineConfig, folder: Path) -> HFTokenizer:
    """Load the tokenizer of the model in `folder`, or the other one that is asked for. Blocks."""
    with _LOADING:
        return _load_tokenizer(folder, tokenizer_folder_of(config, folder), config)


def _load_tokenizer(folder: Path, tokenizer_folder: Path, config: EngineConfig) -> HFTokenizer:
    from ..actors.tokenizer.hf_tokenizer import load_tokenizer

    return load_tokenizer(
        tokenizer_folder,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
        generation_config=_end_tokens_file(folder, config),
    )


def _end_tokens_file(folder: Path, config: EngineConfig) -> Path | None:
    """Which file names the tokens that end an answer: the model's, whoever made its tokenizer; None: there is none."""
    is_of_model = config.generation_config in ("auto", "vllm")
    path = folder / FILE_NAME if is_of_model else named_file(config.generation_config)
    return path if path.is_file() else None
