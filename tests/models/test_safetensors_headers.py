"""SEC-04: weights are read from safetensors alone, and a header that lies is an error of the file and no more."""

from __future__ import annotations

import json
import random
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.models.errors import WeightsError
from octavo.models.weights import WeightReader

NUM_MUTATIONS = 300


def file_with(folder: Path, header: bytes, data: bytes = bytes(64), num_header_bytes: int | None = None) -> Path:
    path = folder / "model.safetensors"
    length = len(header) if num_header_bytes is None else num_header_bytes
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


def entry(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES: dict[str, dict[str, Any]] = {
    "offsets behind the end": {"a": entry([16], 0, 1 << 40)},
    "negative offsets": {"a": entry([16], -64, 0)},
    "offsets that overlap": {"a": entry([8], 0, 32), "b": entry([8], 16, 48)},
    "offsets with a hole": {"a": entry([4], 0, 16), "b": entry([4], 32, 48)},
    "offsets the wrong way round": {"a": entry([16], 64, 0)},
    "a shape of more than there is": {"a": entry([1 << 40], 0, 64)},
    "a shape whose product overflows": {"a": entry([1 << 32, 1 << 32, 4], 0, 64)},
    "a negative shape": {"a": entry([-4, -4], 0, 64)},
    "another type than the bytes have room for": {"a": entry([16], 0, 64, "F64")},
    "a type that there is not": {"a": entry([16], 0, 64, "F33")},
    "a shape that is none": {"a": entry(["16"], 0, 64)},
    "no offsets": {"a": {"dtype": "F32", "shape": [16]}},
    "a list": {"a": [1, 2, 3]},
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def read(folder: Path) -> list[torch.Tensor]:
    """The tensors that the file names; whatever is refused is refused as a defect of the file."""
    with WeightReader(folder, dtype=torch.float32, device=torch.device("cpu")) as reader:
        return [reader.take(name, size) for name, size in (("a", 8), ("b", 8)) if name in reader]


def test_a_header_that_tells_the_truth_is_read(tmp_path: Path) -> None:
    file_with(tmp_path, json.dumps({"a": entry([8], 0, 32), "b": entry([8], 32, 64)}).encode())
    assert [tensor.tolist() for tensor in read(tmp_path)] == [8 * [0.0], 8 * [0.0]]


def test_sec_04_a_safetensors_header_that_lies_is_refused_and_costs_no_memory(tmp_path: Path) -> None:
    before = peak_bytes()
    for header in LIES.values():
        file_with(tmp_path, json.dumps(header).encode())
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            read(tmp_path)
    for length in (0, 1, 1 << 31, 1 << 62, (1 << 64) - 1):
        file_with(tmp_path, b"{}", num_header_bytes=length)
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            read(tmp_path)
    for text in (b"{" * 10_000, b"\xff" * 100, b"[" * 5_000, b"null"):
        file_with(tmp_path, text)
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            read(tmp_path)
    assert peak_bytes() - before < 64 << 20


def test_sec_04_a_damaged_header_is_refused_or_means_a_file_that_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(8.0), "b": torch.ones(8)}, path)
    whole = path.read_bytes()
    num_header = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(4)
    num_refused = 0
    before = peak_bytes()
    for _ in range(NUM_MUTATIONS):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 5))):
            damaged[chance.randrange(num_header)] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            read(tmp_path)
        except WeightsError:
            num_refused += 1
    assert num_refused > NUM_MUTATIONS // 2
    assert peak_bytes() - before < 64 << 20
