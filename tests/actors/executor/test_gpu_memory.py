"""How a GPU's memory is shared out."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.actors.executor.gpu_memory import (
    GIB,
    MARGIN_BYTES,
    MeasuredMemory,
    as_table,
    graph_reserve,
    log_fields,
    rounding_bytes,
    share_out,
    state_bytes,
)
from octavo.messages.errors import InvalidConfigError

H200 = MeasuredMemory(
    total=140 * GIB, foreign=GIB // 2, weights=15 * GIB, activations=2 * GIB, runtime=GIB // 2, state=0, graphs=GIB
)


def test_the_share_is_of_all_memory_and_everything_else_comes_off_it() -> None:
    plan = share_out(H200, memory_utilization=0.9)
    assert plan.kv_bytes == 126 * GIB - 19 * GIB
    assert plan.share == pytest.approx(0.9)
    assert not plan.note


def test_a_share_that_leaves_no_margin_is_lowered_and_said() -> None:
    plan = share_out(H200, memory_utilization=1.0)
    assert plan.kv_bytes == 140 * GIB - 19 * GIB - MARGIN_BYTES
    assert "lowered to 0.998" in plan.note


def test_an_exact_size_is_taken_as_it_is_or_refused_with_the_numbers() -> None:
    assert share_out(H200, memory_utilization=0.1, asked_bytes=100 * GIB).kv_bytes == 100 * GIB
    with pytest.raises(InvalidConfigError) as caught:
        share_out(H200, memory_utilization=0.9, asked_bytes=121 * GIB, asked_as="kv_cache_memory_bytes")
    error = str(caught.value)
    for words in ("121.00 GiB", "140.00 GiB", "weights 15.00 GiB", "leave 120.75 GiB", str(121 * GIB - MARGIN_BYTES)):
        assert words in error
    assert caught.value.field == "kv_cache_memory_bytes"


def test_a_share_that_is_too_small_says_how_much_it_takes() -> None:
    with pytest.raises(InvalidConfigError, match=r"leave nothing .* more than 0\.136") as caught:
        share_out(H200, memory_utilization=0.1)
    assert caught.value.field == "memory_utilization"


@pytest.mark.parametrize(
    ("field", "advice"),
    [
        ("foreign", "end the other processes"),
        ("activations", "lower --max-num-batched-tokens"),
        ("graphs", "--cuda-graph-sizes"),
        ("weights", "--tensor-parallel-size"),
    ],
)
def test_what_takes_too_much_is_named_with_its_cure(field: str, advice: str) -> None:
    measured = msgspec.structs.replace(H200, **{field: 125 * GIB})
    with pytest.raises(InvalidConfigError, match=advice):
        share_out(measured, memory_utilization=0.9)


@given(
    total=st.integers(1, 200 * GIB),
    parts=st.lists(st.integers(0, 50 * GIB), min_size=7, max_size=7),
    utilization=st.floats(0.01, 1.0),
    asked=st.none() | st.integers(1, 300 * GIB),
)
def test_whatever_is_asked_for_all_fits_with_a_margin_or_is_refused(
    total: int, parts: list[int], utilization: float, asked: int | None
) -> None:
    names = ("foreign", "weights", "activations", "runtime", "state", "graphs", "rounding")
    measured = MeasuredMemory(total=total, **dict(zip(names, parts, strict=True)))
    try:
        plan = share_out(measured, memory_utilization=utilization, asked_bytes=asked, asked_as="num_blocks")
    except InvalidConfigError:
        if asked is None:
            assert min(int(utilization * total), total - MARGIN_BYTES) <= sum(parts)
        else:
            assert asked + sum(parts) + MARGIN_BYTES // 2 > total
        return
    margin = MARGIN_BYTES if asked is None else MARGIN_BYTES // 2
    assert 0 < plan.kv_bytes <= total - sum(parts) - margin
    assert asked is None or plan.kv_bytes == asked
    assert asked is not None or plan.kv_bytes <= utilization * total


def test_the_table_adds_up_and_the_log_line_has_the_same_numbers() -> None:
    plan = share_out(H200, memory_utilization=1.0)
    bytes_per_block = 16 * 144 * 1024
    num_blocks = plan.kv_bytes // bytes_per_block
    lines = as_table(plan, num_blocks=num_blocks, bytes_per_block=bytes_per_block, block_size=16).splitlines()
    *parts, total = [float(line.split()[0]) for line in lines if "GiB  " in line]
    assert sum(parts) == pytest.approx(total, abs=0.05)
    assert lines[-1] == plan.note
    fields = log_fields(plan, num_blocks=num_blocks, bytes_per_block=bytes_per_block)
    assert fields["total"] == 140.0
    assert fields["num_blocks"] == num_blocks
    assert fields["share"] == pytest.approx(0.998, abs=1e-3)


def test_what_was_given_once_is_given_again_though_a_little_more_is_measured() -> None:
    """To an executor that is started again."""
    given = share_out(H200, memory_utilization=1.0).kv_bytes
    more = msgspec.structs.replace(H200, runtime=H200.runtime + MARGIN_BYTES // 2)
    assert share_out(more, memory_utilization=1.0, asked_bytes=given).kv_bytes == given
    much_more = msgspec.structs.replace(more, runtime=more.runtime + 1)
    with pytest.raises(InvalidConfigError, match="num_blocks asks"):
        share_out(much_more, memory_utilization=1.0, asked_bytes=given, asked_as="num_blocks")


def test_graphs_take_what_the_largest_one_needs_and_something_each() -> None:
    few = graph_reserve(2, largest_bytes=80_000)
    assert few == 90_000 + 2 * 6 * 1024**2
    assert graph_reserve(2, largest_bytes=80_000, workspace_bytes=300) == few + 300
    assert graph_reserve(0, largest_bytes=80_000, workspace_bytes=300) == 0


def test_each_tensor_of_the_cache_is_rounded_up_to_less_than_two_mebibytes_more() -> None:
    assert rounding_bytes(2 * 28) == 112 * 1024**2


def test_state_grows_with_requests_and_context() -> None:
    assert state_bytes(num_rows=3, num_step_rows=1, max_model_len=32, block_size=16) == 4 * (3 * (33 + 2) + 2)
