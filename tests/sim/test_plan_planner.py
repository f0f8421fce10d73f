"""The planner's answers, held against an exhaustive scan with the same simulator."""

from __future__ import annotations

import msgspec
import pytest
from sim_probers import ComputedProber, MakeSimulated

from octavo.messages.errors import InvalidConfigError
from octavo.sim.plan.candidate import Candidate, Sweep
from octavo.sim.plan.planner import Finding, Plan, Question, investigate, plan
from octavo.sim.plan.probe import Ask
from octavo.sim.slo import parse_slo

H100, A100, L40S = "H100-SXM", "A100-80GB", "L40S"
STEADY = "synthetic:poisson,rate=20,n=80,prompt=1500,output=40"
BURSTS = "synthetic:bursts,rate=12,on=2,off=4,n=80,prompt=uniform:200:3000,output=uniform:5:80"
SHARED = "synthetic:gamma,cv=2,rate=20,n=80,prompt=200,output=30,groups=3,group_tokens=2000"
CHATS = "synthetic:poisson,rate=4,n=20,turns=3,think=1,followup=100,prompt=1200,output=40"

SCENARIOS = [
    (STEADY, "ttft_p99<300ms", Candidate(gpu=A100)),
    (STEADY, "ttft_p99<2s,tpot_p99<25ms", Candidate(gpu=A100)),
    (STEADY, "ttft_p99<1s,tpot_p99<60ms", Candidate(gpu=L40S, routing="round_robin")),
    (STEADY, "e2e_p90<1500ms", Candidate(gpu=A100, max_num_batched_tokens=512)),
    (STEADY, "ttft_p99<500ms", Candidate(gpu=H100, max_num_seqs=4)),
    (BURSTS, "ttft_p99<800ms,tpot_p99<100ms", Candidate(gpu=A100)),
    (BURSTS, "ttft_p90<120ms", Candidate(gpu=H100, max_num_batched_tokens=1024)),
    (BURSTS, "ttft_p90<3s", Candidate(gpu=A100, num_blocks=300)),
    (SHARED, "ttft_p99<200ms", Candidate(gpu=A100, routing="prefix_aware")),
    (SHARED, "ttft_p99<900ms", Candidate(gpu=A100, enable_prefix_caching=False)),
    (CHATS, "ttft_p99<150ms", Candidate(gpu=A100)),
    (STEADY, "ttft_p99<400ms", Candidate(gpu=A100, tensor_parallel_size=2)),
]
MAX_REPLICAS = 6


@pytest.mark.parametrize(("trace", "slo", "candidate"), SCENARIOS)
def test_the_fewest_replicas_are_a_scans_answer_with_early_stop_and_bounds_or_without(
    trace: str, slo: str, candidate: Candidate
) -> None:
    prober = MakeSimulated(trace, slo)()
    scan = (
        number
        for number in range(1, MAX_REPLICAS + 1)
        if prober.probe(Ask(candidate=candidate, num_replicas=number)).meets
    )
    scanned = next(scan, 0)
    question = Question(slo=parse_slo(slo), max_replicas=MAX_REPLICAS)
    fresh = MakeSimulated(trace, slo)()
    quick = investigate(candidate, fresh, question)
    assert quick.num_replicas == scanned
    # the scan's prober remembers complete simulations: what remains to be seen is that bounds changed nothing
    patient = msgspec.structs.replace(question, stop_early=False, prune=False)
    slow = investigate(candidate, prober, patient)
    assert slow.num_replicas == scanned
    if scanned:
        assert quick.best == slow.best


def test_the_scenarios_have_answers_of_several_sizes() -> None:
    found = set()
    for trace, slo, candidate in SCENARIOS[:4]:
        question = Question(slo=parse_slo(slo), max_replicas=MAX_REPLICAS)
        found.add(investigate(candidate, MakeSimulated(trace, slo)(), question).num_replicas)
    assert len(found) >= 2 and max(found) >= 2


def test_the_plan_is_the_same_on_one_process_and_on_two() -> None:
    slo = "ttft_p99<300ms"
    candidates = list(Sweep(gpu=(H100, A100), max_num_batched_tokens=(512, 2048)).candidates())
    question = Question(slo=parse_slo(slo), max_replicas=4)
    plans = [plan(candidates, MakeSimulated(STEADY, slo), question, jobs=jobs, with_curve=True) for jobs in (1, 2)]
    assert msgspec.json.encode(plans[0]) == msgspec.json.encode(plans[1])
    assert plans[0].chosen >= 0 and plans[0].front and plans[0].curve


def computed(needed: dict[str, float], prices: dict[str, float], gpus: tuple[str, ...], **changes: object) -> Plan:
    question = Question(slo=parse_slo("ttft_p99<1s"), max_replicas=64)
    question = msgspec.structs.replace(question, **changes)
    return plan([Candidate(gpu=gpu) for gpu in gpus], lambda: ComputedProber(needed, prices), question, with_curve=True)


def test_the_cheapest_is_chosen_not_the_fewest() -> None:
    found = computed({"big": 2, "small": 5}, {"big": 3.0, "small": 1.0}, ("big", "small"))
    assert found.findings[found.chosen].candidate.gpu == "small"
    assert found.findings[found.chosen].num_replicas == 5
    assert found.findings[found.chosen].cost_per_hour == 5.0


def test_of_equal_costs_the_one_with_fewer_gpus_is_chosen() -> None:
    found = computed({"a": 4, "b": 2}, {"a": 1.0, "b": 2.0}, ("a", "b"))
    assert found.findings[found.chosen].candidate.gpu == "b"


