"""A paged KV cache behind the cache interface of `transformers`, for models whose attention cannot be replaced.

Such a model (Bloom, MPT, GPT-J ...) computes attention itself, over whatever its cache's `update` returns. This one
writes the new tokens to their slots and returns the row's tokens gathered from its blocks. It is slower, by that copy,
than attention on the blocks, but leaves the model's own arithmetic as it is, position biases and all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..kernels.attention_batch import AttentionBatch
from ..kernels.kv_quantization import dequantize, is_quantized
from ..kernels.paged_attention import write_kv
from .interface import KVCache, KVCacheSpec


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows with the same number of new tokens, their contexts aligned at the right.

    Attributes:
        tokens: the step's tokens that belong to the group, row after row.
        num_new: new tokens of each row.
        slots: `[num_rows, longest context]`, where each row's tokens lie; padding on the left is the row's first slot.
        mask: like `slots`, 1 for a token and 0 for padding.
        new_slots: `[num_rows * num_new]`, where the new tokens are written.
    """

    tokens: slice
    num_new: int
    slots: torch.Tensor
    mask: torch.Tensor
    new_slots: torch.Tensor

    @property
    def num_rows(self) -> int:
        return self.slots.shape[0]


def row_groups(batch: AttentionBatch, *, pad_contexts: bool) -> Iterator[RowGroup]:
    """The step's rows in groups that go through the model together; no new token is ever padding.

    Args:
        pad_contexts: put all decodes into one group, shorter contexts padded on the left. Otherwise only neighbours
            with contexts of the same length.
    """
    starts = batch.query_start.tolist()
    context_lens = batch.context_lens.tolist()
    first = 0
    while first < batch.num_rows:
        last = first
        if first < batch.num_decodes:
            while last + 1 < batch.num_decodes and (pad_contexts or context_lens[last + 1] == context_lens[first]):
                last += 1
        if starts[first] < starts[last + 1]:
            num_new = starts[first + 1] - starts[first]
            yield _group(batch, slice(first, last + 1), slice(starts[first], starts[last + 1]), num_new)
        first = last + 1


def _group(batch: AttentionBatch, rows: slice, tokens: slice, num_new: int) -> RowGroup:
    context_lens = batch.context_lens[rows].long()
    block_tables = batch.block_tables[rows].long()
    longest = int(context_lens.max())
    positions = torch.arange(longest, device=context_lens.device) - (longest - context_lens)[:, None]
    mask = positions >= 0
    positions = positions.clamp_(min=0)
    blocks = block_tables.gather(1, positions // batch.block_size)
    return RowGroup(
        tokens=tokens,
        num_new=num_new,
        slots=blocks * batch.block_size + positions % batch.block_size,
        mask=mask.long(),
        new_slots=batch.slot_mapping[tokens],
    )


class _PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer's cache as one group of rows sees it."""

    is_sliding = False  # it returns the whole context; the model's own mask narrows it

    def __init__(self, cache: KVCache, group: RowGroup) -> None:
        super().__init__()
        self._cache = cache
        self._group = group
        self._updated = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[num_rows, num_kv_heads, num_new, head_dim]` in, the same with the whole context's length out."""
        self._updated = True
        cache, slots = self._cache, self._group.slots
        write_kv(_token_major(key_states), _token_major(value_states), cache.k, cache.v, self._group.new_slots)
        block_size = cache.k.shape[2]
        blocks, offsets = (slots // block_size)[:, None, :], (slots % block_size)[:, None, :]
        heads = torch.arange(cache.k.shape[1], device=slots.device)[None, :, None]

        def read(paged: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            """`[num_rows, num_kv_heads, context, head_dim]`, contiguous, as models expect it of a cache."""
            if not is_quantized(paged.dtype):
                return paged[blocks, heads, offsets].to(dtype)
            return dequantize(paged.view(torch.uint8)[blocks, heads, offsets].view(paged.dtype)).to(dtype)

        return read(cache.k, key_states.dtype), read(cache.v, value_states.dtype)

    def get_seq_length(self) -> int:
        # Some models ask again after `update` and expect the new tokens to be counted.
        return int(self._group.slots.shape[1]) - (0 if self._updated else self._group.num_new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self._group.slots.shape[1]), 0

    def get_max_length(self) -> int:
        return -1


def _token_major(states: torch.Tensor) -> torch.Tensor:
    return states.transpose(1, 2).flatten(0, 1)


def paged_cache(kv_caches: list[KVCache], group: RowGroup) -> Cache:
    """The cache to pass as `past_key_values` for one forward pass of one group; used once."""
    return Cache(layers=[_PagedLayer(cache, group) for cache in kv_caches])


class ShapeRecorder(Cache):  # type: ignore[misc]  # transformers is untyped
    """An empty cache that notes the shapes of what is put into it, by layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._specs: dict[int, KVCacheSpec] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._specs[layer_idx] = KVCacheSpec(key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    @property
    def specs(self) -> tuple[KVCacheSpec, ...] | None:
        """One for each layer; None when the layers that keep KV are not simply all of them."""
        if not self._specs or sorted(self._specs) != list(range(len(self._specs))):
            return None
        return tuple(self._specs[layer] for layer in range(len(self._specs)))
