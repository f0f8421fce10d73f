"""Shapes, models and small tables that tests of step times share."""

from __future__ import annotations

import gzip
from pathlib import Path

from hypothesis import strategies as st

from octavo.sim.step_time.gpus import GpuSpec, find_gpu
from octavo.sim.step_time.interface import StepShape, StepTimeModel
from octavo.sim.step_time.model_shape import ModelShape

TINY = ModelShape(
    name="tiny",
    num_layers=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    vocab_size=256,
    max_model_len=4096,
)
H100 = find_gpu("H100")


@st.composite
def decode_shapes(draw: st.DrawFn, max_rows: int = 300, max_len: int = 20_000) -> StepShape:
    num_decodes = draw(st.integers(1, max_rows))
    longest = draw(st.integers(1, max_len))
    return StepShape(num_decodes, draw(st.integers(longest, num_decodes * longest)), longest, (), num_decodes)


@st.composite
def step_shapes(draw: st.DrawFn) -> StepShape:
    prefills = tuple(draw(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 9000)), max_size=4)))
    if prefills and draw(st.booleans()):
        return StepShape(0, 0, 0, prefills, draw(st.integers(0, len(prefills))))
    decodes = draw(decode_shapes())
    return StepShape(
        decodes.num_decodes,
        decodes.decode_kv_tokens,
        decodes.max_decode_kv,
        prefills,
        decodes.num_decodes + draw(st.integers(0, len(prefills))),
    )


def assert_run_equals_steps(model: StepTimeModel, shape: StepShape, num_steps: int) -> None:
    """The contract of `decode_run_ns` and `num_extrapolated`: what steps one by one give, bit for bit."""
    run = list(model.decode_run_ns(shape, num_steps))
    shapes = [shape.after_decodes(i) for i in range(num_steps)]
    assert run == [model.step_ns(each) for each in shapes]
    assert all(type(duration) is int and duration >= 1 for duration in run)
    assert model.num_extrapolated(shape, num_steps) == sum(model.num_extrapolated(each, 1) for each in shapes)


def faster(gpu: GpuSpec, factor: float) -> GpuSpec:
    return GpuSpec(
        name="faster",
        memory_bytes=gpu.memory_bytes,
        num_sms=gpu.num_sms,
        bandwidth=gpu.bandwidth * factor,
        bf16_flops=gpu.bf16_flops * factor,
        fp8_flops=gpu.fp8_flops * factor,
        link_bandwidth=gpu.link_bandwidth * factor,
        link_latency_ns=gpu.link_latency_ns,
        price_per_hour=gpu.price_per_hour,
    )


def write_csv(path: Path, header: str, rows: list[str], *, newline: str = "\n") -> None:
    text = newline.join([header, *rows]) + newline
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_llmservingsim(folder: Path, *, max_tokens: int = 64, max_rows: int = 16, max_kv: int = 1024) -> None:
    """Times that are simple to work out: see the formulas. Microseconds."""
    tokens = [t for t in (1, 8, 16, 64, 256, 2048) if t <= max_tokens]
    layers = {"embedding": 1, "final_layernorm": 1, "layernorm": 2, "qkv_proj": 10, "rotary_emb": 1, "o_proj": 5}
    layers |= {"gate_up_proj": 20, "act_fn": 2, "down_proj": 10}
    write_csv(
        folder / "dense.csv",
        "layer,tokens,time_us",
        [f"{name},{t},{base + 0.1 * t}" for name, base in layers.items() for t in tokens],
    )
    rows = [r for r in (1, 4, 16, 64, 128) if r <= max_rows]
    write_csv(
        folder / "per_sequence.csv",
        "layer,sequences,time_us",
        [f"{name},{r},{base + 0.2 * r}" for name, base in (("lm_head", 30), ("sampler", 7)) for r in rows],
    )
    lengths = [length for length in (16, 64, 256, 1024, 4096) if length <= max_kv]
    lines = [f"0,0,{n},{kv},{8 + 0.001 * n * kv}" for n in rows for kv in lengths]
    for chunk in (t for t in tokens if t >= 8):
        for history in (0, *lengths):
            alone = 8 + 0.01 * chunk + 0.0001 * chunk * (history + chunk / 2)
            lines.append(f"{chunk},{history},0,0,{alone}")
            lines += [f"{chunk},{history},{n},{kv},{alone + 0.002 * n * kv}" for n in rows for kv in lengths]
    write_csv(folder / "attention.csv.gz", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", lines)


def write_vidur(folder: Path, *, gpu: str = "h100", tps: tuple[int, ...] = (1, 2)) -> None:
    """A profile of `TINY`'s layers. Milliseconds."""
    names = ["input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm"]
    names += ["mlp_up_proj", "mlp_act", "mlp_down_proj", "add"]
    header = ",".join(f"time_stats.{name}.median" for name in ["emb", *names])
    header += ",n_head,n_kv_head,n_embd,n_expanded_embd,num_tokens,num_tensor_parallel_workers"
    rows = []
    for tp in tps:
        for tokens in (1024, 1, 256):
            times = ",".join(["0.5", *(str((0.01 + 0.0001 * tokens) / tp) for _ in names)])
            rows.append(f"{times},4,2,64,128,{tokens},{tp}")
    write_csv(folder / f"{gpu}_tiny_mlp.csv.gz", header, rows)
    write_csv(
        folder / f"{gpu}_dgx_all_reduce.csv",
        ",time_stats.all_reduce.median,num_workers,size,collective,devices_per_node",
        [
            f"{i},{0.02 + size / 1e8},{workers},{size},all_reduce,{per_node}"
            for i, (workers, per_node) in enumerate(((2, 2), (4, 2)))
            for size in (1024, 65536, 1 << 20)
        ],
    )


def write_aiconfigurator(folder: Path, *, gpu: str = "h100_sxm", dtype: str = "bf16") -> None:
    """Tables of one GPU, exact in n x k. Milliseconds."""
    sizes = (32, 64, 256, 512)
    write_csv(
        folder / f"{gpu}_gemm_{dtype}.csv.gz",
        "m,n,k,latency_ms",
        [f"{m},{n},{k},{m * n * k * 1e-9}" for m in (1, 16, 17, 1024) for n in sizes for k in sizes],
    )
    write_csv(
        folder / f"{gpu}_context_attention_bf16.csv.gz",
        "batch_size,prompt_len,num_heads,num_key_value_heads,head_dim,latency_ms",
        [
            f"{batch},{length},{heads},2,16,{batch * (0.01 + heads * length * length * 1e-9)}"
            for batch in (1, 2)
            for length in (1, 64, 256, 1024, 4096)
            for heads in (4, 8)
        ],
    )
    write_csv(
        folder / f"{gpu}_generation_attention_bf16.csv.gz",
        "batch_size,kv_cached,num_heads,num_key_value_heads,head_dim,latency_ms",
        [
            f"{batch},{cached},{heads},2,16,{0.01 + batch * (cached + 1) * 1e-7}"
            for batch in (1, 8, 64)
            for cached in (0, 255, 1023, 4095)
            for heads in (4, 8)
            if batch * (cached + 1) <= 64 * 1024
        ],
    )
    write_csv(
        folder / f"{gpu}_allreduce_bf16.csv.gz",
        "backend,num_gpus,message_elems,latency_ms",
        [
            f"{backend},{gpus},{elements},{base + elements * 1e-8}"
            for backend, base in (("vllm_graph", 0.004), ("vllm_eager", 0.02))
            for gpus in (2, 4)
            for elements in (128, 65536)
        ],
    )
