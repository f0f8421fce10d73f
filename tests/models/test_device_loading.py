"""Weights brought to a device by several threads; a stand-in for the device copies as late as a real one may."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model

from octavo.models import weights
from octavo.models.device_loading import DeviceLoader, Piece
from octavo.models.errors import WeightsError
from octavo.models.registry import load_model
from octavo.models.stored_tensors import byte_ranges
from octavo.models.weights import WeightReader

CPU = torch.device("cpu")


class LateStaging:
    """Two buffers whose copies happen only when somebody waits for them, as a device's may."""

    def __init__(self, maker: LateMaker) -> None:
        self._maker = maker
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._pending: list[tuple[Piece, torch.Tensor] | None] = [None, None]
        self._turn = 0
        maker.threads.add(threading.get_ident())

    def buffer(self, num_bytes: int) -> torch.Tensor:
        self._turn ^= 1
        self._settle(self._turn)
        held = self._buffers[self._turn]
        if held is None or held.numel() < num_bytes:
            held = torch.empty(num_bytes, dtype=torch.uint8)
            self._buffers[self._turn] = held
        held.fill_(0xAA)  # what is not read anew must not pass for data
        self._maker.longest = max(self._maker.longest, num_bytes)
        return held[:num_bytes]

    def copy(self, piece: Piece, staged: torch.Tensor, ready: object) -> None:
        assert ready == "marked"
        self._pending[self._turn] = (piece, staged)

    def finish(self) -> None:
        self._settle(0)
        self._settle(1)

    def _settle(self, turn: int) -> None:
        pending, self._pending[turn] = self._pending[turn], None
        if pending is not None:
            piece, staged = pending
            piece.out.copy_(piece.view(staged))
            self._maker.num_pieces += 1


class LateMaker:
    def __init__(self) -> None:
        self.longest = 0
        self.num_pieces = 0
        self.threads: set[int] = set()

    def staging(self) -> LateStaging:
        return LateStaging(self)

    def mark(self) -> object:
        return "marked"


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> LateMaker:
    """Readers bring everything, however small, through a loader with three threads and buffers of 4 KiB."""
    made = LateMaker()
    monkeypatch.setattr(weights, "_LEAST_LOADED_LATER", 0)
    monkeypatch.setattr(weights, "loader_for", lambda device: DeviceLoader(made, num_threads=3, staging_bytes=4096))
    return made


