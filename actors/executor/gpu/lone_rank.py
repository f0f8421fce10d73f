"""A rank whose peers are not there, for a GPU that computes nothing: of what they would say only the shape counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....models.parallel import ParallelConfig, ParallelGroup
from ..config import ExecutorConfig


def lone_rank(config: ExecutorConfig, rank: int) -> LoneRank | None:
    """A rank of those that a configuration asks for; None where it is the only one."""
    if config.tensor_parallel_size * config.pipeline_parallel_size == 1:
        return None
    return LoneRank(
        ParallelConfig(
            tensor_parallel_size=config.tensor_parallel_size,
            pipeline_parallel_size=config.pipeline_parallel_size,
            expert_parallel=config.expert_parallel,
            rank=rank,
            init_method="nobody",
        )
    )


class LoneRank(ParallelGroup):
    """Holds the share of a model that the rank holds, and waits for nobody.

    What it gets from others is memory without contents, in the shape and dtype of theirs, and numbers like its own.
    """

    def _join(self, config: ParallelConfig) -> None:
        pass

    def leave(self) -> None:
        """There is no group to be left."""

    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous()

    def _all_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x.new_empty((self.tp_size, *x.shape)).unbind()

    def check_same(self, values: Sequence[int], what: str) -> None:
        """Nobody is of another mind."""

    def receive_activations(
        self, num_tokens: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """See `ParallelGroup.receive_activations`."""
        return torch.empty((num_tokens, hidden_size), dtype=dtype, device=device)

    def receive_tokens(self, count: int) -> list[int]:
        """See `ParallelGroup.receive_tokens`."""
        return [0] * count

    def _send(self, x: torch.Tensor, rank: int) -> None:
        pass

    def place_on_host(self) -> tuple[int, int]:
        """It has its process, and the GPU that is none, to itself."""
        return 0, 1

    def _of_all(self, value: int) -> list[int]:
        return [value] * self.world_size
