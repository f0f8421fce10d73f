"""Finds out which variants of Triton kernels a model's warm-up launches, and compiles them, in a process of its own.

Run as `python -m octavo.actors.executor.gpu.compile_program` by `compile_ahead`: a `Question` in JSON comes in, an
`Answer` goes out.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
import torch
import triton

from ....kernels.gpu.compile_locks import CompileLocks
from ....kernels.gpu.compile_variants import compile_variants
from ....kernels.gpu.fake_cuda import KernelVariant
from ....messages.errors import OctavoError
from ....messages.ids import RequestId
from ....models import decoder as decoder_module
from ....models import registry
from ....models.decoder import Decoder
from ....models.interface import CausalLM
from ...runtime.parent_death import die_with_parent
from .. import device as device_module
from ..config import ExecutorConfig
from ..runner import load_runner
from ..sampler import SampledTokens, Sampler
from .compile_ahead import Answer, Question
from .fake_cuda import GpuFacts, fake_cuda
from .lone_rank import lone_rank
from .outline_reader import open_outline, stored_dtype


def find_variants(config: ExecutorConfig, facts: GpuFacts, rank: int = 0) -> list[KernelVariant]:
    """Which variants of kernels a rank's warm-up asks for, in its order; leaves the process on a GPU that is none.

    Of layers of a kind one is enough. Weights are of the kinds that will be read (`outline_reader`); of experts in
    MXFP4 it is taken for granted that their exponents let them stay codes.

    Raises:
        OctavoError: the model cannot be loaded, or not without its contents.
    """
    variants: list[KernelVariant] = []
    load = registry.load_model

    def load_few_layers(*args: Any, **options: Any) -> CausalLM:
        model = load(*args, **options)
        if isinstance(model, Decoder):
            _keep_one_of_each(model)
        return model

    device_module.load_model = load_few_layers  # type: ignore[attr-defined]  # whence it is called
    registry.checkpoint_dtype = stored_dtype  # type: ignore[attr-defined]
    decoder_module.open_weights = open_outline  # type: ignore[attr-defined]
    Sampler.sample = _sample_nothing  # type: ignore[method-assign,assignment]
    with fake_cuda(facts, on_variant=variants.append):
        load_runner(msgspec.structs.replace(config, device="cuda", model_impl="native"), lone_rank(config, rank))
    return variants


def _sample_nothing(
    _self: Sampler, _logits: torch.Tensor, request_ids: Sequence[RequestId], *, raw: torch.Tensor | None = None
) -> SampledTokens:
    """In the place of `Sampler.sample`, which a pipeline's last stage asks, and which looks at what it has chosen; none
    of its kernels is Triton's."""
    return SampledTokens([0] * len(request_ids), [], [], [])


def _keep_one_of_each(model: Decoder) -> None:
    """Leave out layers that launch what another one launches."""
    found: dict[Any, int] = {}
    for index, (layer, cos_sin) in enumerate(zip(model.layers, model._cos_sin, strict=True)):
        found.setdefault((_kind(layer), _kind(cos_sin), model.kv_cache_specs[index]), index)
    model.layers = [model.layers[index] for index in found.values()]
    model._cos_sin = [model._cos_sin[index] for index in found.values()]
    model.kv_cache_specs = tuple(model.kv_cache_specs[index] for index in found.values())


def _kind(value: Any) -> Any:
    """What two layers' parts have in common that launch the same: all but the contents of tensors."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), tuple(value.stride()), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_kind, value))
    if value is None or inspect.isroutine(value) or isinstance(value, _SCALARS):
        return value
    names = (*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", ()))
    return type(value), tuple(_kind(getattr(value, name)) for name in names)


_SCALARS = (bool, int, float, str, type, torch.dtype, torch.device)


def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    die_with_parent(question.parent_pid)
    sys.stdout.write(msgspec.json.encode(answer_to(question)).decode())


def answer_to(question: Question) -> Answer:
    """Find the variants and compile them; for a process of its own."""
    began = time.monotonic()
    try:
        variants = find_variants(question.config, question.facts, question.rank)
    except OctavoError as error:  # which loading will raise too, or it goes another way
        return Answer(0, 0, round(time.monotonic() - began, 2), 0.0, left_out=str(error))
    found = time.monotonic()
    compiled = list(
        compile_variants(
            variants,
            question.num_processes,
            begin_process=partial(die_with_parent, os.getpid()),
            locks=CompileLocks(Path(triton.knobs.cache.dir)),
        )
    )
    failures = sorted({each.failure for each in compiled if each.failure})
    return Answer(
        num_variants=len(variants),
        num_compiled=sum(each.is_new for each in compiled),
        find_s=round(found - began, 2),
        compile_s=round(time.monotonic() - found, 2),
        num_launchers=sum(each.has_launcher for each in compiled),
        failures=tuple(failures[:3]),
    )


if __name__ == "__main__":
    main()
