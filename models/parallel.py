"""The ranks that serve one model together: tensor parallel, pipeline parallel and both, through torch.distributed.

Rank `r` of `tp * pp` is member `r % tp` of the tensor-parallel group that is stage `r // tp` of the pipeline. Members
of a group hold shares of the same layers and add their parts up; stages hold different layers and hand activations on.

Sources: Shoeybi et al. 2019 (Megatron-LM) for what each member holds, Narayanan et al. 2021 for both together.
"""

from __future__ import annotations

import os
import platform
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import psutil
import torch

from .errors import UnsupportedModelError

_MAX_SENDS = 16  # messages under way whose memory is kept: a stage is never further ahead than steps are in flight
_PARTING_S = 5.0

P = ParamSpec("P")
R = TypeVar("R")


class PeerLostError(RuntimeError):
    """Another rank of the group has died or been silent for too long: the group has to be started anew as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """One rank's place in a group.

    Attributes:
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: stages that share the layers.
        expert_parallel: of a mixture of experts, the ranks of a stage hold whole experts, not a share of each.
        rank: this process, `0 <= rank < tensor_parallel_size * pipeline_parallel_size`.
        init_method: where the ranks meet: `file:///path` (a file not there yet) or `tcp://host:port` of rank 0.
        timeout_s: a rank that keeps others waiting for so long counts as lost; more than loading takes, or a step.

    Raises:
        UnsupportedModelError: sizes or rank that make no sense.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    expert_parallel: bool = False
    rank: int = 0
    init_method: str = ""
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise UnsupportedModelError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise UnsupportedModelError(f"rank={self.rank} is not one of the group's {self.world_size} ranks")
        if self.world_size > 1 and not self.init_method:
            raise UnsupportedModelError("several ranks need an init_method: file:///path or tcp://host:port")
        if self.expert_parallel and self.tensor_parallel_size == 1:
            raise UnsupportedModelError(
                "expert_parallel divides the experts among the ranks of tensor_parallel_size, which is 1: raise it, or "
                "leave expert_parallel out"
            )

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


