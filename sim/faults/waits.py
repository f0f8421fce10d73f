"""Who waits for whom, for a run that has not come to its end."""

from __future__ import annotations

from collections.abc import Mapping

from .clients import FrontEndModel
from .device import Device
from .network import Process
from .ring_watch import RingWatch


def describe_waits(
    front_end: FrontEndModel, ring: RingWatch, device: Device, processes: Mapping[str, Process]
) -> tuple[str, ...]:
    """A line for each client that waits, and for each actor that somebody may wait for."""
    lines = []
    for waiting in front_end.streams.values():
        request_id = waiting.request_id
        if waiting.is_live and request_id in ring.ended:
            lines.append(f"client of {request_id} waits for the detokenizer: {ring.ended[request_id]}")
        elif waiting.is_live:
            whom = "scheduler" if request_id in ring.submitted else "tokenizer"
            lines.append(f"client of {request_id} waits for the {whom}; it has {waiting.num_tokens} tokens")
    lines.append(f"scheduler: {ring.scheduler.stats()}")
    lines.append(f"allocator: {ring.allocator.stats()}")
    lines.append(f"executor: {device.describe()}")
    lines.append(f"between scheduler and allocator: {ring.num_to_allocator} there, {ring.num_to_scheduler} back")
    for process in processes.values():
        lines += [f"mailbox of {name}: {len(box)} messages" for name, box in process.mailboxes.items() if len(box)]
    return tuple(lines)
