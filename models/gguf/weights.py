"""Tensors of a GGUF file by their names in a checkpoint, with the methods that an open safetensors file has."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Final

import torch

from ...kernels.quantized_weight import QuantizedWeight
from ..errors import QuantizedModelError
from .config import Keys, architecture_of
from .dequantize import DECODED, PLAIN, dequantize
from .packed import packed_weight
from .reader import GGUFFile, TensorInfo
from .tensor_names import OF_CONFIG, checkpoint_name

# Llama's converter stores the rows of queries and keys so that the elements which turn together lie side by side.
_PERMUTED: Final = {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}}

# Gemma's converter adds one to the factors of norms, as the model itself does.
_ONE_ADDED: Final = ("gemma2", "gemma3")


class GGUFWeights:
    """The tensors of an open file. Use as a context manager.

    Args:
        path: of the file.
        dtype: that quantised tensors are decoded to; others keep theirs.

    Raises:
        UnsupportedModelError: of an architecture or with a type of tensors that is not supported.
        WeightsError: it is not a whole GGUF file.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._file = GGUFFile(path)
        self._dtype = dtype
        try:
            self._architecture = architecture_of(self._file)
            self._check_types()
        except BaseException:
            self._file.close()
            raise
        self._tensors = {
            checkpoint_name(self._architecture, name): info
            for name, info in self._file.tensors.items()
            if name not in OF_CONFIG
        }

    def __enter__(self) -> GGUFWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _Shape:
        return _Shape(self._tensors[name].shape)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A tensor of its own memory, with rows and values as the checkpoint has them."""
        info = self._tensors[name]
        rows = self._rows(info)
        if info.type.name in PLAIN:
            tensor = rows.view(PLAIN[info.type.name]).view(info.shape)
        else:
            tensor = torch.empty(info.shape, dtype=self._dtype)
            dequantize(rows.view(-1, info.type.block_bytes), info.type, tensor.view(-1))
        if self._architecture in _ONE_ADDED and info.name.endswith("norm.weight"):
            tensor = tensor.float() - 1.0
        return tensor

    def get_packed(self, name: str) -> QuantizedWeight | None:
        """A quantised matrix as it is; None for a tensor that is not one."""
        info = self._tensors[name]
        if info.type.name in PLAIN or len(info.shape) != 2:
            return None
        return packed_weight(self._rows(info), info.type)

    def _rows(self, info: TensorInfo) -> torch.Tensor:
        """A tensor's bytes, `[rows, bytes of a row]` uint8, a copy, in the checkpoint's order of rows.

        Quantisation blocks lie along a row, so that rows move before they are decoded.
        """
        row_bytes = info.shape[-1] // info.type.block_size * info.type.block_bytes
        if len(info.shape) == 1:  # a bias: each element is a row of the matrix beside it
            row_bytes = info.type.block_bytes
        rows = torch.from_numpy(self._file.read_tensor(info)).view(-1, row_bytes)
        part = info.name.split(".")[2] if info.name.count(".") == 3 else ""
        key = _PERMUTED.get(self._architecture, {}).get(part)
        return rows if key is None else _unpermuted(rows, self._num_heads(key))

    def _num_heads(self, key: str) -> int:
        keys = Keys(self._file, self._architecture)
        return keys.integer(key, keys.integer("attention.head_count"))

    def _check_types(self) -> None:
        for info in self._file.tensors.values():
            if info.type.name not in DECODED:
                raise QuantizedModelError(
                    f"{self._file.path}: tensor {info.name[:64]!r} is of type {info.type.name}, which is not "
                    f"supported; supported are {', '.join(DECODED)}. Take the model in one of these"
                )
        version = self._file.metadata.get("general.quantization_version", 2)
        if version != 2 and any(info.type.name not in PLAIN for info in self._file.tensors.values()):
            raise QuantizedModelError(
                f"{self._file.path} has quantised tensors of version {str(version)[:64]}; version 2 is read. "
                "Convert the model again"
            )


class _Shape:
    """What is known of a tensor before it is read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def get_shape(self) -> list[int]:
        return list(self._shape)


def _unpermuted(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo `LlamaModel.permute` of `convert_hf_to_gguf.py`, which put element `i` beside `i + head_dim / 2`."""
    num_rows, row_bytes = rows.shape
    if num_rows % (2 * num_heads):
        return rows  # of another shape than the model asks for, which the reader of the weights says
    pairs = rows.view(num_heads, num_rows // num_heads // 2, 2, row_bytes)
    return pairs.transpose(1, 2).reshape(num_rows, row_bytes)
