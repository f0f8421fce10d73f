"""Messages as one line for people; token ids are counted, not shown."""

from __future__ import annotations

from ...messages.base import Message
from ...messages.request import RequestEnded, SubmitRequest
from ...messages.step import ExecuteStep, PlanStep, StepExecuted

_MAX_ITEMS = 12


def describe(message: Message) -> str:
    """Name and fields of a message, defaults left out."""
    return f"{type(message).__name__}({', '.join(_fields(message))})"


def _fields(message: Message) -> list[str]:
    match message:
        case SubmitRequest():
            num_prompt, num_output = len(message.prompt_token_ids) // 4, len(message.output_token_ids) // 4
            fields = [f"request {message.request_id}", f"{num_prompt} prompt tokens"]
            if num_output:
                fields.append(f"{num_output} output tokens")
            fields.append(f"max_tokens={message.params.max_tokens}")
            if message.priority:
                fields.append(f"priority={message.priority}")
            if message.fork_of >= 0:
                fields.append(f"fork_of={message.fork_of}")
            if message.deadline_ns:
                fields.append(f"deadline {(message.deadline_ns - message.arrival_ns) / 1e9:.3f} s after arrival")
            return fields
        case PlanStep():
            fields = [f"step {message.step_id}", _rows(message.request_ids, message.num_tokens)]
            if message.start:
                fields.append("start " + _items([f"{s.request_id} at {s.num_computed_tokens}" for s in message.start]))
            if message.grow:
                fields.append("grow " + _items([f"{request_id} by {n}" for request_id, n in message.grow]))
            if message.release:
                fields.append("release " + _items([str(request_id) for request_id, _ in message.release]))
            return fields
        case ExecuteStep():
            fields = [f"step {message.step_id}", _rows(message.request_ids, message.num_tokens)]
            if message.start:
                heads = zip(message.start, message.block_tables, strict=True)
                fields.append("start " + _items([f"{s.request_id} on blocks {list(table)}" for s, table in heads]))
            if message.append_blocks:
                fields.append("append " + _items([f"{r}: {list(ids)}" for r, ids in message.append_blocks]))
            if message.drop:
                fields.append("drop " + _items([str(request_id) for request_id in message.drop]))
            return fields
        case StepExecuted():
            fields = [f"step {message.step_id}", "sampled " + _items([str(r) for r in message.request_ids])]
            if message.stopped:
                fields.append("stopped " + _items([str(r) for r in message.stopped]))
            if message.failed:
                fields.append("failed " + _items([f"{r}: {why}" for r, why in message.failed]))
            return fields
        case RequestEnded():
            fields = [f"request {message.request_id}", message.reason, f"{message.num_output_tokens} output tokens"]
            if message.num_preemptions:
                fields.append(f"preempted {message.num_preemptions} times")
            if message.error:
                fields.append(f"{message.error_code}: {message.error}")
            return fields
        case _:
            return [_field(name, getattr(message, name)) for name in message.__struct_fields__]


def _field(name: str, value: object) -> str:
    if name == "request_id":
        return f"request {value}"
    if isinstance(value, bytes):
        return f"{len(value) // 4} tokens"
    return f"{name}={value!r}"


def _rows(request_ids: tuple[int, ...], num_tokens: tuple[int, ...]) -> str:
    rows = [str(r) if n == 1 else f"{r} x {n}" for r, n in zip(request_ids, num_tokens, strict=False)]
    return f"{len(rows)} rows, {sum(num_tokens)} tokens: {_items(rows)}"


def _items(items: list[str]) -> str:
    shown = ", ".join(items[:_MAX_ITEMS])
    return f"[{shown}, and {len(items) - _MAX_ITEMS} more]" if len(items) > _MAX_ITEMS else f"[{shown}]"
