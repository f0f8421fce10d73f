"""Several processes against one: real ones, that speak through gloo and execute what scheduler and allocator plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from rank_worker import RankAnswer, RankJob, run_ranks
from recorded_steps import record, sized
from tiny_models import save_tiny_model

from octavo.actors.executor.config import ExecutorConfig
from octavo.kernels import linear_deterministic
from octavo.messages.request import TokenLogprobs
from octavo.messages.step import StepExecuted

_WIDE = {"head_dim": 32, "intermediate_size": 256}

# Model type, what is special about the checkpoint, what about its executor.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
    "llama-one-kv-head-odd-vocabulary": ("llama", {"num_key_value_heads": 1, "vocab_size": 257}, {}),
    "llama-deterministic": ("llama", {}, {"deterministic": True}),
    "mistral": ("mistral", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}, {}),
    "smollm3": ("smollm3", {}, {}),
    "gemma2": ("gemma2", {}, {}),
    "gemma2-deterministic-odd-vocabulary": (
        "gemma2",
        {"vocab_size": 257, "num_hidden_layers": 4},
        {"deterministic": True},
    ),
    "gemma3": ("gemma3_text", {}, {}),
    "mixtral": ("mixtral", {}, {}),
    "qwen3-moe": ("qwen3_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True}, {}),
    "gpt-oss": ("gpt_oss", {}, {}),
    "int8": ("llama", {**_WIDE, "tie_word_embeddings": True}, {"quantization": "int8"}),
    "int4-moe": ("qwen3_moe", {**_WIDE, "moe_intermediate_size": 64}, {"quantization": "int4"}),
}
WITH_EXPERTS = ("mixtral", "qwen3-moe", "gpt-oss", "int4-moe")
OF_FOUR = ("llama-one-kv-head-odd-vocabulary", "qwen3-tied", "gemma3", "qwen3-moe", "gpt-oss")


class Recording(msgspec.Struct):
    config: ExecutorConfig
    steps: list[Any]
    executed: list[StepExecuted]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recording]:
    """Each case as one process serves it."""
    found = {}
    for name, (model_type, overrides, fields) in CASES.items():
        if fields.get("deterministic") and not linear_deterministic.is_available():
            continue  # there is no compiler
        folder = tmp_path_factory.mktemp(name)
        save_tiny_model(model_type, folder, seed=7, **overrides)
        config = ExecutorConfig(model_path=str(folder), dtype="float32", model_impl="native", **fields)
        found[name] = Recording(config, *record(config))
    return found


def job(recording: Recording, meet: Path, **fields: Any) -> RankJob:
    config = msgspec.structs.replace(sized(recording.config), init_method=f"file://{meet}", check_ranks=True, **fields)
    return RankJob(config, recording.steps)


@pytest.fixture(scope="module")
def answers(
    recordings: dict[str, Recording], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[RankAnswer]]:
    """Two processes serve every case in every way in which two can, and four some of them in both at once."""
    folder = tmp_path_factory.mktemp("ranks")
    found: dict[tuple[str, str], list[RankAnswer]] = {}
    for num_ranks in (2, 4):
        jobs: dict[tuple[str, str], RankJob] = {}
        for name, recording in recordings.items():
            ways: dict[str, dict[str, Any]] = {}
            if num_ranks == 2:
                ways["tp"] = {"tensor_parallel_size": 2}
                ways["pp"] = {"pipeline_parallel_size": 2}
                if name in WITH_EXPERTS:
                    ways["ep"] = {"tensor_parallel_size": 2, "expert_parallel": True}
            elif name in OF_FOUR:
                is_ep = name in WITH_EXPERTS
                ways["both"] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel": is_ep}
            for way, fields in ways.items():
                jobs[name, way] = job(recording, folder / f"{name}.{way}", **fields)
        if num_ranks == 2:
            fields = {"tensor_parallel_size": 2, "collective_timeout_s": 60.0}
            jobs["llama", "one dies"] = job(recordings["llama"], folder / "dies", **fields)
            jobs["llama", "one dies"].dies_before_step = 5
        of_ranks = run_ranks(list(jobs.values()), num_ranks, folder / f"{num_ranks}")
        for index, key in enumerate(jobs):
            found[key] = [rank[index] for rank in of_ranks]
    return found


WAYS = [
    *((name, way) for name in CASES for way in ("tp", "pp")),
    *((name, "ep") for name in WITH_EXPERTS),
    *((name, "both") for name in OF_FOUR),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_several_processes_give_the_tokens_of_one(
    name: str, way: str, recordings: dict[str, Recording], answers: dict[tuple[str, str], list[RankAnswer]]
) -> None:
    if name not in recordings:
        pytest.skip("there is no compiler")
    expected, ranks = recordings[name].executed, answers[name, way]
    assert [rank.error for rank in ranks] == [""] * len(ranks)
    speaking = [rank for rank in ranks if rank.executed]
    assert len(speaking) == 1
    assert len(expected) == len(speaking[0].executed)
    for ours, theirs in zip(speaking[0].executed, expected, strict=True):
        assert ours.step_id == theirs.step_id
        assert (ours.request_ids, ours.token_ids, ours.stopped) == (
            theirs.request_ids,
            theirs.token_ids,
            theirs.stopped,
        )
        assert ours.failed == theirs.failed == ()
        assert_same_logprobs([entry for _, entry in ours.logprobs], [entry for _, entry in theirs.logprobs])
        assert_same_logprobs(
            [entry for *_, entries in ours.prompt_logprobs for entry in entries],
            [entry for *_, entries in theirs.prompt_logprobs for entry in entries],
        )


def test_the_death_of_a_rank_is_an_error_on_the_others_and_no_wait(
    recordings: dict[str, Recording], answers: dict[tuple[str, str], list[RankAnswer]]
) -> None:
    left, dead = answers["llama", "one dies"]
    assert dead.error_type == "died"
    assert left.error_type == "PeerLostError"
    assert "rank 0 of 2 waited for another that is gone" in left.error
    expected = recordings["llama"].executed
    assert [step.token_ids for step in left.executed] == [step.token_ids for step in expected[: len(left.executed)]]
    assert len(left.executed) >= 5


def assert_same_logprobs(ours: list[TokenLogprobs], theirs: list[TokenLogprobs]) -> None:
    """The same tokens in the same order; sums in another order move the last bits of a logarithm."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def test_the_recorded_workload_is_as_hard_as_it_says(recordings: dict[str, Recording]) -> None:
    steps = recordings["llama"].steps
    starts = [start for step in steps for start in step.start]
    assert any(start.num_computed_tokens > 0 for start in starts), "a prefix is found"
    assert len(starts) > len({start.request_id for start in starts}), "a request is preempted and taken up again"
    assert any(n > 1 for step in steps for n in step.num_tokens)
    executed = recordings["llama"].executed
    assert any(step.logprobs for step in executed) and any(step.prompt_logprobs for step in executed)
    assert len({token for step in executed for token in step.token_ids}) > 10


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_every_rank_holds_as_many_blocks_and_its_part_of_their_bytes(
    name: str, way: str, recordings: dict[str, Recording], answers: dict[tuple[str, str], list[RankAnswer]]
) -> None:
    if name not in recordings:
        pytest.skip("there is no compiler")
    assert {rank.num_blocks for rank in answers[name, way]} == {sized(recordings[name].config).num_blocks}
    shared = {"tp": 2, "ep": 2, "pp": 2, "both": 4}[way]
    if "one-kv-head" in name and way in ("tp", "both"):
        shared //= 2  # each has a copy of the one head
    overrides = CASES[name][1]
    heads, width = overrides.get("num_key_value_heads", 2), overrides.get("head_dim", 16)
    config = recordings[name].config
    num_layers = overrides.get("num_hidden_layers") or {"smollm3": 4, "gemma2": 4, "gemma3": 4}.get(name, 2)
    in_all = sized(config).num_blocks * 4 * heads * 2 * width * 4 * num_layers
    total = sum(rank.kv_cache_bytes for rank in answers[name, way])
    assert total == in_all * len(answers[name, way]) // shared
