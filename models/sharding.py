"""Which heads, features, experts, layers and words a rank holds, and which sizes of a group a model allows.

Source: Shoeybi et al. 2019 (Megatron-LM): the first matrix of a block is divided by its outputs, the second by its
inputs, so that a block needs one sum and no other exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import UnsupportedModelError
from .parallel import ParallelGroup


@dataclass(frozen=True, slots=True)
class HeadShare:
    """A rank's heads.

    Attributes:
        num_heads, num_kv_heads: how many.
        q, kv: their features among all heads' features.
    """

    num_heads: int
    num_kv_heads: int
    q: slice
    kv: slice


def share_heads(group: ParallelGroup, num_heads: int, num_kv_heads: int, head_dim: int) -> HeadShare:
    """A rank's heads, and the KV heads that they read: where there are fewer than ranks, several hold the same one."""
    mine = num_heads // group.tp_size
    if num_kv_heads >= group.tp_size:
        mine_kv = num_kv_heads // group.tp_size
        first_kv = group.tp_rank * mine_kv
    else:
        mine_kv = 1
        first_kv = group.tp_rank * num_kv_heads // group.tp_size
    first = group.tp_rank * mine
    return HeadShare(
        num_heads=mine,
        num_kv_heads=mine_kv,
        q=slice(first * head_dim, (first + mine) * head_dim),
        kv=slice(first_kv * head_dim, (first_kv + mine_kv) * head_dim),
    )


def share_evenly(group: ParallelGroup, size: int) -> slice:
    """A rank's part of `size` features."""
    mine = size // group.tp_size
    return slice(group.tp_rank * mine, (group.tp_rank + 1) * mine)


def share_roughly(index: int, parts: int, size: int) -> range:
    """Part `index` of `size` things in `parts` runs whose lengths differ by one at most."""
    return range(index * size // parts, (index + 1) * size // parts)


def stage_layers(group: ParallelGroup, num_layers: int) -> range:
    """The layers of a rank's stage."""
    return share_roughly(group.pp_rank, group.pp_size, num_layers)


def check_sizes(  # noqa: PLR0917 - one argument for each thing that is divided
    group: ParallelGroup,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    vocab_size: int,
    split_inputs: Mapping[str, int],
    unit: int,
    num_experts: int = 0,
) -> None:
    """See that a model can be divided so.

    Args:
        split_inputs: name and size of what is divided among ranks as inputs of a matrix.
        unit: consecutive inputs that cannot be torn apart: 1, or a group of quantised weights.
        num_experts: 0 for none; with expert parallel whole ones are divided.

    Raises:
        UnsupportedModelError: naming what does not divide and which sizes are possible.
    """
    if group.world_size == 1:
        return
    if group.pp_size > num_layers:
        raise UnsupportedModelError(
            f"pipeline_parallel_size={group.pp_size}: the model has {num_layers} layers, so at most {num_layers} stages"
        )
    if group.expert_parallel and not num_experts:
        raise UnsupportedModelError("expert_parallel: the model is no mixture of experts. Leave it out")

    def reasons(size: int) -> list[str]:
        found = []
        if num_heads % size:
            found.append(f"{num_heads} attention heads")
        if num_kv_heads % size and size % num_kv_heads:
            found.append(f"{num_kv_heads} KV heads")
        if size > 1:
            in_units = "" if unit == 1 else f" in groups of {unit} quantised weights"
            found.extend(f"{name} of {of}{in_units}" for name, of in split_inputs.items() if of % (size * unit))
        if vocab_size < size * size:  # the last rank would have no word
            found.append(f"a vocabulary of {vocab_size}")
        if group.expert_parallel and size > num_experts:
            found.append(f"{num_experts} experts")
        return found

    if why := reasons(group.tp_size):
        possible = [size for size in range(1, num_heads + 1) if not reasons(size)]
        raise UnsupportedModelError(
            f"tensor_parallel_size={group.tp_size} cannot divide {', '.join(why)}; this model can be divided among "
            f"{', '.join(map(str, possible))}" + (" ranks" if possible[-1] > 1 else ", that is, not at all")
        )
