"""Memory on huge pages, and pages of files that are given back."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from octavo.kernels import huge_pages
from octavo.kernels.huge_pages import collapse, empty, place, release_file_pages


@pytest.mark.parametrize("shape", [(3, 5), (0, 7), (700, 1024), (1024, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_memory_is_of_the_asked_shape_and_its_own(shape: tuple[int, int], dtype: torch.dtype) -> None:
    first, second = empty(shape, dtype), empty(shape, dtype)
    assert (first.shape, first.dtype, first.is_contiguous()) == (torch.Size(shape), dtype, True)
    first.fill_(1)
    second.fill_(2)
    assert bool((first == 1).all())


def test_memory_lives_as_long_as_a_view_of_it() -> None:
    view = empty((1024, 1024), torch.float32).fill_(3.0)[1000]
    others = [empty((1024, 1024), torch.float32).fill_(4.0) for _ in range(3)]
    assert torch.equal(view, torch.full((1024,), 3.0))
    del others


def test_large_memory_begins_on_a_huge_page() -> None:
    assert empty((1024, 1024), torch.float32).data_ptr() % 2**21 == 0


@pytest.mark.parametrize("patience_ns", [0, 10**12])
@pytest.mark.parametrize("rows", [1, 600, 3000])
def test_memory_of_others_keeps_its_contents_on_huge_pages(
    rows: int, patience_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages._patience(), "left_ns", patience_ns)
    tensor = torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024)
    collapse(tensor)
    assert torch.equal(tensor, torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024))


def test_slow_huge_pages_are_not_waited_for_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = huge_pages._libc()
    if libc is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("the system has no huge pages")
    asked: list[tuple[int, int]] = []

    class Libc:
        def madvise(self, start: int, size: int, advice: int) -> int:
            asked.append((size, advice))
            return 0

    monkeypatch.setattr(huge_pages, "_libc", lambda: Libc())
    monkeypatch.setattr(huge_pages, "_SLOW_NS", -1)
    monkeypatch.setattr(huge_pages._patience(), "left_ns", 1)
    collapse(torch.empty(8 * 2**20, dtype=torch.uint8))
    assert [advice for _, advice in asked] == [mmap.MADV_HUGEPAGE, 25], "one was slow: the kernel has the rest"
    assert asked[1][0] == 2**21


def test_parts_are_placed_behind_each_other_in_the_asked_dtype() -> None:
    parts = [torch.randn(rows, 300) for rows in (3, 900, 1)]
    assert torch.equal(place(parts, torch.bfloat16), torch.cat(parts).bfloat16())


def test_released_pages_of_a_file_are_read_again_when_they_are_asked_for(tmp_path: Path) -> None:
    weight = torch.randn(512, 512)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        view = file.get_tensor("weight")
        release_file_pages(view)
        assert torch.equal(view, weight)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
@pytest.mark.parametrize("patience_ns", [0, 10**12])
@pytest.mark.parametrize("slow_ns", [-1, 10**12])
def test_what_is_placed_is_the_same_whether_huge_pages_come_fast_or_not(
    slow_ns: int, patience_ns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge_pages, "_SLOW_NS", slow_ns)
    monkeypatch.setattr(huge_pages._patience(), "left_ns", patience_ns)
    parts = [torch.randn(rows, 1024) for rows in (3, 2000)]
    placed = place(parts, torch.float32)
    assert torch.equal(placed, torch.cat(parts))
    assert placed.data_ptr() % 2**21 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages")
def test_slow_huge_pages_are_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_ns = iter(range(0, 10**12, 5_000_000))  # each page takes 5 ms
    asked: list[int] = []
    patience = huge_pages._Patience()

    def thread_time_ns() -> int:
        asked.append(1)
        return next(clock_ns)

    monkeypatch.setattr(huge_pages, "_patience", lambda: patience)
    monkeypatch.setattr(huge_pages.time, "thread_time_ns", thread_time_ns)
    for _ in range(100):
        empty((4096, 1024), torch.float32)
    assert len(asked) == 2 * huge_pages._PATIENCE_NS // 5_000_000
