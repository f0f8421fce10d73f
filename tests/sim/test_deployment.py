from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sim_step_samples import draw_samples
from step_time_tools import H100, TINY, faster

from octavo.actors.executor.device import ExecutorConfig, plan_kv_cache
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.errors import InvalidConfigError, KVCacheTooSmallError, ModelNotFoundError
from octavo.sim.deployment import Deployment, activation_bytes
from octavo.sim.step_time.fitted import FittedModel, fit, save_profile
from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.roofline import RooflineModel

GIB = 1 << 30


def test_the_default_is_llama_8b_on_an_h100_in_closed_form() -> None:
    resolved = Deployment().resolve()
    assert (resolved.gpu.name, resolved.model.name) == ("H100-SXM", "llama-3.1-8b")
    assert isinstance(resolved.step_time, RooflineModel)
    assert resolved.cost_per_replica_hour == resolved.gpu.price_per_hour
    # vLLM 0.19 finds about 27 to 29 thousand blocks of 16 there at a utilisation of 0.9.
    assert 26_000 < resolved.scheduler.num_blocks < 30_000
    assert resolved.memory.estimated


def test_memory_adds_up() -> None:
    memory = Deployment(gpu="a100", model="qwen3-8b").resolve().memory
    assert memory.usable == int(memory.memory * 0.9)
    assert memory.kv == memory.usable - memory.weights - memory.activations - memory.runtime
    assert memory.num_blocks == memory.kv // memory.bytes_per_block
    assert memory.bytes_per_block == 16 * 147_456
    shown = dict(memory.lines())
    assert shown["- weights"] == f"{8_190_735_360 * 2 / GIB:.1f} GiB"
    assert shown["blocks"].endswith("(estimated)")


def test_a_given_number_of_blocks_is_taken_as_it_is() -> None:
    resolved = Deployment(num_blocks=1000, max_model_len=4096).resolve()
    assert resolved.scheduler.num_blocks == 1000
    assert not resolved.memory.estimated
    assert dict(resolved.memory.lines())["blocks"] == "1,000 (given)"


def test_settings_reach_the_engines_own_configuration() -> None:
    resolved = Deployment(
        max_num_seqs=7,
        max_num_batched_tokens=77,
        block_size=32,
        max_model_len=2048,
        pipeline_depth=3,
        long_prefill_threshold=5,
        priority_aging_ns=6,
        max_num_queued_requests=8,
        max_num_queued_tokens=9,
        enable_prefix_caching=False,
        num_blocks=500,
    ).resolve()
    assert resolved.scheduler == SchedulerConfig(
        num_blocks=500,
        block_size=32,
        max_model_len=2048,
        max_num_seqs=7,
        max_num_batched_tokens=77,
        pipeline_depth=3,
        max_num_queued_requests=8,
        max_num_queued_tokens=9,
        priority_aging_ns=6,
        long_prefill_threshold=5,
        enable_prefix_caching=False,
    )


def outcome(plan) -> tuple[int, int] | str:
    try:
        return plan()
    except KVCacheTooSmallError as error:
        return str(error)


@given(
    st.integers(1, 40_000),
    st.sampled_from([1, 16, 100, 256]),
    st.none() | st.integers(2, 6000),
    st.none() | st.integers(1, 300),
    st.integers(1, 20),
)
def test_blocks_and_context_are_those_of_the_executors_start(
    free_kib: int, block_size: int, max_model_len: int | None, num_blocks: int | None, max_num_seqs: int
) -> None:
    """The executor divides what is free; the same bytes, on a GPU that has just so much left, give the same plan."""
    taken = (
        TINY.weight_bytes
        + activation_bytes(TINY, tp=1, num_tokens=64, num_samples=max_num_seqs)
        + Deployment(model=TINY).resolve().memory.runtime
    )
    bytes_per_token = TINY.kv_bytes_per_token()
    assume(num_blocks is not None or free_kib * 1024 >= bytes_per_token * block_size)
    gpu = msgspec.structs.replace(H100, memory_bytes=taken + free_kib * 1024)

    def ours() -> tuple[int, int]:
        scheduler = (
            Deployment(
                gpu=gpu,
                model=TINY,
                memory_utilization=1.0,
                block_size=block_size,
                max_model_len=max_model_len,
                num_blocks=num_blocks,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=64,
            )
            .resolve()
            .scheduler
        )
        return scheduler.num_blocks, scheduler.max_model_len

    def engines() -> tuple[int, int]:
        config = ExecutorConfig(
            model_path="",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            block_size=block_size,
            num_blocks=num_blocks,
            memory_utilization=1.0,
        )
        plan = plan_kv_cache(
            config, bytes_per_token=bytes_per_token, max_position=TINY.max_model_len, free_bytes=free_kib * 1024
        )
        return plan.num_blocks, plan.max_model_len

    assert outcome(ours) == outcome(engines)


