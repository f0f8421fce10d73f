"""One rank of a group of processes, for tests: `python rank_worker.py JOBS OUT RANK`.

JOBS is a msgpack file of `RankJob`s, run one after the other; OUT gets what the rank said to each, as `RankAnswer`s.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from octavo.actors.executor.config import ExecutorConfig
from octavo.messages.ids import Epoch
from octavo.messages.step import ExecuteStep, StepExecuted


class RankJob(msgspec.Struct):
    """Load, begin epoch 1, execute."""

    config: ExecutorConfig
    steps: list[ExecuteStep]
    dies_before_step: int = -1  # the last rank does: such a job must be the last


class RankAnswer(msgspec.Struct):
    executed: list[StepExecuted]
    num_blocks: int = 0
    kv_cache_bytes: int = 0
    error: str = ""
    error_type: str = ""


def run_job(job: RankJob, rank: int) -> RankAnswer:
    import torch

    from octavo.actors.executor.rank import RankExecutor

    torch.set_num_threads(1)
    answer = RankAnswer([])
    executor = None
    size = job.config.tensor_parallel_size * job.config.pipeline_parallel_size
    try:
        executor = RankExecutor(job.config, rank)
        facts = executor.load()
        answer.num_blocks, answer.kv_cache_bytes = facts.num_blocks, facts.kv_cache_bytes
        executor.begin_epoch(Epoch(1))
        for index, step in enumerate(job.steps):
            if index == job.dies_before_step and rank == size - 1:
                answer.error_type = "died"
                return answer
            executed = executor.execute(step)
            assert (executed is not None) == facts.speaks
            if executed is not None:
                answer.executed.append(executed)
    except Exception as error:
        answer.error, answer.error_type = str(error), type(error).__name__
    if executor is not None and not answer.error:
        executor.close()
    return answer


def run_ranks(jobs: list[RankJob], num_ranks: int, folder: Path) -> list[list[RankAnswer]]:
    """What each rank answered to each job."""
    folder.mkdir(parents=True)
    (folder / "jobs").write_bytes(msgspec.msgpack.encode(jobs))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / "jobs"), str(folder / f"out.{rank}"), str(rank)],
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    outs = [folder / f"out.{rank}" for rank in range(num_ranks)]
    for out, error in zip(outs, errors, strict=True):
        assert out.exists(), error
    return [msgspec.msgpack.decode(out.read_bytes(), type=list[RankAnswer]) for out in outs]


def main(jobs_path: str, out_path: str, rank: str) -> None:
    jobs = msgspec.msgpack.decode(Path(jobs_path).read_bytes(), type=list[RankJob])
    answers = [run_job(job, int(rank)) for job in jobs]
    Path(out_path).write_bytes(msgspec.msgpack.encode(answers))
    os._exit(0)  # nothing is taken leave of: a rank that died is gone at once


if __name__ == "__main__":
    main(*sys.argv[1:])
