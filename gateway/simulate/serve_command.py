"""The command that starts a replica as it was simulated, and what of it `octavo serve` cannot do."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...messages.errors import InvalidConfigError
from ..config import EngineConfig, make_config
from ..performance_mode import MODE_FIELDS

if TYPE_CHECKING:
    from ...sim.plan.planner import Finding

FLAGS = {
    "dtype": "--dtype",
    "kv_cache_dtype": "--kv-cache-dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "block_size": "--block-size",
    "num_blocks": "--num-gpu-blocks-override",
    "memory_utilization": "--gpu-memory-utilization",
    "enable_prefix_caching": "--enable-prefix-caching",
    "max_num_queued_requests": "--max-num-queued-reqs",
    "max_num_queued_tokens": "--max-num-queued-tokens",
    "long_prefill_token_threshold": "--long-prefill-token-threshold",
}
"""Fields of `EngineConfig` that a simulated replica has, and their flags."""


def serve_command(finding: Finding, arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The command that starts one replica as it was simulated.

    Returns:
        The command, which `octavo serve` takes, and a remark on each thing that it cannot do and is left out.
    """
    usual = EngineConfig()
    words, remarks = ["octavo", "serve", _model_of(arguments.model)], []
    for field, value in _fields_of(finding, arguments).items():
        if field not in MODE_FIELDS and value == getattr(usual, field):
            continue  # what a mode decides is another thing on another device
        flag = [FLAGS[field], str(value)]
        if isinstance(value, bool):
            flag = [FLAGS[field] if value else FLAGS[field].replace("--", "--no-", 1)]
        try:
            make_config({field: value, "device": "cuda", "in_process": False})
        except InvalidConfigError:
            remarks.append(
                f"octavo serve cannot do {' '.join(flag)}: the command leaves it out, and does not start what was "
                "simulated"
            )
        else:
            words += flag
    return shlex.join(words), remarks


def _fields_of(finding: Finding, arguments: argparse.Namespace) -> dict[str, Any]:
    candidate, replica = finding.candidate, finding.replica
    assert replica is not None
    return {
        "dtype": arguments.dtype,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "tensor_parallel_size": candidate.tensor_parallel_size,
        "max_model_len": replica.max_sequence_len,
        "max_num_seqs": candidate.max_num_seqs,
        "max_num_batched_tokens": candidate.max_num_batched_tokens,
        "block_size": candidate.block_size,
        "num_blocks": replica.num_blocks,
        "memory_utilization": candidate.memory_utilization,
        "enable_prefix_caching": candidate.enable_prefix_caching,
        "max_num_queued_requests": arguments.max_num_queued_requests,
        "max_num_queued_tokens": arguments.max_num_queued_tokens,
        "long_prefill_token_threshold": arguments.long_prefill_threshold,
    }


def _model_of(given: str) -> str:
    """What `octavo serve` loads: a folder, or a hub name; of a known model's short name, the hub name behind it."""
    from ...sim.step_time.known_models import find_model

    path = Path(given)
    if path.exists():
        return str(path.parent) if path.is_file() else given
    return given if "/" in given else find_model(given).hub_name
