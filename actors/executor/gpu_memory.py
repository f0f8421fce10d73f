"""How a GPU's memory is shared out: what was measured, what is kept back, and what that leaves for the KV cache."""

from __future__ import annotations

import msgspec

from ...messages.errors import InvalidConfigError

GIB = 1024**3

MARGIN_BYTES = 256 * 1024**2
"""Never given away, whatever share is asked for: allocators round up, and libraries take workspaces later."""

_GRAPH_BYTES = 6 * 1024**2
"""A captured graph's own nodes and arguments. An estimate, for some four hundred launches; not measured yet."""

_POOL_SLACK = 8
"""One part in so many of the largest graph's memory: smaller graphs cut the pool that they share in other places."""

_LARGE_UNIT = 2 * 1024**2
"""Torch's allocator rounds every large tensor up to a multiple of this."""


class MeasuredMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a GPU's memory is taken by, in bytes, before there is a KV cache.

    Attributes:
        total: of the device.
        foreign: that was taken before the model was loaded: other processes, the driver.
        weights: of the model, with what torch's allocator rounds up and leaves between them.
        activations: most that a step of `max_num_batched_tokens` tokens has taken beside them.
        runtime: that is gone and torch has not allocated: kernels' code, libraries' workspaces.
        state: tokens and block tables of the requests that stand on the device.
        graphs: kept back for graphs that are captured later.
        rounding: of the KV cache's tensors, at most.
    """

    total: int
    foreign: int
    weights: int
    activations: int
    runtime: int
    state: int = 0
    graphs: int = 0
    rounding: int = 0

    @property
    def taken(self) -> int:
        """All but the total."""
        kept_back = self.state + self.graphs + self.rounding
        return self.foreign + self.weights + self.activations + self.runtime + kept_back


class GpuMemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the KV cache gets.

    Attributes:
        kv_bytes: for blocks of KV.
        share: of the total that everything takes together.
        note: why less was taken than was asked for; empty if it was not.
    """

    measured: MeasuredMemory
    kv_bytes: int
    share: float
    note: str = ""


def share_out(
    measured: MeasuredMemory, *, memory_utilization: float, asked_bytes: int | None = None, asked_as: str = ""
) -> GpuMemoryPlan:
    """Give the KV cache what is left.

    Args:
        memory_utilization: share of all memory that everything may take together; what others hold counts. Lowered,
            with a note, where that would leave less than a margin.
        asked_bytes: exact size of the KV cache in place of the share; None: the share decides. It may take half of the
            margin: an executor that is started again asks for what the one before had, and measures a little more.
        asked_as: the field that asked for it, for the error.

    Raises:
        InvalidConfigError: what is asked for is more than there is, or nothing is left; the message has the numbers.
    """
    most = measured.total - MARGIN_BYTES - measured.taken
    if asked_bytes is not None:
        if asked_bytes > most + MARGIN_BYTES // 2:
            raise InvalidConfigError(
                f"{asked_as} asks for {_gib(asked_bytes)} of KV cache, but {_arithmetic(measured)} and "
                f"{_gib(MARGIN_BYTES)} of margin leave {_gib(max(0, most))}: ask for at most {max(0, most)} bytes"
                + _advice(measured),
                field=asked_as,
            )
        return GpuMemoryPlan(
            measured=measured, kv_bytes=asked_bytes, share=(measured.taken + asked_bytes) / measured.total
        )
    kv_bytes = int(memory_utilization * measured.total) - measured.taken
    note = ""
    if kv_bytes > most:
        note = (
            f"memory_utilization {memory_utilization:g} leaves less than {_gib(MARGIN_BYTES)} of margin: "
            f"lowered to {(measured.taken + max(0, most)) / measured.total:.4f}"
        )
        kv_bytes = most
    if kv_bytes <= 0:
        why = f"{_arithmetic(measured)} leave nothing for the KV cache"
        if most > 0:
            least = (measured.taken + 1) / measured.total
            raise InvalidConfigError(
                f"memory_utilization is {memory_utilization:g}: {why}. Give more than {least:.3f}"
                " (--gpu-memory-utilization)" + _advice(measured),
                field="memory_utilization",
            )
        raise InvalidConfigError(why + _advice(measured), field="model")
    return GpuMemoryPlan(
        measured=measured, kv_bytes=kv_bytes, share=(measured.taken + kv_bytes) / measured.total, note=note
    )


