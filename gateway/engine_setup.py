"""What an engine's configuration means for each actor, and how its model is loaded."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..actors.scheduler.config import SchedulerConfig
from ..messages.errors import InvalidRequestError
from .config import EngineConfig

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


def executor_config(config: EngineConfig, folder: Path) -> Any:
    """What the executor loads, and with how much."""
    from ..actors.executor.device import ExecutorConfig

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
    )


def scheduler_config(config: EngineConfig, num_blocks: int, max_model_len: int) -> SchedulerConfig:
    """What the scheduler shares out, once the executor has said how much there is."""
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        pipeline_depth=config.pipeline_depth,
        max_num_queued_requests=config.max_num_queued_requests,
        max_num_queued_tokens=config.max_num_queued_tokens,
        priority_aging_ns=int(config.priority_aging_s * 1e9),
        enable_prefix_caching=config.enable_prefix_caching,
    )


_LOADING = threading.Lock()


def load(folder: Path, config: EngineConfig, executor: ExecutorThread) -> tuple[HFTokenizer, Device]:
    """Load tokenizer and model, one after the other and one engine at a time.

    Both import parts of `transformers` as they need them, and those imports fail now and then when two threads make
    them at once ("partially initialized module", for its circular imports).
    """
    with _LOADING:
        return _load_tokenizer(folder, config), executor.load()


def _load_tokenizer(folder: Path, config: EngineConfig) -> HFTokenizer:
    from ..actors.tokenizer.hf_tokenizer import load_tokenizer

    return load_tokenizer(folder, chat_template=config.chat_template, trust_remote_code=config.trust_remote_code)
