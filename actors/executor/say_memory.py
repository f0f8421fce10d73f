"""Says at start how a GPU's memory is shared out: one line with all numbers, then one for each that adds up."""

from __future__ import annotations

import structlog

from .device import Device

log = structlog.get_logger("octavo.executor")


def say_memory(device: Device) -> None:
    """Log the arithmetic of the KV cache's size on a GPU; nothing on a CPU."""
    report = device.memory_report()
    if report is None:
        return
    fields, table = report
    log.info("gpu.memory", unit="GiB", **fields)
    for line in table.splitlines():
        log.info(f"gpu.memory {line}")
