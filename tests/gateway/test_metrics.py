from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.gateway.metrics import ITL_BUCKETS, TokenHistogram

gaps = st.sampled_from([0.0, *ITL_BUCKETS, 0.0101, 3.0, 1e6])


@given(st.lists(gaps))
def test_each_gap_is_counted_in_its_bucket_also_when_it_comes_again(values: list[float]) -> None:
    histogram = TokenHistogram((("gap", "Time."),), ITL_BUCKETS, ("model", "0"))
    for value in values:
        histogram.observe(value)
    (family,) = histogram.collect()
    counts = {sample.labels["le"]: sample.value for sample in family.samples if sample.name == "gap_bucket"}
    assert counts == {
        **{str(bound): sum(value <= bound for value in values) for bound in ITL_BUCKETS},
        "+Inf": len(values),
    }
