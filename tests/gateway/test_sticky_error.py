"""F-12: a device whose context is broken for good fails every step from then on, until its process is replaced."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engines import engine_on, save_servable, tokens_of_all
from nursery_hooks import run_first
from process_family import named

PATIENCE_S = 240.0
NUM_STREAMS = 8

BREAKS = """
import os, sys
from pathlib import Path

# The nursery is started like this; its children inherit what is done here.
if any(part.endswith("runtime.nursery") for part in sys.orig_argv):
    from octavo.actors.executor.device import Device

    broken = Path(os.environ["BROKEN"])

    def break_too(method):
        def call(self, *args):
            if broken.exists() and broken.read_text() == str(os.getpid()):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return method(self, *args)

        return call

    Device.forward = break_too(Device.forward)
    Device.reset = break_too(Device.reset)
"""
"""Put where every Python looks at its start: whatever the process whose pid stands in a file asks of its device fails,
as all calls do after a sticky error."""


def test_f_12_a_process_whose_device_is_broken_for_good_is_replaced_and_streams_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, broken = tmp_path / "model", tmp_path / "broken"
    model.mkdir()
    run_first(BREAKS, tmp_path / "hook", monkeypatch)
    monkeypatch.setenv("BROKEN", str(broken))
    save_servable("llama", model)

    async def scenario() -> None:
        async with engine_on(model, in_process=False) as engine:
            expected = await tokens_of_all(engine, NUM_STREAMS)
            (executor,) = named("executor 0")

            def break_executor() -> None:
                broken.with_suffix(".new").write_text(str(executor.pid))
                broken.with_suffix(".new").rename(broken)

            assert await tokens_of_all(engine, NUM_STREAMS, break_executor) == expected
            await asyncio.to_thread(executor.wait)
            # A new epoch in the old process first, which cannot even begin it; then another process.
            assert engine.stats().actor_restarts["executor"] == 2
            assert engine.stats().num_quarantined == 0, "an accident convicts nobody"

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
