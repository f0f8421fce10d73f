"""Octavo itself, measured in a process like any peer's."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any

import psutil

from ...messages.sampling import SamplingParams
from ..config import make_config
from ..engine import Engine
from .adapter import LoadOptions, Request, versions_of


class Octavo:
    """An `Engine` on an event loop of its own.

    Args:
        deterministic: with `--deterministic` or without, to compare with itself; None: as the engine sees fit.
    """

    def __init__(self, deterministic: bool | None = None) -> None:
        self._more = {} if deterministic is None else {"deterministic": deterministic}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._temperature = 0.0

    def is_available(self, options: LoadOptions) -> str:
        return ""

    def versions(self) -> dict[str, str]:
        return versions_of("octavo", "torch")

    def load(self, options: LoadOptions) -> dict[str, Any]:
        self._temperature = options.temperature
        config = make_config({**options.engine_fields, "num_threads": options.num_threads, **self._more})
        engine, loop = Engine(config=config), asyncio.new_event_loop()
        loop.run_until_complete(engine.start())
        self._engine, self._loop = engine, loop
        return {
            "folder": engine.model_folder,
            "dtype": engine.dtype,
            "vocab_size": engine.vocab_size,
            "max_model_len": engine.max_model_len,
            "weights_s": engine.load_seconds,
            "kv_bytes_per_token": engine.kv_cache_bytes / (engine.num_blocks * config.block_size),
            "threads_bound_to": bound_cores() or "no core",
            "deterministic": "yes" if engine.is_deterministic else "no",
        }

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        assert self._loop is not None, "load() comes before run()"
        return self._loop.run_until_complete(self._generate(requests))

    async def _generate(self, requests: Sequence[Request]) -> list[list[int]]:
        engine = self._engine
        assert engine is not None, "load() comes before run()"
        outputs = await asyncio.gather(
            *(
                engine.generate(
                    request.token_ids,
                    SamplingParams(
                        temperature=self._temperature, max_tokens=request.num_output_tokens, ignore_eos=True
                    ),
                )
                for request in requests
            )
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def bound_cores() -> str:
    """The cores that single threads of this process and its children are bound to, as the system has it."""
    if not hasattr(os, "sched_getaffinity"):
        return ""
    found: set[int] = set()
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # what has ended meanwhile computes nothing
            for thread in process.threads():
                if len(cores := os.sched_getaffinity(thread.id)) == 1:
                    found |= cores
    return ",".join(map(str, sorted(found)))
