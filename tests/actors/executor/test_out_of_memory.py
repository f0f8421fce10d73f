from __future__ import annotations

import pytest
import torch

from octavo.actors.executor.out_of_memory import is_out_of_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("device-side assert triggered"), False),
        (ValueError("a step"), False),
    ],
)
def test_only_want_of_memory_is_taken_for_it(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_torch_on_a_cpu_says_so_in_these_words() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
