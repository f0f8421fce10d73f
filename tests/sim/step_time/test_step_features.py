from hypothesis import given
from hypothesis import strategies as st
from step_time_tools import decode_shapes, step_shapes

from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.step_features import FEATURES, features, regime

knot_lists = st.lists(st.integers(1, 5000), max_size=5, unique=True).map(sorted)


@given(step_shapes(), knot_lists)
def test_every_token_falls_into_one_stretch_between_knots(shape: StepShape, knots: list[int]) -> None:
    values = features(shape, knots)
    stretches = values[len(FEATURES) :]
    assert len(stretches) == len(knots) + 1
    assert sum(stretches) == shape.num_tokens
    for i, (knot, begin) in enumerate(zip(knots, [0, *knots], strict=False)):
        assert stretches[i] == sum(begin < token <= knot for token in range(1, shape.num_tokens + 1))


@given(decode_shapes(), st.integers(0, 50))
def test_only_the_sum_of_lengths_changes_as_rows_decode_on(shape: StepShape, num_steps: int) -> None:
    now, later = features(shape, [4]), features(shape.after_decodes(num_steps), [4])
    kv = FEATURES.index("decode_kv")
    assert later[kv] == now[kv] + num_steps * shape.num_decodes
    assert later[:kv] + later[kv + 1 :] == now[:kv] + now[kv + 1 :]
    assert min(now) >= 0


def test_the_regime_is_told_from_the_rows() -> None:
    assert regime(StepShape(2, 9, 5, (), 2)) == "decode"
    assert regime(StepShape(0, 0, 0, ((3, 0),), 1)) == "prefill"
    assert regime(StepShape(2, 9, 5, ((3, 0),), 2)) == "mixed"
