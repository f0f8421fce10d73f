from hypothesis import given
from hypothesis import strategies as st
from step_time_tools import H100, TINY, assert_run_equals_steps, decode_shapes, step_shapes

from octavo.sim.step_time.exposed_overhead import WithExposedOverhead
from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.roofline import RooflineModel

PLAIN = RooflineModel(TINY, H100, host=HostOverhead(5, 1))
MODEL = WithExposedOverhead(PLAIN, HostOverhead(1000, 10, 70_000))


@given(step_shapes())
def test_each_step_is_longer_by_the_overhead_and_the_host_is_as_it_was(shape: StepShape) -> None:
    rows = shape.num_decodes + len(shape.prefills)
    assert MODEL.step_ns(shape) == PLAIN.step_ns(shape) + 1000 + 10 * rows + 70_000 * bool(shape.prefills)
    assert MODEL.host_ns(shape) == PLAIN.host_ns(shape)


@given(decode_shapes(), st.integers(0, 40))
def test_a_run_of_decodes_equals_its_steps_bit_for_bit(shape: StepShape, num_steps: int) -> None:
    assert_run_equals_steps(MODEL, shape, num_steps)


def test_it_says_what_it_adds() -> None:
    assert MODEL.describe() == {
        **PLAIN.describe(),
        "exposed_step_ns": 1000,
        "exposed_row_ns": 10,
        "exposed_prefill_ns": 70_000,
    }
