"""A simulator whose queue is a textbook's must give the textbook's waiting times.

Batch 1 and a service time set by the prompt make one replica an M/G/1 queue; c seats that all advance by one small tick
a step make it M/M/c. Tolerances are some four standard errors of the sample; `python -m octavo.sim.queueing` runs a
million requests.
"""

import pytest

from octavo.sim.queueing import mean_wait_by_theory, simulate_queue


@pytest.mark.parametrize(
    ("service", "num_servers", "rho", "num_requests", "tolerance"),
    [
        ("exponential", 1, 0.5, 30_000, 0.06),
        ("constant", 1, 0.5, 20_000, 0.05),
        ("constant", 1, 0.8, 30_000, 0.10),
        ("exponential", 3, 0.6, 8_000, 0.20),
    ],
)
def test_mean_waits_are_those_of_queueing_theory(service, num_servers, rho, num_requests, tolerance) -> None:
    wait, service_mean = simulate_queue(service, num_servers, rho, num_requests, seed=1)
    theory = mean_wait_by_theory(service, num_servers, rho) * service_mean
    assert wait == pytest.approx(theory, rel=tolerance)


def test_formulas_agree_where_they_must() -> None:
    assert mean_wait_by_theory("exponential", 1, 0.5) == pytest.approx(1.0)  # rho / (1 - rho)
    assert mean_wait_by_theory("constant", 1, 0.5) == pytest.approx(0.5)  # half of it: Pollaczek and Khinchine
    assert mean_wait_by_theory("exponential", 2, 0.5) == pytest.approx(1 / 3)  # Erlang C: rho^2 / (1 - rho^2)
