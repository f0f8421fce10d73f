"""The embedding kernel and its meaning."""

from __future__ import annotations

import pytest
import torch

from octavo.kernels import embedding
from octavo.kernels.gpu import embedding as gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("hidden_size", [1, 80, 2049])
def test_rows_are_copied_and_ids_outside_the_vocabulary_give_zeros(
    hidden_size: int, ids_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    weight = torch.randn(11, hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    ids = torch.tensor([0, 10, -1, 11, 5, 5, 2**31 - 1], dtype=ids_dtype)
    out = gpu.embed(ids, weight)
    assert out.dtype == dtype
    for row, token_id in zip(out, ids.tolist(), strict=True):
        assert torch.equal(row, weight[token_id] if 0 <= token_id < 11 else torch.zeros_like(row))
    assert torch.equal(embedding.embed(ids, weight), out)


def test_an_id_alone_has_the_row_that_it_has_in_a_batch_and_no_ids_are_no_work() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([3, 1, 6])
    assert torch.equal(gpu.embed(ids[1:2], weight), gpu.embed(ids, weight)[1:2])
    assert gpu.embed(ids[:0], weight).shape == (0, 33)
    assert embedding.embed(ids[:0], weight).shape == (0, 33)


def test_a_strided_vocabulary_and_strided_ids_are_read_right() -> None:
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(3))[:, 3:20]
    ids = torch.arange(7)[::2]
    assert torch.equal(gpu.embed(ids, weight), weight[::2])


def test_shapes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="1-D"):
        embedding.embed(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(3, 3))
    assert not embedding.embed(torch.zeros(2, dtype=torch.int64), torch.zeros(0, 3)).any()