def _reports_loss(
    method: Callable[Concatenate[ParallelGroup, P], R],
) -> Callable[Concatenate[ParallelGroup, P], R]:
    """What torch.distributed raises, in words that say what happened."""

    @wraps(method)
    def reporting(self: ParallelGroup, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except RuntimeError as error:
            raise PeerLostError(
                f"rank {self.rank} of {self.world_size} waited for another that is gone, silent for {self.timeout_s:g} "
                f"s, or of another mind: {error}"
            ) from error

    return reporting


class ParallelGroup:
    """This process among the ranks; alone, everything passes through untouched and torch.distributed is not loaded.

    One a process. Every rank makes the same calls in the same order.

    Args:
        config: which rank this is, of how many.

    Raises:
        PeerLostError: the others did not come within the timeout.
    """

    def __init__(self, config: ParallelConfig) -> None:
        self.rank = config.rank
        self.world_size = config.world_size
        self.tp_size = config.tensor_parallel_size
        self.pp_size = config.pipeline_parallel_size
        self.pp_rank, self.tp_rank = divmod(config.rank, self.tp_size)
        self.expert_parallel = config.expert_parallel
        self.timeout_s = config.timeout_s
        self.is_first_stage = self.pp_rank == 0
        self.is_last_stage = self.pp_rank == self.pp_size - 1
        self.speaks = self.is_last_stage and self.tp_rank == 0
        # Sum in the order of the ranks, so that no element's last bit depends on where in the tensor it stands.
        self.sums_in_order = False
        self._sends: deque[tuple[torch.distributed.Work, torch.Tensor]] = deque()
        self._tp: torch.distributed.ProcessGroup | None = None
        if self.world_size > 1:
            self._join(config)

    @_reports_loss
    def _join(self, config: ParallelConfig) -> None:
        import torch.distributed as dist

        if config.init_method.startswith("file:") or "://127." in config.init_method:
            # One host: what the ranks say to each other needs no other interface, and nobody else should hear it.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        timeout = timedelta(seconds=config.timeout_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            init_method=config.init_method,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )
        for stage in range(self.pp_size):
            members = list(range(stage * self.tp_size, (stage + 1) * self.tp_size))
            group = dist.new_group(members, timeout=timeout) if self.tp_size > 1 else None  # every rank makes all
            if stage == self.pp_rank:
                self._tp = group

    def leave(self) -> None:
        """Close the connections, once what was sent has arrived; the group is of no more use."""
        if self.world_size > 1:
            try:
                while self._sends:
                    self._sends.popleft()[0].wait(timedelta(seconds=_PARTING_S))
            except RuntimeError:  # whoever is gone already needs it no more
                self._sends.clear()
            torch.distributed.destroy_process_group()

    # Within a stage.

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every member's `x`, the same bits for each; may be in place of `x`."""
        return x if self.tp_size == 1 else self._all_reduce(x)

    @_reports_loss
    def _all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self.sums_in_order and self.tp_size > 2:  # of two, either order gives the same bits
            total, *others = self._all_gather(x)
            for other in others:
                total.add_(other)
            return total
        x = x.contiguous()
        torch.distributed.all_reduce(x, group=self._tp)
        return x

    def all_gather_columns(self, x: torch.Tensor) -> torch.Tensor:
        """Every member's `[n, width]` side by side, `[n, width * tp_size]`."""
        return x if self.tp_size == 1 else torch.cat(self._gather_columns(x), dim=-1)

    @_reports_loss
    def _gather_columns(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._all_gather(x)

    def _all_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = x.new_empty((self.tp_size, *x.shape)).unbind()
        torch.distributed.all_gather(list(parts), x.contiguous(), group=self._tp)
        return parts

    @_reports_loss
    def check_same(self, values: Sequence[int], what: str) -> None:
        """Compare a checksum of `values` among the members of the stage.

        Raises:
            PeerLostError: they differ.
        """
        if self.tp_size > 1:
            checksum = torch.tensor([zlib.crc32(repr(tuple(values)).encode())], dtype=torch.int64)
            if len({int(part) for part in self._all_gather(checksum)}) > 1:
                raise RuntimeError(f"{what} differ among the {self.tp_size} ranks that share a layer")

    # Between stages.

    @_reports_loss
    def send_activations(self, x: torch.Tensor) -> None:
        """Hand `x` to the next stage, without waiting; nobody may change it any more."""
        self._send(x.contiguous(), self.rank + self.tp_size)

    @_reports_loss
    def receive_activations(
        self, num_tokens: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """`[num_tokens, hidden_size]` from the stage before."""
        x = torch.empty((num_tokens, hidden_size), dtype=dtype, device=device)
        torch.distributed.recv(x, self.rank - self.tp_size)
        return x

    @_reports_loss
    def send_tokens(self, token_ids: Sequence[int]) -> None:
        """Tell every earlier stage what the last has sampled, without waiting."""
        if self.pp_size > 1 and token_ids:
            message = torch.tensor(token_ids, dtype=torch.int64)
            for stage in range(self.pp_size - 1):
                self._send(message, stage * self.tp_size + self.tp_rank)

    @_reports_loss
    def receive_tokens(self, count: int) -> list[int]:
        """What the last stage sampled next, `count` >= 1 tokens."""
        message = torch.empty(count, dtype=torch.int64)
        torch.distributed.recv(message, (self.pp_size - 1) * self.tp_size + self.tp_rank)
        return message.tolist()

    def _send(self, x: torch.Tensor, rank: int) -> None:
        work = torch.distributed.isend(x, rank)
        assert work is not None
        self._sends.append((work, x))
        while len(self._sends) > _MAX_SENDS:
            self._sends.popleft()[0].wait()

    # Among all.

    @_reports_loss
    def minimum(self, value: int) -> int:
        """The smallest of every rank's `value`."""
        return value if self.world_size == 1 else min(self._of_all(value))

    def num_ranks_on_host(self) -> int:
        """How many of the ranks share this host, and with it its memory. Waits until every rank has asked."""
        return self.place_on_host()[1]

    @_reports_loss
    def place_on_host(self) -> tuple[int, int]:
        """Which of the ranks on this host this one is, and how many they are. Waits until every rank has asked."""
        if self.world_size == 1:
            return 0, 1
        here = zlib.crc32(platform.node().encode())
        hosts = self._of_all(here)
        return hosts[: self.rank].count(here), hosts.count(here)

    @_reports_loss
    def agree_on(self, what: str, value: str) -> None:
        """Raises `PeerLostError` where the ranks have not the same `value`."""
        if self.world_size > 1 and len(set(self._of_all(zlib.crc32(value.encode())))) > 1:
            raise RuntimeError(f"the ranks do not agree on {what}: here it is {value}. Start them all with the same")

    def _of_all(self, value: int) -> list[int]:
        values = torch.zeros(self.world_size, dtype=torch.int64)
        values[self.rank] = value
        torch.distributed.all_reduce(values)
        return values.tolist()


def alone() -> ParallelGroup:
    """The group of a process that serves its model by itself."""
    return ParallelGroup(ParallelConfig())


def _loopback() -> str:
    """The name of this host's interface to itself."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == "127.0.0.1" for address in addresses):
            return str(name)
    return "lo"
