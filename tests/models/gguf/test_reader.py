"""The container: what well-formed files hold, and what becomes of all others."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gguf import F32, U32, Raw, encoded, gguf_bytes, text, value

from octavo.models.errors import ModelLoadError, UnsupportedModelError, WeightsError
from octavo.models.gguf import reader
from octavo.models.gguf.reader import GGUFFile, is_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.number": -5,
    "a.float32": F32(1e-6),
    "a.float64": 0.1,
    "a.flag": True,
    "a.text": "Grüße, 世界",
    "some.texts": ["a", "", "ĠĊ", "b b"],
    "some.numbers": [3, -1, 2],
    "some.floats": [0.5, -1.0],
}
WEIGHT = np.arange(64, dtype=np.float32).reshape(2, 32)
TENSORS = {"x": encoded(WEIGHT, "F32"), "y": encoded(WEIGHT[0], "Q8_0"), "z": encoded(WEIGHT[:, :3], "F16")}


def opened(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def plain(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: item.tolist() if isinstance(item, np.ndarray) else item for key, item in metadata.items()}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [32, 64, 8])
def test_metadata_and_tensors_come_back_as_written(version: int, alignment: int, tmp_path: Path) -> None:
    metadata = {**METADATA, "general.alignment": U32(alignment)}
    with opened(tmp_path, gguf_bytes(metadata, TENSORS, version=version, alignment=alignment)) as file:
        assert file.version == version
        assert plain(file.metadata) == metadata
        assert list(file.tensors) == ["x", "y", "z"]
        for name, tensor in TENSORS.items():
            info = file.tensors[name]
            assert (info.type.name, info.shape) == (tensor.kind, tensor.shape)
            assert file.read_tensor(info).tobytes() == tensor.data


def test_a_float32_is_the_decimal_that_was_meant(tmp_path: Path) -> None:
    with opened(tmp_path, gguf_bytes({"eps": F32(1e-6)}, {})) as file:
        assert file.metadata["eps"] == 1e-6


def test_a_file_of_the_format_s_own_writer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_uint8("u8", 200)
    writer.add_int16("i16", -300)
    writer.add_uint64("u64", 2**63)
    writer.add_float64("f64", 0.1)
    writer.add_bool("no", False)
    writer.add_array("flags", [True, False])
    writer.add_array("words", ["x", "y z"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("w", WEIGHT)
    quantised = gguf.quants.quantize(WEIGHT, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        assert plain(file.metadata) == {
            **{"general.architecture": "qwen3", "u8": 200, "i16": -300, "u64": 2**63, "f64": 0.1, "no": False},
            **{"flags": [True, False], "words": ["x", "y z"], "numbers": [1, 2, 3]},
        }
        assert {name: (info.type.name, info.shape) for name, info in file.tensors.items()} == {
            "w": ("F32", (2, 32)),
            "q": ("Q8_0", (2, 32)),
        }
        assert file.read_tensor(file.tensors["q"]).tobytes() == quantised.tobytes()


def header(num_tensors: int = 0, num_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)


def tensor_info(name: str = "x", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims) + struct.pack("<IQ", kind, offset)


def with_tensors(*infos: bytes, data: int = 256) -> bytes:
    head = header(num_tensors=len(infos)) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "magic": (b"GGML" + bytes(100), "does not begin with GGUF"),
    "short": (b"GGUF\3\0", "pass the 6 of the file"),
    "tensor count": (header(num_tensors=2**40), "it counts 1,099,511,627,776 tensors"),
    "key count": (header(num_keys=2**63), "metadata entries"),
    "key without end": (header(num_keys=1) + struct.pack("<Q", 1000), "1,000 bytes"),
    "key too long": (header(num_keys=1) + struct.pack("<Q", 2**62), "at most"),
    "key twice": (header(num_keys=2) + 2 * (text("k") + value(1)), "'k' twice"),
    "key not UTF-8": (header(num_keys=1) + struct.pack("<Q", 1) + b"\xff" + value(1), "not UTF-8"),
    "value type": (header(num_keys=1) + text("k") + struct.pack("<I", 99), "of type 99"),
    "truth": (header(num_keys=1) + text("k") + struct.pack("<IB", 7, 2), "truth value of 2"),
    "text too long": (header(num_keys=1) + text("k") + struct.pack("<IQ", 8, 2**50), "is 256|at most"),
    "array too long": (header(num_keys=1) + text("k") + struct.pack("<IIQ", 9, 4, 2**61), "bytes from byte"),
    "texts too many": (header(num_keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**40), "1,099,511,627,776 strings"),
    "texts without end": (header(num_keys=1) + text("k") + struct.pack("<IIQ", 9, 8, 3) + text("a"), "ends within"),
    "a text too long": (header(num_keys=1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**63), "too long"),
    "a text not UTF-8": (header(num_keys=1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 1) + b"\x80", "not UTF-8"),
    "array of arrays": (header(num_keys=1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "an array of arrays"),
    "alignment": (gguf_bytes({"general.alignment": U32(24)}, {}), "power of two"),
    "alignment of text": (gguf_bytes({"general.alignment": "x"}, {}), "power of two"),
    "no dimensions": (with_tensors(tensor_info(dims=())), "0 dimensions"),
    "five dimensions": (with_tensors(tensor_info(dims=(1,) * 5)), "5 dimensions"),
    "2**32 dimensions": (with_tensors(text("x") + struct.pack("<I", 2**32 - 1)), "dimensions"),
    "no elements": (with_tensors(tensor_info(dims=(32, 0))), r"shape \[0, 32\]"),
    "elements past 64 bits": (with_tensors(tensor_info(dims=(2**62, 2**62))), "has the shape"),
    "part of a block": (with_tensors(tensor_info(dims=(33,), kind=8)), "no whole number of Q8_0 blocks"),
    "name too long": (with_tensors(tensor_info(name="x" * 65)), "at most 64"),
    "not aligned": (with_tensors(tensor_info(offset=8)), "not aligned"),
    "past the end": (with_tensors(tensor_info(dims=(64, 1)), data=128), "ends at byte"),
    "offset past the end": (with_tensors(tensor_info(offset=2**64 - 32)), "ends at byte"),
    "two of a name": (with_tensors(tensor_info(), tensor_info(offset=128)), "two tensors 'x'"),
    "overlapping": (with_tensors(tensor_info("b", offset=96), tensor_info("a")), "'a' and 'b' overlap"),
    "the same bytes": (with_tensors(tensor_info("a"), tensor_info("b")), "overlap"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    data, message = BROKEN[case]
    with pytest.raises(WeightsError, match=message):
        opened(tmp_path, data)


def test_what_is_whole_but_not_known_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="version 1; read are 2 and 3"):
        opened(tmp_path, header(version=1))
    with pytest.raises(UnsupportedModelError, match="big-endian"):
        opened(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedModelError, match="'x' is of type 1234"):
        opened(tmp_path, with_tensors(tensor_info(kind=1234)))
    with pytest.raises(UnsupportedModelError, match="one of 3 parts"):
        opened(tmp_path, gguf_bytes({"split.count": U32(3)}, {}))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        GGUFFile(tmp_path / "model.gguf")


def test_the_header_may_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_bytes({"k": "x" * 1000}, {})
    monkeypatch.setattr(reader, "MAX_HEADER_BYTES", 500)
    with pytest.raises(WeightsError, match=r"pass 500|at most 500"):
        opened(tmp_path, data)


def test_strings_of_all_arrays_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gguf_bytes({"a": ["x"] * 6, "b": ["y"] * 6}, {})
    monkeypatch.setattr(reader, "MAX_NUM_STRINGS", 10)
    with pytest.raises(WeightsError, match="'b' has 6 strings"):
        opened(tmp_path, data)


def test_a_folder_and_another_file_are_no_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "model.bin").touch()
    (tmp_path / "MODEL.GGUF").touch()
    assert [is_gguf(tmp_path / name) for name in ("folder.gguf", "model.bin", "MODEL.GGUF")] == [False, False, True]


WHOLE = gguf_bytes(METADATA, TENSORS)


def read_everything(path: Path) -> None:
    """Reads all there is; a refusal is well, anything else is not."""
    try:
        file = GGUFFile(path)
    except ModelLoadError as error:
        assert len(str(error)) < 1000
        return
    with file:
        for info in file.tensors.values():
            assert file.read_tensor(info).nbytes == info.num_bytes


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    padding = -len(TENSORS["z"].data) % 32  # behind the last tensor, and missed by nobody
    for length in range(len(WHOLE) - padding):
        with pytest.raises(ModelLoadError):
            opened(tmp_path, WHOLE[:length])


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    length=st.integers(0, 2 * len(WHOLE)),
)
def test_any_bytes_are_read_or_refused(changes: list[tuple[int, int]], length: int, tmp_path: Path) -> None:
    data = bytearray(WHOLE[:length] if length > 16 else WHOLE)
    for at, byte in changes:
        data[at % len(data)] = byte
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    read_everything(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, len(WHOLE) - 9), number=st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
def test_any_huge_number_is_read_or_refused(at: int, number: int, tmp_path: Path) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(WHOLE[:at] + struct.pack("<Q", number) + WHOLE[at + 8 :])
    read_everything(path)


def test_an_array_may_be_empty(tmp_path: Path) -> None:
    data = header(num_keys=2) + text("a") + struct.pack("<IIQ", 9, 5, 0) + text("b") + struct.pack("<IIQ", 9, 8, 0)
    with opened(tmp_path, data) as file:
        assert plain(file.metadata) == {"a": [], "b": []}


def test_a_tensor_as_raw_bytes_keeps_its_place(tmp_path: Path) -> None:
    raw = Raw("Q6_K", (1, 256), bytes(range(210)))
    with opened(tmp_path, gguf_bytes({}, {"a": encoded(WEIGHT[:1, :5], "F32"), "b": raw})) as file:
        assert file.read_tensor(file.tensors["b"]).tobytes() == raw.data


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path, WHOLE) as file:
        (tmp_path / "model.gguf").write_bytes(WHOLE[:-200])
        with pytest.raises(WeightsError, match="has become shorter"):
            for info in file.tensors.values():
                file.read_tensor(info)
