"""Which variants of kernels are compiled ahead for a rank, and which its start launches: `python FILE QUESTIONS`.

QUESTIONS are JSON, each with the fields of an `ExecutorConfig` or of `serve` of `gpu_dry_run`, and a `rank`; the answer
is a line of JSON for each, of both lists. What is launched is found out with all layers and, where a checkpoint holds
codes, from what its reader makes of them.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_dry_run as dry
import torch
from fake_cuda import DEVICE, Kernels, fake_cuda
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from octavo.actors.executor.config import ExecutorConfig
from octavo.actors.executor.gpu import compile_program
from octavo.actors.executor.gpu.fake_cuda import GpuFacts, KernelVariant
from octavo.actors.executor.gpu.lone_rank import lone_rank
from octavo.actors.executor.runner import load_runner
from octavo.actors.executor.sampler import SampledTokens, Sampler
from octavo.kernels import cpu_build
from octavo.kernels.code_layout import padded_inputs
from octavo.kernels.quantized_weight import QuantizedWeight
from octavo.models import decoder, registry
from octavo.models.quantization import fp8
from octavo.models.quantization.reader import QuantizedReader
from octavo.models.quantization.scheme import Scheme
from octavo.models.random_weights import RandomReader, RandomWeights
from octavo.models.registry import load_config
from octavo.models.weights import ALL, Part, checkpoint_dtype

Question = dict[str, Any]
_SERVED = {
    **{"cuda_graph_sizes": (1, 32), "max_model_len": 512, "max_num_batched_tokens": 256, "max_num_seqs": 32},
    "device": "cuda",
}


def key(each: KernelVariant) -> str:
    options = each.options
    where = f"{each.signature} {each.constexprs} {each.attributes}"
    return f"{each.name} {where} {options.num_warps} {options.num_stages}"


def compiled(question: Question) -> list[str]:
    rank = question.pop("rank")
    with tempfile.TemporaryDirectory() as folder:
        if "model_path" not in question:
            preset, num_layers = question.pop("preset"), question.pop("num_layers")
            fields = dry.mxfp4_fields(question.pop("in_mxfp4", False))
            dry.write_config_folder(preset, Path(folder), tokenizer=None, num_hidden_layers=num_layers, **fields)
            question["model_path"] = folder
        variants = compile_program.find_variants(_config(question), GpuFacts(), rank)
    assert cpu_build.loaded() is None, "the CPU's kernels are of no use here"
    return sorted(map(key, variants))


def launched(question: Question) -> list[str]:
    rank, keys = question.pop("rank"), []
    make = Kernels.make
    Kernels.make = lambda self, each: (keys.append(key(each)), make(self, each))[1]  # type: ignore[method-assign]
    group = lone_rank(_config({"model_path": ""} | _parallel(question)), rank)
    decoder.open_weights, registry.checkpoint_dtype = _read, _dtype  # type: ignore[attr-defined]
    with fake_cuda() as kernels:
        if question.get("pipeline_parallel_size", 1) > 1:
            Sampler.sample = _first_token  # type: ignore[method-assign]
            dry.load(question.pop("preset"), group=group, **(_SERVED | question))
        elif "preset" in question:  # its weights are none: random ones are of the same kinds
            dry.serve(kernels, question.pop("preset"), num_steps=3, group=group, **(_SERVED | question))
        else:
            load_runner(_config(question), group)
    return sorted(keys)


def _config(question: Question) -> ExecutorConfig:
    return ExecutorConfig(**(_SERVED | question))


def _parallel(question: Question) -> Question:
    return {name: value for name, value in question.items() if name.endswith("_size") or name == "expert_parallel"}


def _first_token(_self: Sampler, logits: torch.Tensor, request_ids: Any, *, raw: Any = None) -> SampledTokens:
    assert logits.shape[0] == len(request_ids)
    return SampledTokens([0] * len(request_ids), [], [], [])


_equal = torch.equal
_open_weights, _from_codes = decoder.open_weights, QuantizedWeight.from_codes


def _dtype(folder: Path) -> torch.dtype:
    with unset_fake_temporarily():
        return checkpoint_dtype(folder)


def _read(folder: Path, *, quantization: Any, **options: Any) -> Any:
    if isinstance(quantization, Scheme) and quantization.method == "fp8":
        return ReadFp8(folder, scheme=quantization, **options)
    if isinstance(quantization, Scheme):
        return Read(folder, scheme=quantization, **options)
    return _open_weights(folder, quantization=quantization or RandomWeights(), **options)


class Read(RandomReader):
    """Reads the codes indeed, and takes them to a GPU where they have no contents."""

    def __init__(self, folder: Path, *, scheme: Scheme, **options: Any) -> None:
        super().__init__(folder, **options)
        self._codes = QuantizedReader(folder, scheme=scheme, **(options | {"device": torch.device("cpu")}))
        self._orders: list[tuple[torch.Tensor, torch.Tensor]] = []

    def _read_linear(
        self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)
    ) -> torch.Tensor | QuantizedWeight:
        with unset_fake_temporarily(), patch.object(QuantizedWeight, "from_codes", _from_codes):
            weight = self._codes._read_linear(name, shape, part)
        if isinstance(weight, torch.Tensor):
            return super()._read_linear(name, shape, part)

        def there(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)

        num_bytes = padded_inputs(weight.in_features) * weight.bits // 8
        return replace(
            weight,
            codes=torch.empty((weight.shape[0], num_bytes), dtype=torch.uint8, device=DEVICE),
            scales=there(weight.scales),
            zeros=there(weight.zeros),
            input_order=None if weight.input_order is None else self._order(weight.input_order),
        )

    def _order(self, order: torch.Tensor) -> torch.Tensor:
        """One tensor for all that are equal, as is compared there."""
        with unset_fake_temporarily():
            found = [there for read, there in self._orders if _equal(read, order)]
        if not found:
            found = [torch.empty(order.shape, dtype=order.dtype, device=DEVICE)]
            self._orders.append((order, found[0]))
        return found[0]


class ReadFp8(RandomReader):
    """The same of a checkpoint in fp8."""

    def __init__(self, folder: Path, *, scheme: Scheme, **options: Any) -> None:
        super().__init__(folder, **options)
        with patch.object(fp8, "multiplies_fp8", lambda _device: True):
            self._codes = fp8.Fp8Reader(folder, scheme=scheme, **(options | {"device": torch.device("cpu")}))

    def take_fused_linear(self, *args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            weight = self._codes.take_fused_linear(*args, **options)
        return tuple(map(self._there, weight)) if isinstance(weight, tuple) else self._there(weight)

    def take_linear(self, name: str, *shape: int, rows: slice = ALL, columns: slice = ALL, **_: Any) -> Any:
        return self.take_fused_linear((name,), (shape,), (rows,), columns)

    def _there(self, weight: Any) -> Any:
        if weight is None or isinstance(weight, torch.Tensor):
            return None if weight is None else torch.empty(weight.shape, dtype=weight.dtype, device=DEVICE)
        parts = {name: self._there(getattr(weight, name)) for name in ("codes", "scales", "input_scale")}
        return replace(weight, **parts)


def main(questions: list[Question]) -> None:
    FakeTensorMode()  # what it imports takes seconds, which all of them would spend
    for path in (each["model_path"] for each in questions if "model_path" in each):
        load_config(path)  # likewise
    # Each in a process of its own, as none knows what was launched before.
    fork = multiprocessing.get_context("fork")
    with fork.Pool(2, maxtasksperchild=1) as pool:
        asked = [[pool.apply_async(ask, (question,)) for ask in (compiled, launched)] for question in questions]
        for both in asked:
            print(json.dumps([answer.get() for answer in both]), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
