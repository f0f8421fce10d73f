"""How many KV blocks fit into memory, and how long a sequence may then get; the engine's start and the planner ask."""

from __future__ import annotations

import msgspec

from ...messages.errors import KVCacheTooSmallError

KV_SCALE_BYTES: dict[str, int] = {"int8": 4, "fp8": 4}  # behind each head of each token: `kernels.kv_quantization`


def kv_row_bytes(head_dim: int, dtype: str, bits: int) -> int:
    """Bytes that one head of one token's K (or V) takes in a cache of this dtype, with its scale if it has one."""
    return head_dim * bits // 8 + KV_SCALE_BYTES.get(dtype, 0)


class KVCachePlan(msgspec.Struct, frozen=True):
    """How many blocks there are and how long a sequence may get."""

    num_blocks: int
    max_model_len: int
    bytes_per_block: int


def size_kv_cache(
    *,
    kv_bytes: int,
    bytes_per_token: int,
    block_size: int,
    num_blocks: int | None,
    max_model_len: int | None,
    max_position: int,
    max_num_seqs: int,
) -> KVCachePlan:
    """Divide memory into KV blocks.

    Args:
        kv_bytes: memory for the KV cache; not looked at if `num_blocks` is given.
        bytes_per_token: KV of one token, all layers, on one device.
        num_blocks: exact number of blocks, or None.
        max_model_len: longest sequence asked for; None takes the checkpoint's, lowered to what fits.
        max_position: longest context of the checkpoint.
        max_num_seqs: more blocks than so many full sequences need could never be used.

    Raises:
        KVCacheTooSmallError: `max_model_len` was given and does not fit, or nothing does.
    """
    bytes_per_block = bytes_per_token * block_size
    longest = min(max_model_len or max_position, max_position)
    if num_blocks is None:
        num_blocks = min(kv_bytes // bytes_per_block, max_num_seqs * -(-longest // block_size))
    possible = num_blocks * block_size
    if possible < longest and (max_model_len is not None or possible < 2):  # a prompt and an output token
        raise KVCacheTooSmallError(
            max_model_len=longest, num_blocks=num_blocks, block_size=block_size, bytes_per_block=bytes_per_block
        )
    return KVCachePlan(num_blocks=num_blocks, max_model_len=min(longest, possible), bytes_per_block=bytes_per_block)
