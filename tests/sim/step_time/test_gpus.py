import pytest

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.gpus import GPUS, GpuSpec, find_gpu, gpu_in


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("h100", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("H100_PCIE", "H100-PCIe"),
        ("a100-40", "A100-40GB"),
        ("A100", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("h200", "H200-SXM"),
        ("GeForce RTX 4090", "RTX-4090"),
        ("rtx pro 6000 blackwell", "RTX-PRO-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000-Server"),
        ("AMD Instinct MI300X", "MI300X"),
        ("nvidia l4", "L4"),
        ("L40s", "L40S"),
    ],
)
def test_a_gpu_is_found_by_any_usual_spelling(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


def test_every_gpu_is_found_by_its_own_name() -> None:
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)


def test_an_unknown_gpu_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(InvalidConfigError, match=r"'h1000'.*did you mean H100-SXM\?.*A100-40GB.*MI325X") as caught:
        find_gpu("h1000")
    assert caught.value.field == "gpu"
    with pytest.raises(InvalidConfigError, match="There are: A100-40GB"):
        find_gpu("")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("llmservingsim_rtxpro6000_llama31_8b", "RTX-PRO-6000"),
        ("h100_sxm_gemm_bf16", "H100-SXM"),
        ("h200_sxm_context_attention_bf16", "H200-SXM"),
        ("a100_Meta-Llama-3-8B_mlp", "A100-80GB"),
        ("run-of-rtx-4090", "RTX-4090"),
        ("small4_model", None),
        ("port_4090", None),
        ("", None),
    ],
)
def test_a_file_name_tells_its_gpu_only_by_whole_words(text: str, name: str | None) -> None:
    gpu = gpu_in(text)
    assert (gpu.name if gpu else None) == name


def test_rates_follow_the_weights_dtype() -> None:
    h100, a100 = find_gpu("h100"), find_gpu("a100")
    assert h100.flops("fp8") == h100.fp8_flops > h100.flops("bfloat16") == h100.flops("int4") > h100.flops("float32")
    assert a100.flops("fp8") == a100.flops("float16") == a100.bf16_flops  # it has no units for fp8


@pytest.mark.parametrize("field", ["memory_bytes", "num_sms", "bandwidth", "bf16_flops", "link_bandwidth"])
def test_a_gpu_of_nothing_is_refused(field: str) -> None:
    fields = {name: getattr(GPUS[0], name) for name in GpuSpec.__struct_fields__}
    with pytest.raises(ValueError, match=f"{field}=0"):
        GpuSpec(**{**fields, field: 0})
    with pytest.raises(ValueError, match="price_per_hour=-1"):
        GpuSpec(**{**fields, "price_per_hour": -1})
