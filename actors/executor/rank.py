"""One rank of an executor that is several processes; blocking, and independent of what carries its messages."""

from __future__ import annotations

from typing import Any

import msgspec

from ...messages.errors import UnsupportedModelError
from ...messages.ids import Epoch
from ...messages.step import ExecuteStep, StepExecuted
from ...models.errors import UnsupportedModelError as ModelUnsupported
from ...models.parallel import ParallelConfig, ParallelGroup
from .config import ExecutorConfig
from .gpu.runner import GpuRunner
from .launch_ahead import LaunchAhead
from .runner import StepRunner, load_runner


class ExecutorFacts(msgspec.Struct, frozen=True):
    """What a loaded executor offers; the same from every rank but where it says so.

    Attributes:
        num_blocks: of KV, on each rank.
        kv_cache_bytes: on this rank.
        load_seconds: of this rank's weights.
        is_deterministic: a row's logits are the same bits alone and in any batch.
        speaks: this rank answers steps.
    """

    vocab_size: int
    max_model_len: int
    num_blocks: int
    kv_cache_bytes: int
    dtype: str
    load_seconds: float
    is_deterministic: bool
    speaks: bool


class RankExecutor:
    """Executes what every rank hears, each its part; also the only rank there is.

    Every rank must be given the same epochs and steps in the same order. An exception from any method but the
    constructor means that the group is lost: end the process, and the others with it.

    Args:
        config: the same for every rank.
        rank: `0 <= rank < config.tensor_parallel_size * config.pipeline_parallel_size`.

    Raises:
        UnsupportedModelError: sizes or rank that make no sense.
    """

    def __init__(self, config: ExecutorConfig, rank: int) -> None:
        try:
            self._parallel = ParallelConfig(
                tensor_parallel_size=config.tensor_parallel_size,
                pipeline_parallel_size=config.pipeline_parallel_size,
                expert_parallel=config.expert_parallel,
                rank=rank,
                init_method=config.init_method,
                timeout_s=config.collective_timeout_s,
            )
        except ModelUnsupported as error:
            raise UnsupportedModelError(str(error)) from error
        self._config = config
        self._group: ParallelGroup | None = None
        self._runner: StepRunner | GpuRunner | None = None
        self._ahead: LaunchAhead[Any] | None = None
        self._epoch = Epoch(0)

    def load(self) -> ExecutorFacts:
        """Meet the other ranks, load this one's part of the model, size the KV cache for all, warm up. Blocks.

        Raises:
            UnsupportedModelError: the checkpoint cannot be served, or not divided so; the message says what can be.
            KVCacheTooSmallError: the asked-for context does not fit.
            PeerLostError: another rank did not come, or went.
        """
        group = ParallelGroup(self._parallel)
        try:
            self._runner = load_runner(self._config, group)
        except BaseException:
            group.leave()
            raise
        self._group = group
        self._ahead = LaunchAhead(self._runner)
        self._runner.bind_threads()  # steps run on the thread that loads
        device = self._runner.device
        return ExecutorFacts(
            vocab_size=device.model.vocab_size,
            max_model_len=device.plan.max_model_len,
            num_blocks=device.plan.num_blocks,
            kv_cache_bytes=device.kv_cache_bytes,
            dtype=str(device.model.dtype).removeprefix("torch."),
            load_seconds=device.load_seconds,
            is_deterministic=device.is_deterministic,
            speaks=self._group.speaks,
        )

    def begin_epoch(self, epoch: Epoch) -> None:
        """Begin (again) as `epoch`, with an empty batch and an empty cache."""
        assert self._runner is not None, "load() comes first"
        if epoch != self._epoch:
            self.launched.clear()
            self._runner.reset()
        self._epoch = epoch

    def execute(self, step: ExecuteStep) -> StepExecuted | None:
        """Compute this rank's part of a step; None on ranks that do not speak, and for a step of another epoch."""
        return self.collect() if self.launch(step) else None

    @property
    def launched(self) -> LaunchAhead[Any]:
        """What is in flight."""
        assert self._ahead is not None, "load() comes first"
        return self._ahead

    @property
    def num_late(self) -> int:
        """See `GpuRunner.num_late`."""
        return 0 if self._runner is None else self._runner.num_late

    def launch(self, step: ExecuteStep) -> bool:
        """Begin this rank's part of a step; False for a step of another epoch, which is let go."""
        if step.epoch != self._epoch:
            return False
        self.launched.launch(step)
        return True

    def collect(self) -> StepExecuted | None:
        """What came of the oldest step in flight; None on ranks that do not speak. May wait for it."""
        assert self._group is not None, "load() comes first"
        executed = self.launched.collect()
        return executed if self._group.speaks else None

    def close(self) -> None:
        """Leave the group and let the model go. Only after every rank has executed the same steps."""
        if self._runner is not None:
            self._runner.drain()
        self._runner = self._ahead = None
        if self._group is not None:
            self._group.leave()
            self._group = None
