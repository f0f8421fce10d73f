"""What `--performance-mode` stands for: settings that trade throughput against latency, on a GPU and on a CPU.

A setting that is given wins over the mode's. The table is a starting point that is right for no model in particular:
`octavo bench gpu` and `octavo sim plan` find better ones for a given model and load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

PerformanceMode = Literal["throughput", "balanced", "interactivity"]


class ModeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of `EngineConfig` that a mode decides.

    Attributes:
        max_num_seqs: requests in one step. More share one reading of the weights, and each waits longer for the step.
        max_num_batched_tokens: tokens in one step. A prompt's chunk of so many tokens is what running streams wait for
            between two of their tokens, and fewer, longer steps cost less.
        pipeline_depth: steps in flight. With two the device never waits for the host, and a request that arrives waits
            for one step more: nothing on a GPU, a tenth of a second on a CPU.
        memory_utilization: see `EngineConfig`.
        cuda_graph_sizes: rows of decode steps that are captured; a step of another size is padded to the next one, and
            one beyond the last is launched kernel by kernel.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    pipeline_depth: int
    memory_utilization: float
    cuda_graph_sizes: tuple[int, ...]


def graph_sizes(max_rows: int, *, dense_to: int = 1, step: int = 8) -> tuple[int, ...]:
    """1, 2, 4 and every `step`-th up to `max_rows`, each one up to `dense_to`: small steps are not padded by much."""
    sizes = {1, 2, 4, *range(1, dense_to + 1), *range(step, max_rows + 1, step), max_rows}
    return tuple(sorted(size for size in sizes if size <= max_rows))


_ON_GPU: dict[PerformanceMode, ModeSettings] = {
    "throughput": ModeSettings(
        max_num_seqs=512,
        max_num_batched_tokens=16384,
        pipeline_depth=2,
        memory_utilization=0.92,
        cuda_graph_sizes=(*graph_sizes(256), *range(272, 513, 16)),
    ),
    "balanced": ModeSettings(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        pipeline_depth=2,
        memory_utilization=0.9,
        cuda_graph_sizes=graph_sizes(256),
    ),
    "interactivity": ModeSettings(
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        pipeline_depth=2,
        memory_utilization=0.9,
        cuda_graph_sizes=graph_sizes(64, dense_to=16, step=4),
    ),
}

_ON_CPU: dict[PerformanceMode, ModeSettings] = {
    "throughput": ModeSettings(
        max_num_seqs=256,
        max_num_batched_tokens=4096,
        pipeline_depth=2,
        memory_utilization=0.5,
        cuda_graph_sizes=(),
    ),
    "balanced": ModeSettings(
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        pipeline_depth=2,
        memory_utilization=0.5,
        cuda_graph_sizes=(),
    ),
    "interactivity": ModeSettings(
        max_num_seqs=64,
        max_num_batched_tokens=512,
        pipeline_depth=1,
        memory_utilization=0.5,
        cuda_graph_sizes=(),
    ),
}

MODE_FIELDS = ModeSettings.__struct_fields__
"""Names of the fields that a mode decides."""


def mode_settings(mode: PerformanceMode, device: Literal["cpu", "cuda"]) -> ModeSettings:
    """The settings of a mode on a device."""
    return (_ON_GPU if device == "cuda" else _ON_CPU)[mode]


def fill_in(fields: Mapping[str, Any], device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """`fields`, and what the mode that they name decides of what they leave open (absent or None).

    Graphs for more rows than a step can have are left out, so that `max_num_seqs` alone need be given.
    """
    mode = fields.get("performance_mode", "balanced")
    settings = (_ON_GPU if device == "cuda" else _ON_CPU).get(mode)
    if settings is None:  # no such mode, which the check of the whole configuration says better
        return dict(fields)
    filled = dict(fields)
    for name in MODE_FIELDS:
        if filled.get(name) is None:
            filled[name] = getattr(settings, name)
    if fields.get("cuda_graph_sizes") is None and isinstance(filled["max_num_seqs"], int):
        most = filled["max_num_seqs"]
        sizes = [size for size in settings.cuda_graph_sizes if size <= most]
        if settings.cuda_graph_sizes and most > 0 and most not in sizes and most < settings.cuda_graph_sizes[-1]:
            sizes.append(most)
        filled["cuda_graph_sizes"] = tuple(sizes)
    return filled


def described(fields: Mapping[str, Any], device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """What is said at start: the mode, where it runs, and the settings as they are in force."""
    told: dict[str, Any] = {"mode": fields["performance_mode"], "device": device}
    for name in MODE_FIELDS:
        value = fields[name]
        if name == "cuda_graph_sizes":
            value = f"{len(value)} of 1 to {value[-1]} rows" if value else "none"
        told[name] = value
    return told
