"""How log lines look: for a person on a terminal, JSON for a collector."""

from __future__ import annotations

import contextlib
import sys

import structlog


class StderrLogger:
    """Writes to whatever standard error is now; a log that is closed or full must never break what it tells of."""

    def __init__(self, *_: object) -> None:
        pass

    def msg(self, message: str) -> None:
        """Write one line."""
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


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
        formatter = structlog.dev.RichTracebackFormatter(show_locals=False)
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=formatter))
    else:
        # Without the variables of the frames: they hold prompts, keys and the environment.
        transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        processors += [structlog.processors.ExceptionRenderer(transformer), structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=processors,
        logger_factory=StderrLogger,
        cache_logger_on_first_use=True,
    )
