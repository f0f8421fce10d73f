"""A configuration that could be bought and booted: GPU, model and the engine's settings, down to blocks and price.

What the engine would refuse at its start is refused here, with the engine's own errors.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..actors.kv_allocator.sizing import size_kv_cache
from ..actors.scheduler.config import SchedulerConfig
from ..messages.errors import InvalidConfigError
from .step_time.gpus import GpuSpec, find_gpu
from .step_time.host_overhead import HostOverhead
from .step_time.interface import StepTimeModel
from .step_time.known_models import DEFAULT_MODEL, find_model
from .step_time.model_shape import BITS, ModelShape
from .step_time.read_model import read_step_time_model
from .step_time.roofline import Efficiency, RooflineModel, check_tp

DEFAULT_GPU = "H100-SXM"
MAX_BLOCK_SIZE = 256  # the kernels'
RUNTIME_BYTES = 1 << 30  # CUDA context, communication buffers, captured graphs, fragments: about 1 GiB


class MemoryBudget(msgspec.Struct, frozen=True, kw_only=True):
    """Where one GPU's memory goes; bytes.

    Attributes:
        usable: share of the whole that the engine may take.
        weights: this GPU's part of them.
        activations: most that a step needs beside.
        runtime: context, buffers, graphs.
        kv: what is left, or what the given number of blocks takes.
        bytes_per_block: on this GPU, all layers.
        estimated: the number of blocks comes from this arithmetic; not: it was given (best: from the engine's start).
    """

    memory: int
    usable: int
    weights: int
    activations: int
    runtime: int
    kv: int
    bytes_per_block: int
    num_blocks: int
    estimated: bool

    def lines(self) -> tuple[tuple[str, str], ...]:
        """The arithmetic, `(what, how much)`, for display."""
        gib = 1 << 30
        rows = [
            ("memory of a GPU", f"{self.memory / gib:.1f} GiB"),
            ("usable share of it", f"{self.usable / gib:.1f} GiB"),
            ("- weights", f"{self.weights / gib:.1f} GiB"),
            ("- activations", f"{self.activations / gib:.1f} GiB"),
            ("- runtime", f"{self.runtime / gib:.1f} GiB"),
            ("= KV cache", f"{self.kv / gib:.1f} GiB"),
            ("a block", f"{self.bytes_per_block / 1024:.0f} KiB"),
            ("blocks", f"{self.num_blocks:,}" + (" (estimated)" if self.estimated else " (given)")),
        ]
        return tuple(rows)


class ResolvedDeployment(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment worked out.

    Attributes:
        scheduler: the engine's own configuration, block count included.
        step_time: how long its steps take.
        gpus_per_replica: the tensor-parallel size.
        cost_per_replica_hour: US dollars.
    """

    gpu: GpuSpec
    model: ModelShape
    scheduler: SchedulerConfig
    memory: MemoryBudget
    step_time: StepTimeModel
    gpus_per_replica: int
    cost_per_replica_hour: float


class Deployment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One replica's hardware, model and settings. Fields that the engine has mean what they mean there.

    Attributes:
        gpu: a name of the table, or the numbers.
        model: a known name, a `config.json`, a folder with one, or the sizes.
        tp: GPUs that share each layer.
        dtype: of the weights: `auto` (the checkpoint's) or a key of `BITS`.
        kv_dtype: of the KV cache; None: the weights' where those have 16 bits or more, else bfloat16.
        memory_utilization: share of a GPU's memory that the engine takes in all, weights included.
        max_model_len: None takes the model's, lowered to what the KV cache holds.
        num_blocks: None estimates it from memory. Give what the engine reports at its start where it is known: a
            wrong number is the largest error a plan can have.
        profile: a fitted profile (JSON), or a folder of measured tables; empty: the closed form.
        gpu_hour: price of one GPU; None takes the table's.
        efficiency, host: of the closed form, and the host's part of a step.
    """

    gpu: str | GpuSpec = DEFAULT_GPU
    model: str | ModelShape = DEFAULT_MODEL
    tp: int = 1
    dtype: str = "auto"
    kv_dtype: str | None = None
    memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    pipeline_depth: int = 2
    long_prefill_threshold: int = 0
    priority_aging_ns: int = 10_000_000_000
    max_num_queued_requests: int = 4096
    max_num_queued_tokens: int = 8_000_000
    profile: str = ""
    gpu_hour: float | None = None
    efficiency: Efficiency = Efficiency()
    host: HostOverhead | None = None

    def resolve(self) -> ResolvedDeployment:
        """Work it out.

        Raises:
            InvalidConfigError: a setting is out of range, the GPU is unknown, the weights do not fit.
            KVCacheTooSmallError: the weights fit, but not the context asked for.
            ModelNotFoundError, UnsupportedModelError: see `find_model`.
        """
        gpu = find_gpu(self.gpu) if isinstance(self.gpu, str) else self.gpu
        shape = find_model(self.model) if isinstance(self.model, str) else self.model
        model = shape.with_dtype(self.dtype, self.kv_dtype)
        check_tp(model, self.tp)
        self._check()
        memory, max_model_len = self._memory(gpu, model)
        price = gpu.price_per_hour if self.gpu_hour is None else self.gpu_hour
        try:
            scheduler = SchedulerConfig(
                num_blocks=memory.num_blocks,
                block_size=self.block_size,
                max_model_len=max_model_len,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                pipeline_depth=self.pipeline_depth,
                max_num_queued_requests=self.max_num_queued_requests,
                max_num_queued_tokens=self.max_num_queued_tokens,
                priority_aging_ns=self.priority_aging_ns,
                long_prefill_threshold=self.long_prefill_threshold,
                enable_prefix_caching=self.enable_prefix_caching,
            )
        except ValueError as error:
            raise InvalidConfigError(str(error), field=str(error).partition("=")[0]) from None
        step_time: StepTimeModel
        if self.profile:
            step_time = read_step_time_model(Path(self.profile), model=model, gpu=gpu, tp=self.tp, host=self.host)
        else:
            step_time = RooflineModel(model, gpu, tp=self.tp, efficiency=self.efficiency, host=self.host)
        return ResolvedDeployment(
            gpu=gpu,
            model=model,
            scheduler=scheduler,
            memory=memory,
            step_time=step_time,
            gpus_per_replica=self.tp,
            cost_per_replica_hour=price * self.tp,
        )

    def _check(self) -> None:
        """What `SchedulerConfig` does not check."""
        if not 1 <= self.block_size <= MAX_BLOCK_SIZE:
            raise InvalidConfigError(
                f"block_size is {self.block_size}, but must be from 1 to {MAX_BLOCK_SIZE}", field="block_size"
            )
        if not 0.0 < self.memory_utilization <= 1.0:
            raise InvalidConfigError(
                f"memory_utilization is {self.memory_utilization}, but is a share: more than 0, at most 1",
                field="memory_utilization",
            )
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("num_blocks", 1),
            ("max_model_len", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InvalidConfigError(f"{name} is {value}, but must be at least {least}", field=name)
        if self.gpu_hour is not None and not self.gpu_hour >= 0.0:
            raise InvalidConfigError(f"gpu_hour is {self.gpu_hour}, but must be a price from 0 up", field="gpu_hour")

    def _memory(self, gpu: GpuSpec, model: ModelShape) -> tuple[MemoryBudget, int]:
        """Divide a GPU's memory; returns the longest sequence too. The rules are the executor's own."""
        bytes_per_block = model.kv_bytes_per_token(self.tp) * self.block_size
        usable = int(gpu.memory_bytes * self.memory_utilization)
        weights = -(-model.weight_bytes // self.tp)
        activations = activation_bytes(
            model, tp=self.tp, num_tokens=self.max_num_batched_tokens, num_samples=self.max_num_seqs
        )
        left = usable - weights - activations - RUNTIME_BYTES
        if self.num_blocks is None and left < bytes_per_block:
            raise self._weights_do_not_fit(gpu, model, usable, weights, activations)
        plan = size_kv_cache(
            kv_bytes=left,
            bytes_per_token=model.kv_bytes_per_token(self.tp),
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_model_len=self.max_model_len,
            max_position=model.max_model_len,
            max_num_seqs=self.max_num_seqs,
        )
        budget = MemoryBudget(
            memory=gpu.memory_bytes,
            usable=usable,
            weights=weights,
            activations=activations,
            runtime=RUNTIME_BYTES,
            kv=left if self.num_blocks is None else plan.num_blocks * bytes_per_block,
            bytes_per_block=bytes_per_block,
            num_blocks=plan.num_blocks,
            estimated=self.num_blocks is None,
        )
        return budget, plan.max_model_len

    def _weights_do_not_fit(
        self, gpu: GpuSpec, model: ModelShape, usable: int, weights: int, activations: int
    ) -> InvalidConfigError:
        gib = 1 << 30
        advice = "take a GPU with more memory, or weights of fewer bits (dtype)"
        for tp in (2, 4, 8, 16):
            if tp > self.tp and model.num_heads % tp == 0 and model.weight_bytes / tp + activations < 0.9 * usable:
                advice = f"raise tensor_parallel_size to {tp}, or {advice}"
                break
        return InvalidConfigError(
            f"{model.name} in {model.weight_dtype} does not fit {self.tp} x {gpu.name}: of {usable / gib:.1f} GiB "
            f"each (memory_utilization={self.memory_utilization}) its weights take {weights / gib:.1f}, a step "
            f"{activations / gib:.1f} and the runtime {RUNTIME_BYTES / gib:.1f}, which leaves no KV block: {advice}",
            field="tensor_parallel_size" if "tensor_parallel_size" in advice else "gpu",
        )


def activation_bytes(model: ModelShape, *, tp: int, num_tokens: int, num_samples: int) -> int:
    """Most memory that a step needs beside weights and KV, on each GPU.

    The widest moment is an MLP: residual, its normed copy, gate and up, their product; or the logits in float32 with
    the sampler's copy. An estimate: allocators differ.
    """
    width = BITS[model.kv_dtype] // 8 if BITS[model.kv_dtype] >= 16 else 2
    widest = max(model.intermediate_size, model.expert_size * model.num_active_experts + model.shared_expert_size)
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = num_tokens * width * (3 * model.hidden_size + max(3 * widest, heads) // tp)
    logits = num_samples * model.vocab_size * 8
    return max(layer, logits)
