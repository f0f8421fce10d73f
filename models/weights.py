"""Reading the tensors of a checkpoint: safetensors files in the Hugging Face layout, or a GGUF file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..kernels import cpu_build
from ..kernels.expert_codes import ExpertCodes
from ..kernels.huge_pages import place, release_file_pages
from ..kernels.linear_rounded import round_weight
from ..kernels.quantized_weight import LinearWeight, WeightPart, concatenate
from .device_loading import CudaStagingMaker, DeviceLoader
from .errors import WeightsError
from .gguf.reader import is_gguf
from .layers import rounds_weights
from .stored_tensors import FileRange, byte_ranges

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# Older checkpoints carry buffers that are recomputed from the configuration.
_IGNORED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")

_MAX_NAMES_SHOWN = 8
_LEAST_LOADED_LATER = 1024**2  # bytes of a matrix; all else is there at once, as some of it is computed with

ALL = slice(None)
Part = tuple[slice, ...]
"""A slice for each axis of a tensor."""


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a checkpoint's tensors: safetensors, or the GGUF file that `folder` is.

    Raises:
        WeightsError: there are none (the message says what there is instead), or the index names files not there.
    """
    if is_gguf(folder):
        return (folder,)
    index_path = folder / _INDEX
    if index_path.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index_path} is not a safetensors index: {error!r}. Download it again.") from error
        foreign = [name for name in names if Path(name).name != name]
        if foreign:  # an index must not be able to point outside its folder
            raise WeightsError(f"{index_path} names files outside its folder: {_shown(foreign)}")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise WeightsError(
                f"{folder} lacks {len(absent)} of the {len(names)} weight files that {_INDEX} names: {_shown(absent)}. "
                "Finish the download."
            )
        return tuple(folder / name for name in names)
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    # `consolidated*.safetensors` are Mistral's own layout of the same tensors, under other names.
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if len(files) == 1:
        return (files[0],)
    if files:
        raise WeightsError(
            f"{folder} has {len(files)} safetensors files but no {_INDEX} that says which tensor is where: "
            f"{_shown(path.name for path in files)}"
        )
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{folder} has its weights only as pickle files ({_shown(pickled)}), which can run any code when read. "
            "Take a revision with safetensors, or convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if any(folder.glob("*.gguf")):
        raise WeightsError(f"{folder} has its weights as GGUF: give the path of the .gguf file.")
    raise WeightsError(f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}. Was the download finished?")


def loader_for(device: torch.device) -> DeviceLoader | None:
    """What brings tensors to a device while the model goes on being built; None where they are simply copied."""
    return DeviceLoader(CudaStagingMaker(device)) if device.type == "cuda" else None


