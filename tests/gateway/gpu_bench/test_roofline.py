"""The closed form against figures that were computed elsewhere, for 4.3 TB/s and 790 TFLOP/s."""

from __future__ import annotations

import pytest

from octavo.gateway.gpu_bench.ceilings import H200_NOTED, Ceilings
from octavo.gateway.gpu_bench.requests_256 import lengths_of, requests_256
from octavo.gateway.gpu_bench.roofline import mixed_floor_s, prefill_floor_s, step_floor_s, workload_floor
from octavo.sim.step_time.known_models import find_model

BATCHES = (1, 8, 32, 64, 128, 256)


@pytest.mark.parametrize(
    ("model", "context", "milliseconds"),
    [
        ("qwen3-0.6b", 512, (0.29, 0.39, 0.71, 1.15, 2.03, 3.88)),
        ("qwen3-0.6b", 1024, (0.30, 0.50, 1.15, 2.03, 3.77, 7.38)),
        ("qwen3-0.6b", 4096, (0.39, 1.15, 3.77, 7.27, 14.26, 28.35)),
        ("qwen3-8b", 1024, (3.56, 3.80, 4.64, 5.77, 8.01, 13.89)),
        ("qwen3-8b", 4096, (3.66, 4.64, 8.01, 12.51, 21.50, 40.9)),
        ("llama-3.1-8b", 1024, (3.52, 3.74, 4.49, 5.49, 7.49, 12.85)),
        ("qwen3-14b", 1024, (6.55, 6.82, 7.76, 9.00, 11.50, 19.06)),
        ("qwen3-30b-a3b", 1024, (1.44, 6.20, 13.10, 15.34, 17.05, 20.27)),
    ],
)
def test_floors_of_decode_steps(model: str, context: int, milliseconds: tuple[float, ...]) -> None:
    shape = find_model(model)
    for batch, expected in zip(BATCHES, milliseconds, strict=True):
        found = step_floor_s(shape, H200_NOTED, contexts=context, batch=batch) * 1e3
        assert found == pytest.approx(expected, rel=2e-3, abs=6e-3)


@pytest.mark.parametrize(
    ("model", "milliseconds"),
    [
        ("qwen3-0.6b", (0.6, 1.3, 7.0, 18.9, 192)),
        ("qwen3-8b", (9.1, 18.4, 78.3, 169, 977)),
        ("llama-3.1-8b", (9.1, 18.4, 77.9, 167, 935)),
        ("qwen3-14b", (17.3, 34.8, 146, 309, 1653)),
        ("qwen3-30b-a3b", (14.8, 16.4, 36.7, 90.0, 761)),
    ],
)
def test_floors_of_prompts(model: str, milliseconds: tuple[float, ...]) -> None:
    shape = find_model(model)
    for num_tokens, expected in zip((512, 1024, 4096, 8192, 32768), milliseconds, strict=True):
        found = prefill_floor_s(shape, H200_NOTED, num_tokens=num_tokens) * 1e3
        assert found == pytest.approx(expected, rel=5e-3, abs=0.06)


@pytest.mark.parametrize(
    ("model", "prefill_s", "linears_s", "kv_s", "total_s", "tokens_per_s"),
    [
        ("qwen3-0.6b", 0.17, 0.30, 3.22, 3.70, 36_203),
        ("llama-3.1-8b", 2.56, 3.84, 3.68, 10.08, 13_292),
        ("qwen3-8b", 2.55, 3.87, 4.14, 10.56, 12_682),
        ("qwen3-14b", 4.83, 7.16, 4.60, 16.59, 8_075),
    ],
)
def test_the_floor_of_the_256_requests(
    model: str, prefill_s: float, linears_s: float, kv_s: float, total_s: float, tokens_per_s: float
) -> None:
    floor = workload_floor(find_model(model), H200_NOTED, lengths_of(requests_256()))
    assert floor.num_steps == 1023
    assert floor.mean_batch == pytest.approx(131, abs=0.5)
    assert floor.mean_context == pytest.approx(903, abs=1)
    assert floor.prefill_s == pytest.approx(prefill_s, abs=6e-3)
    assert floor.linears_s == pytest.approx(linears_s, abs=6e-3)
    assert floor.kv_s == pytest.approx(kv_s, abs=6e-3)
    assert floor.total_s == pytest.approx(total_s, abs=6e-3)
    assert floor.tokens_per_s == pytest.approx(tokens_per_s, rel=1e-3)


def test_a_floor_falls_with_both_ceilings_and_rows_may_differ() -> None:
    shape = find_model("qwen3-0.6b")
    twice = Ceilings(read_bytes_per_s=2 * H200_NOTED.read_bytes_per_s, flops=2 * H200_NOTED.flops)
    slow = step_floor_s(shape, H200_NOTED, contexts=1000, batch=8)
    assert step_floor_s(shape, twice, contexts=1000, batch=8) == pytest.approx(slow / 2)
    assert step_floor_s(shape, H200_NOTED, contexts=[500, 1500] * 4) == pytest.approx(slow)


def test_decodes_beside_a_prompt_share_one_reading_of_the_weights() -> None:
    shape = find_model("qwen3-8b")
    alone = step_floor_s(shape, H200_NOTED, contexts=1024, batch=32)
    prompt = prefill_floor_s(shape, H200_NOTED, num_tokens=512)
    both = mixed_floor_s(shape, H200_NOTED, context=1024, batch=32, num_tokens=512)
    assert max(alone, prompt) < both < alone + prompt
