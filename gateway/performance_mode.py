"""What `--performance-mode` stands for: settings that trade throughput against latency, on a GPU and on a CPU.

A setting that is given wins over the mode's. The table is a starting point that is right for no model in particular:
`octavo bench gpu` and `octavo sim plan` find better ones for a given model and load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

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
        cuda_graph_tokens: tokens of prompts in one step that are captured, each with some numbers of decodes, and
            padded likewise. So many launches cost the host milliseconds: longer than a GPU computes few tokens of a
            small model, and less than it computes many of a large one, which graphs would only pad.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    pipeline_depth: int
    memory_utilization: float
    cuda_graph_sizes: tuple[int, ...]
    cuda_graph_tokens: tuple[int, ...] = ()


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
        cuda_graph_tokens=(64, 128, 256, 384, 512, 1024),
    ),
    "balanced": ModeSettings(
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        pipeline_depth=2,
        memory_utilization=0.9,
        cuda_graph_sizes=graph_sizes(256),
        cuda_graph_tokens=(64, 128, 256, 384, 512),
    ),
    "interactivity": ModeSettings(
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        pipeline_depth=2,
        memory_utilization=0.9,
        cuda_graph_sizes=graph_sizes(64, dense_to=16, step=4),
        cuda_graph_tokens=(64, 128, 256, 384, 512),
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

    Graphs are for as many rows as a step can have, no more and no less, so that `max_num_seqs` alone need be given, and
    for no more tokens than it can have.
    """
    mode = fields.get("performance_mode", "balanced")
    if mode not in get_args(PerformanceMode):  # which the check of the whole configuration says better
        return dict(fields)
    settings = mode_settings(mode, device)
    filled = dict(fields)
    for name in MODE_FIELDS:
        if filled.get(name) is None:
            filled[name] = getattr(settings, name)
    if fields.get("cuda_graph_sizes") is None and isinstance(filled["max_num_seqs"], int):
        filled["cuda_graph_sizes"] = _up_to(filled["max_num_seqs"], settings.cuda_graph_sizes)
    if fields.get("cuda_graph_tokens") is None:
        most = filled["max_num_batched_tokens"]
        is_captured = bool(filled["cuda_graph_sizes"]) and isinstance(most, int)
        tokens = settings.cuda_graph_tokens if is_captured else ()
        filled["cuda_graph_tokens"] = tuple(count for count in tokens if count <= most)
    return filled


def _up_to(max_rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """These sizes as far as a step has rows; beyond their last one each a sixteenth larger, and at last `max_rows`."""
    if not sizes or max_rows < 1:
        return ()
    found = [size for size in sizes if size <= max_rows]
    while not found or found[-1] < max_rows:
        last = found[-1] if found else 0
        found.append(min(max_rows, last + max(16, last // 16)) if last >= sizes[-1] else max_rows)
    return tuple(found)


def described(fields: Mapping[str, Any], device: Literal["cpu", "cuda"]) -> dict[str, Any]:
    """What is said at start: the mode, where it runs, and the settings as they are in force."""
    told: dict[str, Any] = {"mode": fields["performance_mode"], "device": device}
    for name in MODE_FIELDS:
        value = fields[name]
        if name == "cuda_graph_sizes":
            value = f"{len(value)} of 1 to {value[-1]} rows" if value else "none"
        elif name == "cuda_graph_tokens":
            value = f"{len(value)} of {value[0]} to {value[-1]} tokens, with decodes" if value else "none"
        told[name] = value
    return told