class WeightReader:
    """Hands out tensors by name and keeps account of what was asked for and what is there.

    A tensor that is missing or has another shape is noted and stood in for by zeros, so that `finish` can name all
    problems in one error; nothing may use the tensors before `finish` has returned: on a GPU the contents of matrices
    come meanwhile, from several threads (`settle` waits for them). Use as a context manager.

    Args:
        folder: the checkpoint, or a GGUF file.
        dtype, device: of every tensor handed out.
        files: that hold the tensors; None: those of the folder.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, files: Sequence[Path] | None = None
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._folder = folder
        self._stack = ExitStack()
        self._handles: dict[str, Any] = {}  # name of tensor -> open file that holds it
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._mismatched: list[str] = []
        self._problems: list[str] = []
        self._loader = loader_for(device)
        self._rounds = rounds_weights(dtype, device)
        self._ranges: dict[str, FileRange] = {}
        for path in weight_files(folder) if files is None else files:
            try:
                handle = self._stack.enter_context(self._open(path))
            except (SafetensorError, OSError) as error:
                self._stack.close()
                raise WeightsError(f"{path} is not a whole safetensors file ({error}). Download it again.") from error
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                self._handles[name] = handle
            if self._loader is not None and not is_gguf(path):
                fd = os.open(path, os.O_RDONLY)
                self._stack.callback(os.close, fd)
                self._ranges |= byte_ranges(path, fd)

    def _open(self, path: Path) -> Any:
        """A file with the methods of an open safetensors file."""
        return safe_open(path, framework="pt", device="cpu")

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(WeightsError):  # of a model that is not to be: whatever was wrong first is on its way
            self.settle()
        self._handles.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._handles

    def take(self, name: str, *shape: int, rows: slice = ALL) -> torch.Tensor:
        """The tensor called `name`, which must have this shape, or some of its rows, which alone are read.

        A copy of our own, never a view of the file.
        """
        return self._placed([self._read(name, shape, (rows,))])

    def take_embedding(self, name: str, *shape: int, rows: slice = ALL) -> torch.Tensor:
        """As `take`, in the dtype of a linear layer's matrix, which it may be too."""
        return self._placed([self._read(name, shape, (rows,))], is_matrix=True)

    def take_fused(
        self, names: Iterable[str], shapes: Sequence[tuple[int, ...]], rows: Iterable[slice] | None = None
    ) -> torch.Tensor:
        """Several tensors, or some rows of each, behind each other, for one matrix product instead of several."""
        return self._placed(
            [
                self._read(name, shape, (part,))
                for name, shape, part in zip(names, shapes, rows or [ALL] * len(shapes), strict=True)
            ]
        )

    def take_linear(
        self, name: str, *shape: int, rows: slice = ALL, columns: slice = ALL, is_compared: bool = False
    ) -> LinearWeight:
        """The matrix of a linear layer, or some of its outputs or inputs: as it is multiplied by.

        Args:
            is_compared: where it is floating, it is to be a tensor of the numbers that are stored.
        """
        part = self._read_linear(name, (shape[0], shape[1]), (rows, columns))
        if not isinstance(part, torch.Tensor):
            return part
        return self._placed([part], is_matrix=True) if is_compared else self._laid_out([part])

    def take_fused_linear(
        self,
        names: Iterable[str],
        shapes: Sequence[tuple[int, ...]],
        rows: Iterable[slice] | None = None,
        columns: slice = ALL,
    ) -> LinearWeight:
        """Several matrices, or some rows of each, behind each other along their outputs."""
        parts = [
            self._read_linear(name, (out_features, in_features), (part, columns))
            for name, (out_features, in_features), part in zip(names, shapes, rows or [ALL] * len(shapes), strict=True)
        ]
        floating = [part for part in parts if isinstance(part, torch.Tensor)]
        if len(floating) == len(parts):
            return self._laid_out(floating)
        return concatenate(
            [self._placed([part], is_matrix=True) if isinstance(part, torch.Tensor) else part for part in parts]
        )

    def take_expert(
        self,
        name: str,
        shape: tuple[int, int, int],
        index: int,
        *,
        takes_turns: bool = False,
        rows: slice = ALL,
        columns: slice = ALL,
    ) -> LinearWeight:
        """One expert's matrix, or some of its outputs or inputs, of a tensor that all experts share.

        Args:
            shape: of that tensor, `[num_experts, in_features, out_features]`: matrices are transposed there.
            takes_turns: two matrices' outputs take turns; they come behind each other, and `rows` are of each.
        """
        matrix = self._read_expert(name, shape, index)
        parts = [matrix[0::2][rows], matrix[1::2][rows]] if takes_turns else [matrix[rows]]
        return self._made_linear(name, [part[:, columns] for part in parts])

    def take_expert_codes(
        self,
        name: str,
        shape: tuple[int, int, int],
        experts: range,
        *,
        takes_turns: bool = False,
        rows: slice = ALL,
        columns: slice = ALL,
    ) -> ExpertCodes | None:
        """As `take_expert`, of several experts at once and as the codes that the checkpoint holds.

        Returns:
            None where it holds none that are multiplied as such on this device: then `take_expert` has the weights.
        """
        return None

    def tied_head(self, embedding: torch.Tensor, rows: slice = ALL) -> LinearWeight:
        """The output projection that shares its weights with the token embedding, of which `rows` were taken.

        Where matrices are rounded it is a copy: an embedding is what is stored, and the projection is most of a small
        model's step.
        """
        return (round_weight(embedding) if self._rounds else None) or embedding

    def settle(self) -> None:
        """Wait for the contents of what was taken so far.

        Raises:
            WeightsError: a file cannot be read.
        """
        if self._loader is not None:
            self._loader.finish()

    def leave(self, *beginnings: str) -> None:
        """Leave the tensors whose names begin so to other ranks."""
        self._taken.update(name for name in self._handles if name.startswith(beginnings))

    def finish(self) -> None:
        """Say that all has been taken.

        Raises:
            WeightsError: tensors are missing, have another shape, or nothing asked for them.
        """
        unexpected = sorted(name for name in self._handles if name not in self._taken and not _IGNORED.search(name))
        problems = []
        if self._missing:
            problems.append(f"{len(self._missing)} tensors are missing: {_shown(self._missing)}")
        if self._mismatched:
            problems.append(f"{len(self._mismatched)} have another shape: {_shown(self._problems)}")
        if unexpected:
            problems.append(f"{len(unexpected)} are not part of the model: {_shown(unexpected)}")
        if problems:
            config = "metadata" if is_gguf(self._folder) else "config.json"
            raise WeightsError(
                f"the weights in {self._folder} do not fit its {config}: {'; '.join(problems)}. "
                "Check that both are of the same model and that the download is whole.",
                missing=tuple(self._missing),
                unexpected=tuple(unexpected),
                mismatched=tuple(self._mismatched),
            )
        self.settle()

    def _read_linear(self, name: str, shape: tuple[int, int], part: Part = (ALL, ALL)) -> WeightPart:
        """One matrix, quantised or as it was read."""
        return self._read(name, shape, part)

    def _read_expert(self, name: str, shape: tuple[int, int, int], index: int) -> torch.Tensor:
        """Expert `index` of a stack, `[out_features, in_features]`."""
        if name in self._missing or name in self._mismatched:  # said once, not for each expert
            return torch.zeros(shape[2], shape[1])
        return self._read(name, shape, (slice(index, index + 1),))[0].T

    def _made_linear(self, name: str, parts: list[torch.Tensor]) -> LinearWeight:
        """A linear layer's matrix of floating parts behind each other."""
        return self._laid_out(parts)

    def _laid_out(self, parts: list[torch.Tensor]) -> LinearWeight:
        """The same, rounded to whole numbers where the CPU multiplies by those: read once, where they lie."""
        rounded = round_weight(*(part.to(self.dtype) for part in parts)) if self._rounds else None
        if rounded is None:
            return self._placed(parts, is_matrix=True)
        for part in parts:
            self._release(part)
        return rounded

    def _release(self, floating: torch.Tensor) -> None:
        """Done with what was read."""
        release_file_pages(floating)

    def _placed(self, parts: list[torch.Tensor], *, is_matrix: bool = False) -> torch.Tensor:
        """What was read, behind each other, in memory of our own; of a file that is mapped no page stays resident.

        A matrix that is stored in 16 bits stays so where a kernel multiplies float32 by it: the same numbers, and half
        of the memory to read each step.
        """
        dtype, stored = self.dtype, parts[0].dtype
        keeps = dtype is torch.float32 and self.device.type == "cpu" and stored in (torch.bfloat16, torch.float16)
        if is_matrix and keeps and all(part.dtype is stored for part in parts) and cpu_build.library() is not None:
            dtype = stored
        if is_matrix and self._loader is not None and sum(part.nbytes for part in parts) >= _LEAST_LOADED_LATER:
            return self._loader.place(parts, dtype, self.device)
        placed = place(parts, dtype).to(self.device)
        for part in parts:
            self._release(part)
        return placed

    def _read(self, name: str, shape: tuple[int, ...], part: Part = (ALL,)) -> torch.Tensor:
        self._taken.add(name)
        handle = self._handles.get(name)
        if handle is None:
            self._missing.append(name)
            return torch.zeros(shape)[part]
        found = tuple(handle.get_slice(name).get_shape())
        if found != shape:
            self._mismatched.append(name)
            self._problems.append(f"{name} {list(found)} instead of {list(shape)}")
            return torch.zeros(shape)[part]
        tensor = self._read_part(handle, name, part)
        if not tensor.is_floating_point():
            self._mismatched.append(name)
            self._problems.append(f"{name} holds {tensor.dtype} instead of floating point")
        return tensor

    def _read_part(self, handle: Any, name: str, part: Part) -> torch.Tensor:
        """Some of a tensor; of a file that is mapped into memory no other page is touched."""
        if self._loader is not None and name in self._ranges:
            whole: torch.Tensor = handle.get_tensor(name)  # a view of the mapped file, of which nothing is read here
            self._loader.note(whole, self._ranges[name])
            return whole[part]
        tensor: torch.Tensor = handle.get_tensor(name) if all(s == ALL for s in part) else handle.get_slice(name)[part]
        return tensor


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The dtype of the checkpoint's first floating tensor, for configurations that do not name one."""
    for tensor in _tensors(folder):
        if tensor.is_floating_point():
            return tensor.dtype
    raise WeightsError(f"the weights in {folder} hold no floating-point tensor")


def _tensors(folder: Path) -> Iterator[torch.Tensor]:
    for path in weight_files(folder):
        with safe_open(path, framework="pt", device="cpu") as handle:
            for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                yield handle.get_tensor(name)


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - _MAX_NAMES_SHOWN
    return ", ".join(listed[:_MAX_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
