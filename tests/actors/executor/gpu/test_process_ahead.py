"""An executor process whose runner launches ahead, its device a thread beside it, in a whole engine of processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from engines import engine_on, save_servable
from tiny_models import greedy_reference, random_token_ids

from octavo import Engine, SamplingParams

PROMPTS = [random_token_ids(21, seed=1), random_token_ids(9, seed=2), random_token_ids(13, seed=3)]
NUM_NEW_TOKENS = 48

LAUNCHES_AHEAD = """
import sys

# The nursery is started like this; its children inherit what is done here.
if any(part.endswith("runtime.nursery") for part in sys.orig_argv):
    from concurrent.futures import ThreadPoolExecutor

    from octavo.actors.executor import rank
    from octavo.actors.executor.device import Device
    from octavo.actors.executor.gpu.runner import GpuRunner

    class OnThread:
        def __init__(self, future):
            self.is_done, self.wait = future.done, future.result

    class ThreadStream:
        def __init__(self):
            self.pool = ThreadPoolExecutor(max_workers=1)

        def submit(self, work):
            return OnThread(self.pool.submit(work))

    class LateRunner(GpuRunner):
        num_late = 3  # as if so many kernels had been compiled by steps

    def load_runner(config, group):
        open("MARKER", "a").close()
        return LateRunner(
            Device(config, group),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            pipeline_depth=config.pipeline_depth,
            block_size=config.block_size,
            graph_sizes=(1, 4),
            stream=ThreadStream(),
        )

    rank.load_runner = load_runner
"""
"""Put where every Python looks at its start: the product has no hook for this."""


def executor_process() -> psutil.Process:
    for process in psutil.Process().children(recursive=True):
        if process.cmdline()[:1] == ["octavo: executor 0"]:
            return process
    raise AssertionError("there is no executor")


def test_streams_are_those_of_transformers_and_go_on_when_the_executor_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook, folder = tmp_path / "hook", tmp_path / "model"
    hook.mkdir()
    folder.mkdir()
    (hook / "sitecustomize.py").write_text(LAUNCHES_AHEAD.replace("MARKER", str(tmp_path / "launches ahead")))
    monkeypatch.syspath_prepend(str(hook))  # the nursery looks where this process looks
    reference = save_servable("qwen3", folder)
    expected = [greedy_reference(reference, prompt, NUM_NEW_TOKENS) for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, ignore_eos=True)

    async def generate(engine: Engine) -> list[list[int]]:
        outputs = await asyncio.gather(*(engine.generate(prompt, params) for prompt in PROMPTS))
        return [list(output.outputs[0].token_ids) for output in outputs]

    async def main() -> None:
        async with engine_on(folder, in_process=False, pipeline_depth=2) as engine:
            assert await generate(engine) == expected
            while engine.stats().num_late_compilations != 3:  # it tells four times a second
                await asyncio.sleep(0)
            streams = asyncio.create_task(generate(engine))
            while engine.stats().num_running < len(PROMPTS) and not streams.done():
                await asyncio.sleep(0)
            executor_process().kill()
            assert await streams == expected
            assert await generate(engine) == expected
            while engine.stats().num_late_compilations < 2 * 3:  # of the one that was killed, and of its successor
                await asyncio.sleep(0)
            assert engine.stats().num_late_compilations == 2 * 3

    asyncio.run(asyncio.wait_for(main(), 300))
    assert (tmp_path / "launches ahead").exists()
