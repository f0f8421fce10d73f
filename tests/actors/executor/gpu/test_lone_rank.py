"""What a rank hears of peers that are not there has the shape and dtype of what true ones say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu.lone_rank import LoneRank, lone_rank
from octavo.models.parallel import ParallelConfig, ParallelGroup

# A rank of two that share layers, then of two stages: all that a model asks of its group.
SAID = """
import json, sys
from octavo.models.parallel import ParallelConfig, ParallelGroup
import test_lone_rank as test

sizes, rank, path = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
group = ParallelGroup(ParallelConfig(**sizes, rank=rank, init_method=f"file://{path}", timeout_s=60.0))
print(json.dumps(test.said_by(group)))
group.leave()
"""


def said_by(group: ParallelGroup) -> list[object]:
    x = torch.ones((3, 4), dtype=torch.bfloat16)
    heard: list[torch.Tensor] = []
    if group.is_first_stage:
        heard += [group.all_reduce(x.clone().T), group.all_gather_columns(x)]
        if not group.is_last_stage:
            group.send_activations(x)
    else:
        heard.append(group.receive_activations(3, 4, dtype=x.dtype, device=x.device))
    if group.is_last_stage:
        group.send_tokens([1, 2])
    numbers = 0 if group.is_last_stage else len(group.receive_tokens(2))
    group.check_same([1], "a number")
    group.agree_on("a word", "word")
    return [
        [[list(each.shape), list(each.stride()), str(each.dtype)] for each in heard],
        *(numbers, group.minimum(5), group.num_ranks_on_host() <= group.world_size),
    ]


@pytest.mark.parametrize("sizes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_it_hears_what_a_true_rank_hears(sizes: dict[str, int], tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SAID, json.dumps(sizes), str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, output in enumerate(outputs):
        alone = LoneRank(ParallelConfig(**sizes, rank=rank, init_method="nobody"))
        assert said_by(alone) == json.loads(output)


def test_the_only_rank_is_no_such() -> None:
    config = ExecutorConfig(model_path="model")
    assert lone_rank(config, 0) is None
    group = lone_rank(ExecutorConfig(model_path="model", tensor_parallel_size=2, expert_parallel=True), 1)
    assert group is not None
    assert (group.tp_rank, group.tp_size, group.expert_parallel) == (1, 2, True)
    assert group.place_on_host() == (0, 1), "its process has the host's cores, and what stands for a GPU, to itself"
