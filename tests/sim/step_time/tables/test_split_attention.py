import msgspec
import pytest
from step_time_tools import H100, TINY

from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.roofline import RooflineModel
from octavo.sim.step_time.tables.grid import Curve, Grid
from octavo.sim.step_time.tables.split_attention import ClosedFormAttention, SplitAttention

PROMPTS = Curve([(1, 10), (100, 20), (200, 60), (1000, 1660)])
DECODES = Grid({(n, kv): 5.0 + n * kv for n in (1, 8) for kv in (1, 1000)})


def test_a_chunk_behind_history_is_the_difference_of_two_prompts() -> None:
    attention = SplitAttention(PROMPTS, DECODES, kv_read_ns=0.001)
    assert attention.mixed_ns(0, 0.0, ((100, 0),)) == 20
    assert attention.mixed_ns(0, 0.0, ((100, 100),)) == 10 + 60 - 20
    assert attention.mixed_ns(0, 0.0, ((100, 0), (100, 100))) == 10 + 10 + 40
    assert attention.mixed_ns(8, 500.0, ((100, 0),)) == pytest.approx(20 + 5 + 8 * 500)


def test_a_chunk_costs_at_least_the_reading_of_its_kv() -> None:
    attention = SplitAttention(PROMPTS, DECODES, kv_read_ns=3.0)
    assert attention.mixed_ns(0, 0.0, ((1, 99),)) == 10 + 300


def test_outside_is_beyond_the_longest_prompt_or_the_decodes() -> None:
    attention = SplitAttention(PROMPTS, DECODES, kv_read_ns=1.0)
    assert not attention.outside(8, 1000, ((100, 900),))
    assert attention.outside(0, 0, ((101, 900),))
    assert attention.outside(9, 1000, ())
    assert attention.outside(8, 1001, ())


@pytest.mark.parametrize("window", [0, 300])
def test_the_closed_forms_attention_is_that_of_the_roofline(window: int) -> None:
    model = msgspec.structs.replace(TINY, sliding_window=window, num_sliding_layers=2 if window else 0)
    roofline = RooflineModel(model, H100)
    attention = ClosedFormAttention(roofline)
    floor = roofline.efficiency.layer_ns
    for kv in (1, 299, 300, 5000):
        expected = floor + roofline.decode_attention_ns(6, 6 * kv) / model.num_layers
        assert attention.decode_curve(6).at(kv) == pytest.approx(expected, rel=1e-6)
    mixed = attention.mixed_ns(6, 100.0, ((50, 20),))
    alone = roofline.decode_attention_ns(6, 600) + roofline.prefill_attention_ns(50, 20)
    assert mixed == pytest.approx(floor + alone / model.num_layers)
    assert not attention.outside(10**6, 10**6, ())
    assert roofline.num_extrapolated(StepShape(10**6, 10**9, 10**6, (), 1), 5) == 0