def test_what_does_not_boot_or_is_not_enough_is_told_and_the_others_go_on() -> None:
    found = computed({"a": 100, "c": 3}, {"a": 1.0, "c": 1.0}, ("a", "b", "c"))
    assert [finding.verdict for finding in found.findings] == ["infeasible", "cannot boot", "feasible"]
    assert "64 replicas miss ttft_p99" in found.findings[0].reason
    assert "no memory" in found.findings[1].reason
    assert found.chosen == 2


def test_an_infeasible_plan_chooses_nothing_and_diagnoses_the_nearest_miss() -> None:
    found = computed({"a": 100}, {"a": 1.0}, ("a", "b"))
    assert found.chosen == -1
    assert found.diagnosis is not None and found.diagnosis.binding == "prefill compute"
    assert found.diagnosis.failing.num_replicas == 64


def test_the_diagnosis_looks_at_one_replica_fewer() -> None:
    found = computed({"a": 5}, {"a": 1.0}, ("a",))
    assert found.diagnosis is not None
    assert found.diagnosis.failing.num_replicas == 4
    assert found.diagnosis.what_ifs[0].relaxation == "prefill compute" and found.diagnosis.what_ifs[0].meets


def test_the_diagnosis_of_a_single_replica_looks_at_more_load() -> None:
    found = computed({"a": 0.5}, {"a": 1.0}, ("a",))
    assert found.diagnosis is not None
    assert found.diagnosis.failing.num_replicas == 1
    assert found.diagnosis.failing.load_multiple > 2


def test_the_front_holds_what_nothing_beats() -> None:
    found = computed({"a": 2, "b": 2}, {"a": 1.0, "b": 2.0}, ("a", "b"))
    # latencies are alike: the cheapest alone is on the front
    assert found.front == ((0, 2),)


def test_requests_longer_than_a_replica_holds_are_infeasible_without_a_simulation() -> None:
    candidate = Candidate(gpu=A100, num_blocks=50)  # 800 tokens
    prober = MakeSimulated(STEADY, "ttft_p99<1s")()
    finding = investigate(candidate, prober, Question(slo=parse_slo("ttft_p99<1s")))
    assert_infeasible(finding, "context", "800 tokens")
    assert finding.num_probes == 0


def test_an_objective_below_one_prefill_is_infeasible_without_a_simulation() -> None:
    finding = investigate(
        Candidate(gpu=A100),
        MakeSimulated(STEADY, "ttft_p99<5ms")(),
        Question(slo=parse_slo("ttft_p99<5ms"), max_replicas=MAX_REPLICAS),
    )
    assert_infeasible(finding, "prefill compute", "one prefill takes longer")
    assert finding.num_probes == 0


def test_an_objective_below_one_decode_step_is_infeasible_without_a_simulation() -> None:
    finding = investigate(
        Candidate(gpu=A100),
        MakeSimulated(STEADY, "tpot_p50<1ms")(),
        Question(slo=parse_slo("tpot_p50<1ms"), max_replicas=MAX_REPLICAS),
    )
    assert_infeasible(finding, "decode bandwidth", "one decode step takes longer")
    assert finding.num_probes == 0


@pytest.mark.parametrize("slo", ["ttft_p99<5ms", "tpot_p50<1ms"])
def test_what_bounds_call_infeasible_is_so_by_simulation(slo: str) -> None:
    question = Question(slo=parse_slo(slo), max_replicas=3, prune=False)
    assert investigate(Candidate(gpu=A100), MakeSimulated(STEADY, slo)(), question).verdict == "infeasible"


def test_a_model_that_does_not_fit_cannot_boot() -> None:
    finding = investigate(
        Candidate(gpu="T4"), MakeSimulated(STEADY, "ttft_p99<1s")(), Question(slo=parse_slo("ttft_p99<1s"))
    )
    assert finding.verdict == "cannot boot"
    assert "does not fit" in finding.reason


def test_turned_away_requests_are_misses_unless_they_are_allowed() -> None:
    candidate = Candidate(gpu=A100, num_blocks=180)  # 2880 tokens: the longest of BURSTS are refused
    slo = "tpot_p50<1s"
    question = Question(slo=parse_slo(slo), max_replicas=2, prune=False)
    strict = investigate(candidate, MakeSimulated(BURSTS, slo)(), question)
    assert strict.verdict == "infeasible" and strict.binding == "admission"
    lenient = investigate(candidate, MakeSimulated(BURSTS, slo, 0.5)(), question)
    assert lenient.verdict == "feasible" and lenient.best is not None and lenient.best.refused_share > 0


def test_a_sweep_is_a_product_without_repeats() -> None:
    sweep = Sweep(gpu=("a", "b", "a"), max_num_seqs=(8, 16))
    names = [(candidate.gpu, candidate.max_num_seqs) for candidate in sweep.candidates()]
    assert names == [("a", 8), ("a", 16), ("b", 8), ("b", 16)]
    assert sweep.varied() == ("gpu", "max_num_seqs")


@pytest.mark.parametrize("changes", [{"gpu": ()}, {"num_blocks": tuple(range(1, 20_000))}])
def test_a_sweep_of_nothing_or_of_too_much_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidConfigError):
        Sweep(**{"gpu": ("a",), **changes})  # type: ignore[arg-type]


def assert_infeasible(finding: Finding, binding: str, reason: str) -> None:
    assert finding.verdict == "infeasible"
    assert finding.binding == binding
    assert reason in finding.reason
