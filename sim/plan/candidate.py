"""What may be chosen: one way to set a replica and its router, and sweeps over many."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import msgspec

from ...messages.errors import InvalidConfigError
from ..config import RoutingPolicy

MAX_CANDIDATES = 10_000


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One configuration of a replica; how many of them is what the planner finds.

    Attributes:
        gpu: its name.
        tensor_parallel_size: GPUs of a replica.
        max_num_batched_tokens, max_num_seqs, block_size, enable_prefix_caching: the engine's.
        memory_utilization: part of the GPU's memory that the engine takes.
        num_blocks: KV blocks exactly; None: what the memory holds.
        routing: the router's policy.
    """

    gpu: str
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    block_size: int = 16
    enable_prefix_caching: bool = True
    memory_utilization: float = 0.9
    num_blocks: int | None = None
    routing: RoutingPolicy = "least_loaded"


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """Values to try for each field of a candidate; their product is tried, the first field slowest.

    Raises:
        InvalidConfigError: an empty list, or more candidates than anyone waits for.
    """

    gpu: tuple[str, ...]
    tensor_parallel_size: tuple[int, ...] = (1,)
    max_num_batched_tokens: tuple[int, ...] = (2048,)
    max_num_seqs: tuple[int, ...] = (256,)
    block_size: tuple[int, ...] = (16,)
    enable_prefix_caching: tuple[bool, ...] = (True,)
    memory_utilization: tuple[float, ...] = (0.9,)
    num_blocks: tuple[int | None, ...] = (None,)
    routing: tuple[RoutingPolicy, ...] = ("least_loaded",)

    def __post_init__(self) -> None:
        count = 1
        for name in self.__struct_fields__:
            count *= len(getattr(self, name))
            if not getattr(self, name):
                raise InvalidConfigError(f"the sweep has no value for {name}: give at least one", field=name)
        if count > MAX_CANDIDATES:
            raise InvalidConfigError(
                f"the sweep has {count} configurations, more than {MAX_CANDIDATES}: give fewer values for some of "
                f"{', '.join(self.varied())}"
            )

    def candidates(self) -> Iterator[Candidate]:
        """All of them, each once, in an order that depends on the sweep alone."""
        seen: dict[Candidate, None] = {}
        names = self.__struct_fields__
        for values in product(*(getattr(self, name) for name in names)):
            candidate = Candidate(**dict(zip(names, values, strict=True)))
            if candidate not in seen:
                seen[candidate] = None
                yield candidate

    def varied(self) -> tuple[str, ...]:
        """Names of the fields that have more than one value."""
        return tuple(name for name in self.__struct_fields__ if len(dict.fromkeys(getattr(self, name))) > 1)