def graph_reserve(num_graphs: int, *, largest_bytes: int, workspace_bytes: int = 0) -> int:
    """Memory to keep back for graphs, which share one pool: what the largest one takes, and each one's nodes.

    Args:
        largest_bytes: most that a step of any graph's size takes.
        workspace_bytes: that libraries take for the stream that graphs are captured on.
    """
    if not num_graphs:
        return 0
    return largest_bytes + largest_bytes // _POOL_SLACK + workspace_bytes + num_graphs * _GRAPH_BYTES


def rounding_bytes(num_tensors: int) -> int:
    """What so many large tensors take at most beyond their contents."""
    return num_tensors * _LARGE_UNIT


def state_bytes(*, num_rows: int, num_step_rows: int, max_model_len: int, block_size: int) -> int:
    """Memory of the standing batch: each request's tokens and block table, and the table that a step gathers."""
    num_blocks = -(-max_model_len // block_size)
    return 4 * (num_rows * (max_model_len + 1 + num_blocks) + num_step_rows * num_blocks)


def log_fields(plan: GpuMemoryPlan, *, num_blocks: int, bytes_per_block: int) -> dict[str, object]:
    """The arithmetic as fields of one log line, in GiB."""
    measured = plan.measured
    fields: dict[str, object] = {name: round(getattr(measured, name) / GIB, 2) for name in measured.__struct_fields__}
    fields |= {"kv_cache": round(num_blocks * bytes_per_block / GIB, 2), "num_blocks": num_blocks}
    fields["share"] = round((measured.taken + num_blocks * bytes_per_block) / measured.total, 3)
    return {**fields, "note": plan.note} if plan.note else fields


def as_table(plan: GpuMemoryPlan, *, num_blocks: int, bytes_per_block: int, block_size: int) -> str:
    """The same as lines that add up."""
    measured, kv_bytes = plan.measured, num_blocks * bytes_per_block
    free = measured.total - measured.taken - kv_bytes
    rows = [
        (measured.foreign, "taken before: other processes, driver"),
        (measured.weights, "weights"),
        (measured.activations, "activations of the largest step, measured"),
        (measured.runtime, "kernels and libraries"),
        (measured.state, "tokens and block tables of requests"),
        (measured.graphs, "kept back for graphs"),
        (measured.rounding, "tensors of the KV cache rounded up, at most"),
        (kv_bytes, f"KV cache: {num_blocks} blocks of {block_size} tokens"),
        (free, "left free"),
        (measured.total, "in all"),
    ]
    lines = [f"{num_bytes / GIB:9.2f} GiB  {what}" for num_bytes, what in rows]
    return "\n".join([*lines, *([plan.note] if plan.note else [])])


def _arithmetic(measured: MeasuredMemory) -> str:
    parts = [
        ("taken before", measured.foreign),
        ("weights", measured.weights),
        ("activations", measured.activations),
        ("kernels and libraries", measured.runtime),
        ("requests", measured.state),
        ("graphs", measured.graphs),
        ("rounding", measured.rounding),
    ]
    told = ", ".join(f"{what} {_gib(num_bytes)}" for what, num_bytes in parts if num_bytes)
    return f"of {_gib(measured.total)} {told}"


def _advice(measured: MeasuredMemory) -> str:
    advice = []
    if measured.foreign > measured.total // 20:
        advice.append("end the other processes on this GPU")
    if measured.activations > measured.total // 20:
        advice.append("lower --max-num-batched-tokens")
    if measured.graphs > measured.total // 50:
        advice.append("capture fewer graphs (--cuda-graph-sizes)")
    if measured.weights > measured.total // 2:
        advice.append("spread the weights over more GPUs (--tensor-parallel-size) or quantise them (--quantization)")
    return f". Or {', or '.join(advice)}" if advice else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
