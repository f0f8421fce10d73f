import pytest

from octavo.messages.errors import InvalidConfigError
from octavo.sim.slo import parse_slo


def test_terms_are_read_with_their_units() -> None:
    slo = parse_slo("ttft_p99<1s, tpot_p50<=50ms,itl.max<900us,ttft_mean<0.2s")
    assert slo.limits() == {
        "ttft_p99": 1.0,
        "tpot_p50": pytest.approx(0.05),
        "itl_max": pytest.approx(9e-4),
        "ttft_mean": 0.2,
    }
    assert slo.request_limits()["ttft"] == 0.2


@pytest.mark.parametrize(
    "text",
    ["", ",", "ttft", "ttft_p99", "ttft_p99<", "ttft_p99<1", "ttft_p99>1s", "foo_p99<1s", "ttft_p98<1s", "ttft_p99<0s",
     "ttft_p99<-1s", "ttft_p99<nans", "ttft_p99<1e999s", "ttft_p99<1s;tpot_p99<1s", "ttft_p99<1s,ttft_p99<2s",
     "ttft_p99<1..2s"],
)  # fmt: skip
def test_a_service_level_that_cannot_be_read_is_refused_with_advice(text: str) -> None:
    with pytest.raises(InvalidConfigError):
        parse_slo(text)