def tensors_of(model: object) -> dict[str, torch.Tensor]:
    """Every tensor that a model holds, by the path of attributes that leads to it."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def walk(value: object, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value
            return
        if id(value) in seen or isinstance(value, str | int | float | type(None)):
            return
        seen.add(id(value))
        if isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{path}[{key}]")
        elif isinstance(value, list | tuple):
            for index, each in enumerate(value):
                walk(each, f"{path}[{index}]")
        elif type(value).__module__.startswith("octavo.models"):
            for name, each in getattr(value, "__dict__", {}).items():
                walk(each, f"{path}.{name}")

    walk(model, "model")
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_threads_bring_is_the_one_that_is_simply_read(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(family, tmp_path)
    plain = tensors_of(load_model(tmp_path, dtype=dtype, model_impl="native"))
    made = LateMaker()
    monkeypatch.setattr(weights, "_LEAST_LOADED_LATER", 1024)
    monkeypatch.setattr(weights, "loader_for", lambda device: DeviceLoader(made, num_threads=3, staging_bytes=4096))
    brought = tensors_of(load_model(tmp_path, dtype=dtype, model_impl="native"))
    assert brought.keys() == plain.keys()
    assert all(torch.equal(brought[name], plain[name]) for name in plain)
    assert made.num_pieces > 10


def test_pieces_are_no_longer_than_a_buffer_and_several_threads_read_them(maker: LateMaker, tmp_path: Path) -> None:
    stored = {f"w{index}": torch.randn(64, 100) for index in range(40)}
    save_file(stored, tmp_path / "model.safetensors")
    with WeightReader(tmp_path, dtype=torch.float32, device=CPU) as reader:
        taken = {name: reader.take_embedding(name, 64, 100) for name in stored}
        fused = reader.take_fused_linear(["w0", "w1"], [(64, 100), (64, 100)], rows=[slice(3, 9), slice(60, 64)])
        reader.finish()
    assert all(torch.equal(taken[name], stored[name]) for name in stored)
    assert isinstance(fused, torch.Tensor)
    assert torch.equal(fused, torch.cat([stored["w0"][3:9], stored["w1"][60:64]]))
    assert maker.longest <= 4096
    assert maker.num_pieces >= 40 * 64 * 100 * 4 // 4096
    assert len(maker.threads) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_columns_and_transposed_parts_arrive_as_they_are(dtype: torch.dtype, maker: LateMaker, tmp_path: Path) -> None:
    stored = torch.randn(37, 90)
    save_file({"w": stored, "e": torch.randn(3, 20, 70)}, tmp_path / "model.safetensors")
    experts = load_file(tmp_path / "model.safetensors")["e"]
    with WeightReader(tmp_path, dtype=dtype, device=CPU) as reader:
        columns = reader.take_linear("w", 37, 90, rows=slice(5, 30), columns=slice(10, 71))
        assert isinstance(columns, torch.Tensor)
        expert = reader._placed([reader._read("e", (3, 20, 70), (slice(1, 2),))[0].T], is_matrix=True)
        reader.finish()
    assert torch.equal(columns, stored[5:30, 10:71].to(dtype))
    assert torch.equal(expert, experts[1].T.to(dtype))


def test_what_is_no_matrix_is_there_at_once(maker: LateMaker, tmp_path: Path) -> None:
    save_file({"norm": torch.randn(300), "bias": torch.randn(40, 300)}, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    with WeightReader(tmp_path, dtype=torch.float32, device=CPU) as reader:
        assert torch.equal(reader.take("norm", 300) + 1.0, stored["norm"] + 1.0)
        assert torch.equal(reader.take("bias", 40, 300), stored["bias"])
        assert maker.num_pieces == 0
        reader.finish()


def test_a_row_longer_than_a_buffer_gets_a_longer_one(maker: LateMaker, tmp_path: Path) -> None:
    stored = torch.randn(6, 5000)
    save_file({"w": stored}, tmp_path / "model.safetensors")
    with WeightReader(tmp_path, dtype=torch.float32, device=CPU) as reader:
        columns = reader.take_linear("w", 6, 5000, columns=slice(0, 4000))
        reader.finish()
    assert torch.equal(columns, stored[:, :4000])  # type: ignore[arg-type]  # floating
    assert maker.longest == 16000


def test_what_lies_in_memory_is_brought_too(maker: LateMaker) -> None:
    decoded = torch.arange(3000, dtype=torch.float32).view(50, 60)
    loader = DeviceLoader(maker, num_threads=2, staging_bytes=512)
    out = loader.place([decoded[:20], decoded[30:].clone()], torch.bfloat16, CPU)
    loader.finish()
    assert torch.equal(out, torch.cat([decoded[:20], decoded[30:]]).bfloat16())


def test_a_loader_can_be_used_again_after_it_has_finished(maker: LateMaker) -> None:
    loader = DeviceLoader(maker, num_threads=2)
    for value in (1.0, 2.0):
        out = loader.place([torch.full((4, 4), value)], torch.float32, CPU)
        loader.finish()
        assert out.eq(value).all()


def test_a_file_that_ends_early_is_an_error_that_says_so(maker: LateMaker, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(100, 100), "b": torch.randn(100, 100)}, path)
    with pytest.raises(WeightsError, match="bytes too early"):
        with WeightReader(tmp_path, dtype=torch.float32, device=CPU) as reader:
            reader.take_embedding("a", 100, 100)
            reader.settle()
            os.truncate(path, 50_000)  # mapped pages behind it are gone too, so it must be the read that notices
            reader.take_embedding("b", 100, 100)
            reader.finish()


@pytest.mark.parametrize("fails_at", ["copy", "finish"])
def test_a_device_that_fails_ends_the_load_with_its_error(
    fails_at: str, maker: LateMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(LateStaging, fails_at, fail)
    loader = DeviceLoader(maker, num_threads=2, staging_bytes=64)
    for _ in range(20):  # more pieces than wait in the queue
        loader.place([torch.zeros(8, 8)], torch.float32, CPU)
    with pytest.raises(RuntimeError, match="out of memory"):
        loader.finish()


def test_ranges_are_where_the_tensors_are(tmp_path: Path) -> None:
    stored = {"a": torch.arange(5, dtype=torch.float32), "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3)}
    path = tmp_path / "model.safetensors"
    save_file(stored, path, metadata={"format": "pt"})
    data = path.read_bytes()
    for name, where in byte_ranges(path, 3).items():
        found = data[where.offset : where.offset + where.num_bytes]
        assert torch.equal(torch.frombuffer(bytearray(found), dtype=stored[name].dtype), stored[name].flatten())


def test_no_thread_outlives_a_model_that_cannot_be_loaded(maker: LateMaker, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        load_model(tmp_path, dtype="float32", model_impl="native")
    assert not [thread for thread in threading.enumerate() if thread.name == "octavo-weights"]
