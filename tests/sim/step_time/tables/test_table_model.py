from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_time_tools import assert_run_equals_steps, decode_shapes

from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.tables.grid import Curve
from octavo.sim.step_time.tables.table_model import TableModel, TableParts, wave_spread


class Attention:
    """1 ns for each row and KV token; bent at 700, so that not all is one line."""

    def decode_curve(self, num_decodes: int) -> Curve:
        return Curve([(0, 0), (700, 700 * num_decodes), (1000, 1150.0 * num_decodes)])

    def mixed_ns(self, num_decodes: int, decode_kv: float, prefills: Sequence[tuple[int, int]]) -> float:
        return num_decodes * decode_kv + sum(new * (history + new) for new, history in prefills)

    def outside(self, num_decodes: int, longest_kv: int, prefills: Sequence[tuple[int, int]]) -> bool:
        return longest_kv > 1000 or num_decodes > 250


def make_model(spread: float = 0.0) -> TableModel:
    parts = TableParts(
        num_layers=3,
        dense_ns=lambda num_tokens: 1000.0 * num_tokens + 0.3,
        sample_ns=lambda num_samples: 50.0 + num_samples,
        max_tokens=500,
        max_samples=260,
        attention=Attention(),
        length_spread=lambda num_decodes: spread,
        source={"kind": "tables"},
    )
    return TableModel(parts, HostOverhead(7, 1))


@given(decode_shapes(max_len=1100), st.integers(0, 70), st.sampled_from([0.0, 0.1, 0.37, 1.0]))
def test_a_run_of_decodes_equals_its_steps_bit_for_bit(shape: StepShape, num_steps: int, spread: float) -> None:
    assert_run_equals_steps(make_model(spread), shape, num_steps)


def test_a_step_is_the_sum_of_its_parts() -> None:
    model = make_model()
    assert model.step_ns(StepShape(4, 400, 100, (), 4)) == 4000 + 54 + 3 * 400
    assert model.step_ns(StepShape(0, 0, 0, ((10, 5),), 0)) == 10_000 + 3 * 150
    assert model.step_ns(StepShape(4, 400, 100, ((10, 5),), 5)) == 14_000 + 55 + 3 * (400 + 150)


def test_rows_of_unequal_length_cost_more_than_their_mean_and_less_than_their_longest() -> None:
    unequal, mean, longest = (StepShape(4, 400, kv, (), 4) for kv in (300, 100, 300))
    longest = StepShape(4, 1200, 300, (), 4)
    times = [make_model(spread).step_ns(unequal) for spread in (0.0, 0.25, 1.0)]
    assert times == [
        make_model().step_ns(mean),
        make_model().step_ns(StepShape(4, 600, 150, (), 4)),
        make_model().step_ns(longest),
    ]


@pytest.mark.parametrize(
    ("shape", "num_outside"),
    [
        (StepShape(5, 2500, 900, (), 5), 0),
        (StepShape(5, 2500, 1001, (), 5), 1),
        (StepShape(251, 2500, 900, (), 5), 1),
        (StepShape(5, 2500, 900, ((496, 0),), 5), 1),
        (StepShape(5, 2500, 900, ((495, 0),), 5), 0),
        (StepShape(5, 2500, 900, (), 261), 1),
    ],
)
def test_what_lies_outside_the_tables_counts_as_extrapolated(shape: StepShape, num_outside: int) -> None:
    assert make_model().num_extrapolated(shape, 1) == num_outside


def test_rows_that_grow_out_of_the_tables_count_from_there_on() -> None:
    assert make_model().num_extrapolated(StepShape(5, 2500, 995, (), 5), 100) == 94


def test_unequal_lengths_matter_while_all_blocks_of_work_run_at_once() -> None:
    spread = wave_spread(num_kv_heads=8, num_sms=100)  # 25 rows fill the GPU once
    assert spread(1) == spread(25) == pytest.approx(0.3)
    assert spread(26) < spread(25)
    assert spread(75) == pytest.approx(0.3 / 27)


def test_host_time_and_description() -> None:
    model = make_model()
    assert model.host_ns(StepShape(3, 3, 1, (), 3)) == 10
    assert model.describe() == {"kind": "tables", "host_step_ns": 7, "host_row_ns": 1}
