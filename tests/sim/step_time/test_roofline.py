import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_time_tools import H100, assert_run_equals_steps, decode_shapes, faster, step_shapes

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.gpus import GPUS, find_gpu
from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.known_models import find_model
from octavo.sim.step_time.model_shape import ModelShape
from octavo.sim.step_time.roofline import Efficiency, RooflineModel, check_tp

WINDOWED = msgspec.structs.replace(
    find_model("llama-3.1-8b"), name="windowed", sliding_window=1024, num_sliding_layers=16
)
MODELS = [find_model("llama-3.1-8b"), find_model("qwen3-30b-a3b"), WINDOWED, find_model("qwen3-8b").with_dtype("fp8")]
IDEAL = Efficiency(bandwidth=1.0, flops=1.0, attention=1.0, layer_ns=0.0, row_ns=0.0, step_ns=0.0)

models = st.sampled_from(MODELS)


@given(models, st.sampled_from([1, 2, 4]), decode_shapes(), st.integers(0, 260))
def test_a_run_of_decodes_equals_its_steps_bit_for_bit(
    model: ModelShape, tp: int, shape: StepShape, num_steps: int
) -> None:
    assert_run_equals_steps(RooflineModel(model, H100, tp=tp), shape, num_steps)


def test_a_run_that_leaves_64_bits_equals_its_steps() -> None:
    slow = msgspec.structs.replace(H100, bandwidth=1.0)
    shape = StepShape(3, 1 << 40, 1 << 39, (), 3)
    assert_run_equals_steps(RooflineModel(MODELS[0], slow), shape, 5)


@given(models, st.sampled_from(GPUS), step_shapes(), st.floats(1.0, 4.0))
def test_a_faster_gpu_never_takes_longer(model: ModelShape, gpu, shape: StepShape, factor: float) -> None:
    slow, fast = RooflineModel(model, gpu), RooflineModel(model, faster(gpu, factor))
    assert fast.step_ns(shape) <= slow.step_ns(shape)


@given(models, step_shapes(), st.integers(1, 500), st.integers(0, 5000))
def test_more_work_never_takes_less_time(model: ModelShape, shape: StepShape, num_new: int, num_history: int) -> None:
    roofline = RooflineModel(model, H100)
    more = msgspec.structs.replace(shape, prefills=(*shape.prefills, (num_new, num_history)))
    assert roofline.step_ns(more) >= roofline.step_ns(shape)


def test_one_row_costs_the_reading_of_the_weights() -> None:
    model = find_model("llama-3.1-8b")
    read = (model.num_params - model.head_params) * 2 / H100.bandwidth * 1e9
    step = RooflineModel(model, H100, efficiency=IDEAL).step_ns(StepShape(1, 1, 1, (), 1))
    assert step == pytest.approx(read, rel=2e-3)


def test_a_long_prompt_costs_its_flops() -> None:
    model = find_model("llama-3.1-8b")
    flops = 2 * (model.num_active_params - model.head_params) * 4096 + 4 * 4096 * 4097 / 2 * 4096 * 32
    step = RooflineModel(model, H100, efficiency=IDEAL).step_ns(StepShape(0, 0, 0, ((4096, 0),), 1))
    assert step == pytest.approx(flops / H100.bf16_flops * 1e9, rel=0.01)


def test_it_agrees_with_vidurs_measured_layers_of_llama_2_7b() -> None:
    """H100: 5.6 ms of all layer operators but attention at 1 token, 82.9 ms at 4,096; A100: 9.3 and 261 ms."""
    model = find_model("llama-2-7b")
    for name, one, many in (("H100", 5.6e6, 82.9e6), ("A100", 9.3e6, 261e6)):
        roofline = RooflineModel(model, find_gpu(name))
        head = roofline.head_ns(1)
        assert roofline.weights_ns(1) - head == pytest.approx(one, rel=0.04)
        assert roofline.products_ns(4096, 0) == pytest.approx(many, rel=0.04)


def test_experts_are_read_as_far_as_they_are_met() -> None:
    model = find_model("qwen3-30b-a3b")
    roofline = RooflineModel(model, H100)
    alone, few, many = (roofline.weights_ns(num_tokens) for num_tokens in (1, 16, 4096))
    everything = (model.num_params - model.head_params) * 2 / (H100.bandwidth * 0.69) * 1e9
    assert alone == pytest.approx(model.num_active_params * 2 / (H100.bandwidth * 0.69) * 1e9)
    assert alone < few < many == pytest.approx(everything, rel=1e-3)


@given(st.integers(1, 300), st.integers(0, 300), st.integers(1, 100))
def test_a_window_counts_the_pairs_one_by_one(num_new: int, num_history: int, window: int) -> None:
    model = msgspec.structs.replace(MODELS[0], num_layers=1, sliding_window=window, num_sliding_layers=1)
    roofline = RooflineModel(model, H100, efficiency=IDEAL)
    pairs = sum(min(num_history + i + 1, window) for i in range(num_new))
    length = min(num_history + num_new, window + num_new)
    expected = length * roofline.kv_read_ns + pairs * 4 * 32 * 128 / H100.bf16_flops * 1e9
    assert roofline.prefill_attention_ns(num_new, num_history) == pytest.approx(expected, rel=1e-3)


def test_decodes_beyond_a_window_read_only_the_window() -> None:
    roofline = RooflineModel(WINDOWED, H100)
    near, far = StepShape(2, 2048, 1024, (), 2), StepShape(2, 20480, 10240, (), 2)
    full = RooflineModel(MODELS[0], H100)
    assert (roofline.step_ns(far) - roofline.step_ns(near)) * 2 == pytest.approx(
        full.step_ns(far) - full.step_ns(near), rel=1e-6
    )


def test_tensor_parallelism_divides_the_work_and_adds_all_reduces() -> None:
    model, shape = find_model("llama-3.1-70b"), StepShape(64, 64_000, 1000, (), 64)
    one, four = RooflineModel(model, H100), RooflineModel(model, H100, tp=4)
    reduce_ns = 2 * model.num_layers * four.all_reduce_ns(64)
    assert one.all_reduce_ns(64) == 0.0
    fixed = model.num_layers * 4000 + 64 * 500 + 60_000
    assert four.step_ns(shape) == pytest.approx((one.step_ns(shape) - fixed) / 4 + fixed + reduce_ns, rel=1e-3)


def test_a_tensor_parallel_size_that_divides_no_heads_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match=r"tensor_parallel_size is 3.*possible are 1, 2, 4, 8, 16, 32"):
        check_tp(find_model("llama-3.1-8b"), 3)
    with pytest.raises(InvalidConfigError, match="tensor_parallel_size is 0"):
        RooflineModel(find_model("llama-3.1-8b"), H100, tp=0)


def test_host_time_and_description() -> None:
    roofline = RooflineModel(MODELS[0], H100, host=HostOverhead(10, 2))
    assert roofline.host_ns(StepShape(3, 30, 10, ((5, 0),), 4)) == 10 + 2 * 4
    described = roofline.describe()
    assert (described["kind"], described["gpu"], described["tp"]) == ("roofline", "H100-SXM", 1)


def test_an_efficiency_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"bandwidth=1\.5"):
        Efficiency(bandwidth=1.5)
    with pytest.raises(ValueError, match="layer_ns=-1"):
        Efficiency(layer_ns=-1.0)
