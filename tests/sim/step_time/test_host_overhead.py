import pytest

from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape


def test_host_time_is_a_constant_and_some_for_rows_and_prefill() -> None:
    host = HostOverhead(100, 7, 1000)
    assert host.host_ns(StepShape(3, 30, 10, (), 3)) == 100 + 3 * 7
    assert host.host_ns(StepShape(3, 30, 10, ((5, 0), (6, 0)), 3)) == 100 + 5 * 7 + 1000
    assert host.host_ns(StepShape(0, 0, 0, (), 0)) == 100


@pytest.mark.parametrize("field", ["step_ns", "row_ns", "prefill_ns"])
def test_negative_time_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=-1"):
        HostOverhead(**{field: -1})
