from __future__ import annotations

import pytest

from octavo.actors.executor.gpu.mixed_sizes import MOST_CHUNKS, MixedSize, MixedSizes, rungs


def test_numbers_of_decodes_are_few_and_reach_the_most_that_a_step_can_have() -> None:
    assert rungs(256) == [8, 16, 32, 64, 128, 192, 256]
    assert rungs(512) == [8, 16, 32, 64, 128, 192, 288, 432, 512]
    assert rungs(20) == [8, 16, 20]
    assert rungs(3) == [3]
    assert rungs(1) == [1]


def test_a_step_takes_the_smallest_size_that_holds_it() -> None:
    sizes = MixedSizes(32, (128, 64))
    assert list(sizes) == [MixedSize(decodes, tokens) for decodes in (8, 16, 32) for tokens in (64, 128)]
    assert sizes.find(0, 1, 1) == MixedSize(8, 64)
    assert sizes.find(8, 1, 64) == MixedSize(8, 64)
    assert sizes.find(9, MOST_CHUNKS, 65) == MixedSize(16, 128)
    assert sizes.find(5, 0, 0) == MixedSize(8, 64)
    assert (sizes.most_rows, sizes.most_tokens) == (32 + MOST_CHUNKS, 32 + 128)


@pytest.mark.parametrize("step", [(33, 1, 5), (5, MOST_CHUNKS + 1, 64), (5, 1, 129)])
def test_a_step_that_is_too_large_takes_none(step: tuple[int, int, int]) -> None:
    assert MixedSizes(32, (64, 128)).find(*step) is None


def test_without_tokens_there_are_no_sizes() -> None:
    sizes = MixedSizes(32, ())
    assert list(sizes) == []
    assert sizes.find(1, 1, 1) is None
    assert (sizes.most_rows, sizes.most_tokens) == (0, 0)
