"""The highest load, held against stepping up."""

from __future__ import annotations

import pytest
from sim_probers import ComputedProber, MakeSimulated

from octavo.sim.plan.candidate import Candidate
from octavo.sim.plan.capacity import RESOLUTION, capacity, multiple_of
from octavo.sim.plan.planner import Question
from octavo.sim.plan.probe import Ask
from octavo.sim.slo import parse_slo


@pytest.mark.parametrize("needed", [0.013, 0.4, 1.0, 1.01, 2.5, 40.0])
def test_the_capacity_is_the_last_load_before_the_first_failure(needed: float) -> None:
    prober = ComputedProber({"a": needed}, {"a": 1.0})
    found = capacity(Candidate(gpu="a"), 2, prober, Question(slo=parse_slo("ttft_p99<1s")))
    exact = 2 / needed
    assert found.load_multiple <= exact < found.load_multiple * RESOLUTION * 1.0001
    assert found.best is not None and found.best.meets
    assert found.diagnosis is not None and found.diagnosis.failing.load_multiple > exact
    assert found.num_probes <= 30


def test_a_capacity_of_nothing_says_what_binds() -> None:
    found = capacity(
        Candidate(gpu="A100-80GB"),
        4,
        MakeSimulated("synthetic:poisson,rate=5,n=20", "ttft_p99<1ms")(),
        Question(slo=parse_slo("ttft_p99<1ms")),
    )
    assert found.load_multiple == 0.0 and found.best is None
    assert found.binding == "prefill compute" and "one prefill" in found.reason


def test_a_simulated_capacity_is_that_of_stepping_up_and_more_replicas_take_more() -> None:
    slo = "ttft_p99<800ms,tpot_p99<60ms"
    make = MakeSimulated("synthetic:poisson,rate=15,n=60,prompt=1500,output=20", slo)
    question = Question(slo=parse_slo(slo))
    candidate = Candidate(gpu="A100-80GB")
    prober = make()
    one = capacity(candidate, 1, prober, question, with_diagnosis=False)
    assert one.load_multiple > 0
    powers = [power for power in range(-400, 400) if abs(multiple_of(power) / one.load_multiple - 1) < 0.025]
    verdicts = [
        prober.probe(Ask(candidate=candidate, num_replicas=1, load_multiple=multiple_of(power))).meets
        for power in powers
    ]
    # from below the answer up to it nothing fails, and the next one does
    at = next(i for i, power in enumerate(powers) if multiple_of(power) == one.load_multiple)
    assert verdicts[at] and not verdicts[at + 1]
    two = capacity(candidate, 2, make(), question, with_diagnosis=False)
    assert two.load_multiple > one.load_multiple


def test_a_faster_gpu_never_takes_less() -> None:
    slo = "ttft_p99<800ms,tpot_p99<60ms"
    question = Question(slo=parse_slo(slo))
    capacities = []
    for gpu in ("L4", "A10", "L40S", "A100-80GB", "H100", "H200"):  # each has no less of anything
        prober = MakeSimulated("synthetic:poisson,rate=5,n=60,prompt=1000,output=20", slo)()
        candidate = Candidate(gpu=gpu, num_blocks=2000)
        capacities.append(capacity(candidate, 1, prober, question, with_diagnosis=False).load_multiple)
    assert capacities == sorted(capacities)
    assert capacities[0] < capacities[-1]
