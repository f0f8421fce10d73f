"""Embedding look-up on a GPU: one program for a run of one token's columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_BLOCK = 2048


@triton.jit
def _embed_kernel(
    ids_ptr,  # [num_tokens], int32 or int64
    weight_ptr,  # [vocab_size, hidden_size], rows weight_stride apart
    out_ptr,  # [num_tokens, hidden_size], contiguous
    weight_stride,
    vocab_size,
    hidden_size,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden_size
    token_id = tl.load(ids_ptr + token).to(tl.int64)
    known = (token_id >= 0) & (token_id < vocab_size)
    row = tl.load(weight_ptr + token_id * weight_stride + columns, mask=mask & known, other=0.0)
    tl.store(out_ptr + token * hidden_size + columns, row, mask=mask)


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `kernels.embedding.embed`."""
    num_tokens, hidden_size = ids.shape[0], weight.shape[1]
    out = torch.empty((num_tokens, hidden_size), dtype=weight.dtype, device=weight.device)
    if out.numel():
        block = min(_MAX_BLOCK, triton.next_power_of_2(hidden_size))
        _embed_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
            *(ids.contiguous(), weight, out, weight.stride(0), weight.shape[0], hidden_size),
            BLOCK=block,
            num_warps=min(4, max(1, block // 256)),
        )
    return out
