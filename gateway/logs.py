"""How log lines look: for a person on a terminal, JSON for a collector."""

from __future__ import annotations

import sys

import structlog


def configure_logs(log_format: str) -> None:
    """Set up structlog once per process.

    Args:
        log_format: `human`, `json`, or `auto` (human if standard error is a terminal).
    """
    is_human = log_format == "human" or (log_format == "auto" and sys.stderr.isatty())
    processors: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if is_human else "iso", utc=not is_human),
    ]
    if is_human:
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()))
    else:
        processors += [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
