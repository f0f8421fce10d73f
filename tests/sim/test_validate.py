import json
import math
from pathlib import Path

import pytest
from sim_step_samples import draw_samples
from step_time_tools import TINY, write_llmservingsim

from octavo.messages.errors import InvalidConfigError, InvalidTraceError
from octavo.sim.config import SimConfig
from octavo.sim.deployment import Deployment
from octavo.sim.results import RequestRecord
from octavo.sim.simulation import simulate
from octavo.sim.step_time.exposed_overhead import WithExposedOverhead
from octavo.sim.step_time.fitted import fit, save_profile
from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.validate import Validation, deployment_of, validate
from octavo.sim.workload.trace import read_trace

NUM_REQUESTS = 60
TRUE_OVERHEAD = HostOverhead(150_000, 8_000, 700_000)
KWARGS = {"max_num_seqs": 16, "max_num_batched_tokens": 128, "tensor_parallel_size": 1, "dtype": "bfloat16"}
CHANGES: dict[str, object] = {"model": TINY}


def write_trace(path: Path, records: list[RequestRecord] | None = None, *, slower: float = 1.0) -> None:
    """Requests of a server, with what it did to each if `records` say so."""
    lines = []
    for i in range(NUM_REQUESTS):
        num_prompt, arrival_ms = 20 + 37 * i % 300, 2.5 * i
        row = {
            "timestamp": arrival_ms,
            "input_length": num_prompt,
            "output_length": 1 if i == 50 else 5 + 13 * i % 60,
            "hash_ids": [1000 * i + block for block in range(num_prompt // 16)],
        }
        if records is not None:
            record = records[i]
            late_ms = 0.25  # the engine takes it that much later; its times count from there
            row["measured"] = {
                "queued_ms": arrival_ms + late_ms,
                "ttft_ms": record.ttft_s * 1e3 * slower - late_ms,
                "last_token_ms": record.e2e_s * 1e3 * slower - late_ms,
                "queue_wait_ms": 0.0,
            }
            if not math.isnan(record.tpot_s):
                row["measured"]["tpot_ms"] = record.tpot_s * 1e3 * slower
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run_h100_tiny")
    write_llmservingsim(folder, max_tokens=256, max_rows=16, max_kv=1024)
    (folder / "run_meta.json").write_text(json.dumps({"engine_kwargs": KWARGS, "vllm_version": "0.19.0"}))
    return folder


@pytest.fixture(scope="module")
def records(profile: Path) -> list[RequestRecord]:
    """What a server would have measured whose steps take the tables' time and `TRUE_OVERHEAD`."""
    trace = profile / "trace.jsonl"
    write_trace(trace)
    resolved = deployment_of(profile, CHANGES).resolve()
    model = WithExposedOverhead(resolved.step_time, TRUE_OVERHEAD)
    return simulate(SimConfig(scheduler=resolved.scheduler), read_trace(trace), model).records


@pytest.fixture(scope="module")
def requests(profile: Path, records: list[RequestRecord]) -> Path:
    write_trace(profile / "requests.jsonl", records)
    return profile / "requests.jsonl"


@pytest.fixture(scope="module")
def fitted(profile: Path, requests: Path) -> Validation:
    """Progress is checked on the way: each simulation is told of once."""
    seen: list[tuple[int, int]] = []
    found = validate(profile, requests, changes=CHANGES, num_fitted=10, progress=lambda *done: seen.append(done))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert all(done <= most for done, most in seen)
    return found


def test_the_overhead_that_the_server_had_is_found_and_the_rest_predicted(fitted: Validation) -> None:
    assert (fitted.num_requests, fitted.num_fitted, fitted.num_scored) == (60, 10, 50)
    assert fitted.worst < 0.02  # unfitted it is ten times that and more: see below
    assert max(abs(error) for error in fitted.ttft.error.values()) < 0.1
    shape = StepShape(12, 12 * 200, 200, (), 12)
    assert fitted.overhead.host_ns(shape) == pytest.approx(TRUE_OVERHEAD.host_ns(shape), rel=0.1)


def test_without_a_fit_what_the_tables_lack_shows(profile: Path, requests: Path) -> None:
    found = validate(profile, requests, changes=CHANGES, num_fitted=0)
    assert found.overhead == HostOverhead(0, 0, 0)
    assert found.num_scored == 60
    assert found.tpot.error["mean"] < -0.2
    assert found.tpot.error["mean"] == pytest.approx(found.tpot.simulated["mean"] / found.tpot.measured["mean"] - 1)


def test_times_count_from_arrival_and_percentiles_by_nearest_rank(
    fitted: Validation, records: list[RequestRecord]
) -> None:
    ttft = sorted(record.ttft_s for record in records[10:])
    e2e = sorted(record.e2e_s for record in records[10:])
    tpot = sorted(record.tpot_s for record in records[10:] if record.num_output_tokens > 1)
    assert fitted.ttft.measured["p90"] == pytest.approx(ttft[44])  # 45th of 50
    assert fitted.e2e.measured["p50"] == pytest.approx(e2e[24])
    assert fitted.tpot.measured["p99"] == pytest.approx(tpot[48])  # one of 50 has a single token
    assert fitted.ttft.measured["mean"] == pytest.approx(sum(ttft) / 50)


def test_the_same_run_gives_the_same_result(profile: Path, requests: Path, fitted: Validation) -> None:
    assert validate(profile, requests, changes=CHANGES, num_fitted=10) == fitted


def test_a_server_twice_as_slow_is_not_taken_for_the_tables(profile: Path, records: list[RequestRecord]) -> None:
    write_trace(profile / "slow.jsonl", records, slower=2.0)
    found = validate(profile, profile / "slow.jsonl", changes=CHANGES, num_fitted=0)
    assert found.worst > 0.3


def test_settings_come_from_the_runs_description(profile: Path) -> None:
    deployment = deployment_of(profile)
    assert (deployment.gpu, deployment.max_num_seqs, deployment.max_num_batched_tokens) == ("H100-SXM", 16, 128)
    assert deployment.host == HostOverhead(0, 0, 0)
    changed = deployment_of(profile, {"max_num_seqs": 3, "gpu": "h200"})
    assert (changed.gpu, changed.max_num_seqs, changed.max_num_batched_tokens) == ("h200", 3, 128)


def test_settings_that_cannot_be_are_refused(profile: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="unknown field `speed`"):
        deployment_of(profile, {"speed": 3})
    with pytest.raises(InvalidConfigError, match="max_num_seqs"):
        deployment_of(profile, {"max_num_seqs": "many"})
    (tmp_path / "run_meta.json").write_text('{"engine_kwargs": 3}')
    with pytest.raises(InvalidConfigError, match=r"run_meta\.json is no run's description"):
        deployment_of(tmp_path)


def test_a_fitted_profile_is_scored_on_all_requests_as_it_is(requests: Path, tmp_path: Path) -> None:
    save_profile(fit(draw_samples(1, 60), {}), tmp_path / "p.json")
    changes: dict[str, object] = {"model": TINY, "max_num_seqs": 16, "max_num_batched_tokens": 128}
    found = validate(tmp_path / "p.json", requests, changes=changes)
    assert (found.num_fitted, found.num_scored) == (0, NUM_REQUESTS)
    assert deployment_of(tmp_path / "p.json").host is None


def test_too_many_requests_to_fit_on_are_refused(profile: Path, requests: Path) -> None:
    for num_fitted in (-1, NUM_REQUESTS):
        with pytest.raises(InvalidConfigError, match=f"num_fitted is {num_fitted}, but must be from 0 to 59"):
            validate(profile, requests, changes=CHANGES, num_fitted=num_fitted)


def test_requests_that_the_settings_cannot_serve_are_refused(profile: Path, requests: Path) -> None:
    changes = {**CHANGES, "num_blocks": 10, "max_model_len": 160}
    with pytest.raises(InvalidConfigError, match=r"of 60 measured requests cannot be served.*10 blocks"):
        validate(profile, requests, changes=changes, num_fitted=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp":1,"input_length":5,"output_length":5}', r"bad\.jsonl:2: is not a measured request"),
        (
            '{"timestamp":1,"input_length":5,"output_length":5,"measured":{"ttft_ms":-1,"last_token_ms":4}}',
            r"bad\.jsonl:2: ttft_ms and last_token_ms are \(-1\.0, 4\.0\)",
        ),
    ],
)
def test_a_line_without_measurements_is_named(profile: Path, requests: Path, line: str, message: str) -> None:
    bad = profile / "bad.jsonl"
    bad.write_text(requests.read_text().partition("\n")[0] + "\n" + line + "\n")
    with pytest.raises(InvalidTraceError, match=message):
        validate(profile, bad, changes=CHANGES, num_fitted=0)


def test_a_deployment_of_tables_times_steps_by_them(profile: Path) -> None:
    resolved = Deployment(profile=str(profile), model=TINY).resolve()
    assert resolved.step_time.describe()["format"] == "LLMServingSim"
