"""Who holds what, and which sizes are possible."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import unconnected_ranks
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_model

from octavo.models.errors import UnsupportedModelError
from octavo.models.parallel import ParallelConfig, ParallelGroup
from octavo.models.registry import load_model
from octavo.models.sharding import check_sizes, share_evenly, share_heads, share_roughly, stage_layers


def member(rank: int = 0, tp: int = 1, pp: int = 1, **fields: Any) -> Any:
    """A rank as the arithmetic of sharing sees it; no process is needed for that."""
    pp_rank, tp_rank = divmod(rank, tp)
    values = {"rank": rank, "tp_size": tp, "pp_size": pp, "tp_rank": tp_rank, "pp_rank": pp_rank}
    edges = {"is_first_stage": pp_rank == 0, "is_last_stage": pp_rank == pp - 1}
    return SimpleNamespace(**{**values, **edges, "world_size": tp * pp, "expert_parallel": False, **fields})


@given(per_rank=st.integers(1, 6), tp=st.integers(1, 8), head_dim=st.integers(1, 8), data=st.data())
def test_every_query_head_is_held_once_beside_the_kv_head_that_it_reads(
    per_rank: int, tp: int, head_dim: int, data: st.DataObject
) -> None:
    num_heads = per_rank * tp
    allowed = [n for n in range(1, num_heads + 1) if num_heads % n == 0 and (n % tp == 0 or tp % n == 0)]
    num_kv_heads = data.draw(st.sampled_from(allowed))
    held = []
    for rank in range(tp):
        share = share_heads(member(rank, tp), num_heads, num_kv_heads, head_dim)
        assert share.q.stop - share.q.start == share.num_heads * head_dim
        assert share.kv.stop - share.kv.start == share.num_kv_heads * head_dim
        for index in range(share.num_heads):
            head = share.q.start // head_dim + index
            held.append(head)
            local_kv = index // (share.num_heads // share.num_kv_heads)
            assert share.kv.start // head_dim + local_kv == head // (num_heads // num_kv_heads)
    assert held == list(range(num_heads))


@given(parts=st.integers(1, 9), size=st.integers(0, 60))
def test_runs_cover_everything_once_and_differ_by_one_at_most(parts: int, size: int) -> None:
    runs = [share_roughly(index, parts, size) for index in range(parts)]
    assert runs[0].start == 0 and runs[-1].stop == size
    assert all(one.stop == other.start for one, other in pairwise(runs))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_features_and_layers_follow_the_rank_s_place() -> None:
    assert share_evenly(member(3, 4), 32) == slice(24, 32)
    assert [list(stage_layers(member(rank, 2, 2), 5)) for rank in range(4)] == [[0, 1], [0, 1], [2, 3, 4], [2, 3, 4]]


@pytest.mark.parametrize(
    ("model_type", "overrides", "fields", "message"),
    [
        ("llama", {}, {"tp": 3}, r"tensor_parallel_size=3 cannot divide 4 attention heads, .* among 1, 2, 4 ranks"),
        ("gemma2", {}, {"tp": 8}, r"tensor_parallel_size=8 cannot divide 4 attention heads; .* among 1, 2, 4 ranks"),
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 96},
            {"tp": 2},
            r"3 KV heads; .* among 1, 3, 6, 12 ranks",
        ),
        ("llama", {"intermediate_size": 66}, {"tp": 4}, r"intermediate_size of 66; .* among 1, 2 ranks"),
        ("llama", {}, {"pp": 3}, r"pipeline_parallel_size=3: the model has 2 layers, so at most 2 stages"),
        ("llama", {}, {"tp": 2, "expert_parallel": True}, "expert_parallel: the model is no mixture"),
        (
            "llama",
            {},
            {"tp": 2, "quantization": "int8"},
            r"attention of 64 in groups of 64 quantised weights; .* among 1, that is, not at all",
        ),
        (
            "qwen3_moe",
            {"moe_intermediate_size": 18},
            {"tp": 4},
            r"expert's intermediate size of 18; .* 1, 2 ranks",
        ),
        ("gpt2", {}, {"tp": 2}, "served through transformers, in one process only"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can(
    model_type: str, overrides: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_tiny_model(model_type, tmp_path, **overrides)
    fields = dict(fields)
    quantization = fields.pop("quantization", "auto")
    group = member(**fields)
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(tmp_path, dtype="float32", quantization=quantization, group=group)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: it must be at least 1"),
        ({"tensor_parallel_size": 2, "rank": 2, "init_method": "file:///x"}, "rank=2 is not one of the group's 2"),
        ({"pipeline_parallel_size": 2}, "several ranks need an init_method"),
        ({"expert_parallel": True}, "expert_parallel divides the experts among the ranks of tensor_parallel_size"),
    ],
)
def test_a_place_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ParallelConfig(**fields)


def test_alone_nothing_is_exchanged() -> None:
    import torch

    group = ParallelGroup(ParallelConfig())
    x = torch.ones(2, 3)
    assert group.all_reduce(x) is x and group.all_gather_columns(x) is x
    assert group.minimum(7) == 7 and group.place_on_host() == (0, 1) and group.num_ranks_on_host() == 1 and group.speaks
    group.send_tokens([1, 2])
    group.check_same([1], "tokens")
    group.agree_on("the dtype", "float32")
    assert not torch.distributed.is_initialized()
    group.leave()


def test_ranks_on_one_host_are_counted_in_their_order() -> None:
    group = unconnected_ranks.member(2, 4)
    group._of_all = lambda here: [here, here + 1, here, here]  # type: ignore[method-assign]
    assert group.place_on_host() == (1, 3)


@given(size=st.integers(1, 12), vocab_size=st.integers(1, 200))
def test_a_vocabulary_is_divided_only_if_each_rank_has_a_word(size: int, vocab_size: int) -> None:
    try:
        check_sizes(member(0, size), 1, size, size, vocab_size, {}, 1)
    except UnsupportedModelError as error:
        assert size > 1
        assert f"a vocabulary of {vocab_size}" in str(error)
        assert vocab_size < size * size
    else:
        width = -(-vocab_size // size)  # of each rank but the last
        assert size == 1 or vocab_size > (size - 1) * width


@pytest.mark.parametrize(("size", "num_experts", "is_possible"), [(4, 4, True), (4, 3, False), (4, 60, True)])
def test_experts_are_divided_only_if_each_rank_has_one(size: int, num_experts: int, is_possible: bool) -> None:
    group = member(0, size, expert_parallel=True)
    if is_possible:
        check_sizes(group, 1, size, size, 1000, {}, 1, num_experts)
        return
    with pytest.raises(UnsupportedModelError, match=r"cannot divide 3 experts; .* among 1, 2 ranks"):
        check_sizes(group, 1, size, size, 1000, {}, 1, num_experts)
