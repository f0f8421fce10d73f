"""F-22: a KV allocator whose books are wrong is found by its engine's audit, and replaced; no stream is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engines import engine_on, save_servable, tokens_of_all
from nursery_hooks import run_first
from process_family import named

PATIENCE_S = 240.0
NUM_STREAMS = 6

CORRUPTS = """
import os, sys
from pathlib import Path

# The nursery is started like this; its children inherit what is done here.
if any(part.endswith("runtime.nursery") for part in sys.orig_argv):
    from octavo.actors.engine import audit
    from octavo.actors.engine.process import EngineProcess

    audit.IDLE_NS = audit.BUSY_NS = 0
    wanted = Path(os.environ["CORRUPT"])
    tick = EngineProcess._tick

    def corrupt_and_tick(self):
        if wanted.exists() and self._scheduler is not None:
            wanted.unlink()
            self._allocator._pool.ref_counts[0] += 1
        tick(self)

    EngineProcess._tick = corrupt_and_tick
"""
"""Put where every Python looks at its start: once a file is there, the engine has one reference too many."""


def test_f_22_an_allocator_whose_books_are_wrong_costs_its_engine_and_no_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = tmp_path / "model", tmp_path / "wanted"
    model.mkdir()
    run_first(CORRUPTS, tmp_path / "hook", monkeypatch)
    monkeypatch.setenv("CORRUPT", str(wanted))
    save_servable("llama", model)

    async def scenario() -> None:
        async with engine_on(model, in_process=False) as engine:
            expected = await tokens_of_all(engine, NUM_STREAMS, max_tokens=90)
            assert engine.stats().actor_restarts["engine"] == 0, "books that are right are left alone"
            (before,) = named("engine")
            is_corrupted = False

            def corrupt() -> None:
                nonlocal is_corrupted
                if not is_corrupted:
                    is_corrupted = True
                    wanted.touch()

            got = await tokens_of_all(engine, NUM_STREAMS, corrupt, max_tokens=90)
            assert got == expected
            await asyncio.to_thread(before.wait)
            while engine.stats().actor_restarts["engine"] == 0:
                await asyncio.sleep(0.01)
            assert await tokens_of_all(engine, NUM_STREAMS, max_tokens=90) == expected
            assert engine.stats().actor_restarts["engine"] == 1
            assert engine.stats().num_quarantined == 0

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