def test_a_context_that_does_not_fit_is_refused_with_the_engines_error() -> None:
    with pytest.raises(KVCacheTooSmallError, match="max_model_len=131072 does not fit 2069 KV blocks of 16"):
        Deployment(gpu="L4", max_model_len=131072).resolve()
    assert Deployment(gpu="L4").resolve().scheduler.max_model_len == 2069 * 16  # lowered, as the engine lowers it


def test_weights_that_do_not_fit_are_refused_with_the_numbers_and_the_size_that_would_do() -> None:
    with pytest.raises(InvalidConfigError, match=r"weights take 131\.4.*raise tensor_parallel_size to 8"):
        Deployment(gpu="A100-40", model="llama-3.1-70b").resolve()
    assert Deployment(gpu="A100-40", model="llama-3.1-70b", tp=8).resolve().gpus_per_replica == 8
    with pytest.raises(InvalidConfigError, match="take a GPU with more memory") as caught:
        Deployment(gpu="L4", model="llama-3.1-405b", tp=8).resolve()
    assert "raise tensor_parallel_size" not in str(caught.value)


def test_tensor_parallelism_divides_weights_and_kv_and_multiplies_the_price() -> None:
    one, four = (Deployment(gpu="h200", tp=tp).resolve() for tp in (1, 4))
    assert four.memory.weights == one.memory.weights // 4
    assert four.memory.bytes_per_block == one.memory.bytes_per_block // 4
    assert four.cost_per_replica_hour == 4 * one.cost_per_replica_hour
    assert Deployment(tp=2, gpu_hour=1.5).resolve().cost_per_replica_hour == 3.0


def test_fewer_bits_leave_more_for_the_kv_cache() -> None:
    wide, narrow = (Deployment(dtype=dtype, max_num_seqs=10_000).resolve() for dtype in ("bfloat16", "fp8"))
    assert narrow.memory.weights == wide.memory.weights // 2
    assert narrow.scheduler.num_blocks > wide.scheduler.num_blocks
    decode = StepShape(1, 1, 1, (), 1)
    assert narrow.step_time.step_ns(decode) < wide.step_time.step_ns(decode)


def test_a_faster_gpu_never_gives_fewer_blocks_or_longer_steps() -> None:
    slow, fast = (Deployment(gpu=gpu).resolve() for gpu in (H100, faster(H100, 2.0)))
    assert fast.scheduler == slow.scheduler
    shape = StepShape(64, 64_000, 1000, ((512, 0),), 65)
    assert fast.step_time.step_ns(shape) < slow.step_time.step_ns(shape)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpu": "H1000"}, "did you mean H100"),
        ({"tp": 3}, "tensor_parallel_size is 3"),
        ({"dtype": "float7"}, "dtype is 'float7'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 512}, "block_size is 512"),
        ({"memory_utilization": 0.0}, r"memory_utilization is 0\.0"),
        ({"memory_utilization": 1.1}, r"memory_utilization is 1\.1"),
        ({"memory_utilization": 0.1}, "leaves no KV block"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"pipeline_depth": 0}, "pipeline_depth=0"),
        ({"long_prefill_threshold": -1}, "long_prefill_threshold=-1"),
        ({"gpu_hour": -1.0}, r"gpu_hour is -1\.0"),
        ({"profile": "/absent"}, "there is no profile /absent"),
    ],
)
def test_what_cannot_boot_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        Deployment(**fields).resolve()


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="neither a config"):
        Deployment(model="lama").resolve()


def test_a_profile_times_the_steps(tmp_path: Path) -> None:
    save_profile(fit(draw_samples(1, 60), {}), tmp_path / "p.json")
    resolved = Deployment(profile=str(tmp_path / "p.json"), host=HostOverhead(5, 0)).resolve()
    assert isinstance(resolved.step_time, FittedModel)
    assert resolved.step_time.host_ns(StepShape(1, 1, 1, (), 1)) == 5
