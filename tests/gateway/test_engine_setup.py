"""What an engine's configuration means for its actors."""

from __future__ import annotations

from octavo.actors.scheduler.config import SchedulerConfig
from octavo.gateway.config import EngineConfig
from octavo.gateway.engine_setup import executor_process_spec, scheduler_config
from octavo.gateway.graph import ModelFacts
from octavo.messages.ids import Epoch
from octavo.messages.system import StartProcess


def facts(number: int) -> ModelFacts:
    return ModelFacts(
        name="m",
        folder="m",
        vocab_size=100 * number,
        max_model_len=64 * number,
        num_blocks=10 * number,
        kv_cache_bytes=number,
        dtype="float32",
        load_seconds=0.0,
    )


def test_everything_that_the_scheduler_can_be_told_is_told_by_the_configuration_or_the_model() -> None:
    config = EngineConfig(
        max_num_seqs=3,
        max_num_batched_tokens=33,
        block_size=8,
        enable_prefix_caching=False,
        max_num_queued_requests=5,
        max_num_queued_tokens=500,
        priority_aging_s=2.5,
        pipeline_depth=1,
        long_prefill_token_threshold=7,
    )
    usual, made = scheduler_config(EngineConfig(), facts(1)), scheduler_config(config, facts(2))
    assert (made.long_prefill_threshold, made.priority_aging_ns, made.num_blocks) == (7, 2_500_000_000, 20)
    same = [name for name in SchedulerConfig.__struct_fields__ if getattr(usual, name) == getattr(made, name)]
    assert same == ["max_executor_losses"]


def test_executors_on_one_host_know_which_of_how_many_replicas_they_are_of_and_share_no_gpu() -> None:
    config = EngineConfig(tensor_parallel_size=2, data_parallel_size=3, in_process=False)

    def replica_of(child: str, is_one_host: bool) -> tuple[int, int, int | None]:
        start = StartProcess(child, 1, Epoch(1))
        names = {"engine_name": "engine 1", "run_dir": "/run", "log_format": "human"}
        spec = executor_process_spec(
            config, "m", None, start, rank=0, edge_incarnation=1, is_one_host=is_one_host, **names
        ).config
        return spec.replica, spec.num_replicas, spec.gpu

    told = [replica_of(f"executor {index}", True) for index in (0, 1, 3, 5)]
    assert told == [(0, 3, 0), (0, 3, 1), (1, 3, 3), (2, 3, 5)]
    assert replica_of("executor 5", False)[:2] == (0, 1)  # of the others nothing is known here
