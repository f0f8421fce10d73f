"""Runs steps: standing batch, device and sampler, in the order of the messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ...messages import errors
from ...messages.ids import BlockId, Epoch, RequestId, StepId
from ...messages.request import TokenLogprobs
from ...messages.sampling import SamplingParams
from ...messages.step import ExecuteStep, StartRequest, StepExecuted
from ...models.errors import ModelLoadError, ModelNotFoundError
from ...models.parallel import ParallelGroup
from .config import ExecutorConfig
from .device import Device
from .gpu.runner import GpuRunner
from .out_of_memory import is_out_of_memory
from .pending_tokens import PendingTokens
from .sampler import SampledTokens, Sampler
from .say_memory import say_memory
from .standing_batch import StandingBatch, StepArrays
from .token_logprobs import prompt_logprobs_of

PromptLogprobs = tuple[RequestId, int, tuple[TokenLogprobs, ...]]


def load_runner(config: ExecutorConfig, group: ParallelGroup | None = None) -> StepRunner | GpuRunner:
    """Load the model, or one rank's part, allocate the KV cache and warm up. Blocks.

    On a GPU steps are launched ahead, but for the stages of a pipeline, which hand activations on step by step; and its
    kernels are compiled on all cores while the model is loaded (`gpu.compile_ahead`).

    Raises:
        ModelNotFoundError: there is no such checkpoint.
        UnsupportedModelError: the checkpoint cannot be served; the message names what is missing.
        KVCacheTooSmallError: the asked-for context does not fit.
    """
    if config.device == "cpu" or not torch.cuda.is_available():
        return _load_runner(config, group)
    from .gpu.compile_ahead import CompileAhead  # triton need not be there without a GPU
    from .gpu.fake_cuda import GpuFacts

    begun: list[CompileAhead] = []

    def begin(where: torch.device, num_ranks: int) -> None:
        # The one that will be computed on: to ask another takes half a GiB of it, for as long as this process lives.
        rank, num_sharing = group.rank if group else 0, num_ranks * config.num_replicas
        begun.append(CompileAhead.begin(config, GpuFacts.of(where), rank=rank, num_sharing=num_sharing))

    def finish() -> None:
        for ahead in begun:
            ahead.finish()

    try:
        runner = _load_runner(config, group, on_placed=begin, on_loaded=finish)
    finally:
        for ahead in begun:
            ahead.cancel()
    for ahead in begun:
        ahead.note()
    return runner


def _load_runner(
    config: ExecutorConfig,
    group: ParallelGroup | None,
    *,
    on_placed: Callable[[torch.device, int], object] = lambda _where, _num_ranks: None,
    on_loaded: Callable[[], object] = lambda: None,
) -> StepRunner | GpuRunner:
    try:
        device = Device(config, group, on_placed=on_placed, on_loaded=on_loaded)
    except ModelNotFoundError as error:
        raise errors.ModelNotFoundError(str(error)) from error
    except ModelLoadError as error:
        raise errors.UnsupportedModelError(str(error)) from error
    say_memory(device)
    runner: StepRunner | GpuRunner
    fits_graphs = getattr(device.model, "fits_graphs", True)
    if device.model.device.type != "cpu" and device.group.pp_size == 1:
        runner = GpuRunner(
            device,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            pipeline_depth=config.pipeline_depth,
            block_size=config.block_size,
            graph_sizes=config.cuda_graph_sizes if fits_graphs else (),
            graph_tokens=config.cuda_graph_tokens if fits_graphs else (),
            check_ranks=config.check_ranks,
        )
        runner.warm_up()
        return runner
    runner = StepRunner(
        device,
        max_num_seqs=config.max_num_seqs,
        pipeline_depth=config.pipeline_depth,
        block_size=config.block_size,
        check_ranks=config.check_ranks,
    )
    runner.warm_up()
    return runner


class StepRunner:
    """Executes one `ExecuteStep` after the other; synchronous, for the executor's own thread.

    Of several ranks each does so with its part of the model. Only the last stage of a pipeline samples, each of its
    ranks by itself, as all have the same logits and the generator is keyed by seed and position. The others are told.

    Args:
        device: model and KV cache.
        max_num_seqs: requests in one step.
        pipeline_depth: steps in flight; requests that ended stand until the step that drops them.
        block_size: tokens in a KV block.
        check_ranks: compare what the ranks of a stage sample.
    """

    def __init__(
        self, device: Device, *, max_num_seqs: int, pipeline_depth: int, block_size: int, check_ranks: bool = False
    ) -> None:
        self.device = device
        self._group = device.group
        self._check_ranks = check_ranks
        self._batch = StandingBatch(
            max_num_rows=max_num_seqs * (pipeline_depth + 1),
            max_model_len=device.plan.max_model_len,
            block_size=block_size,
        )
        self._sampler = Sampler(device.model.vocab_size, device.model.device)
        self._wants_prompt_logprobs: dict[RequestId, tuple[int, int]] = {}
        self._pending = PendingTokens(self._group.receive_tokens, self._batch.append)

    def bind_threads(self) -> None:
        """See `Device.bind_threads`."""
        self.device.bind_threads()

    def drain(self) -> None:
        """Wait for what other ranks still have to say to this one, and let it go."""
        self._pending.drain()

    def reset(self) -> None:
        """Forget every request and the KV: a new epoch begins."""
        self.drain()
        self._batch.clear()
        self._sampler = Sampler(self.device.model.vocab_size, self.device.model.device)
        self._wants_prompt_logprobs.clear()
        self.device.reset()

    # What `Launcher` asks for: a launch is the whole step.

    max_launched = 1
    num_late = 0

    def launch(self, step: ExecuteStep) -> StepExecuted:
        """See `execute`."""
        return self.execute(step)

    def is_done(self, launched: StepExecuted) -> bool:
        return True

    def collect(self, launched: StepExecuted) -> StepExecuted:
        return launched

    def execute(self, step: ExecuteStep) -> StepExecuted:
        """Apply the step's changes, compute its rows in one forward pass, sample.

        On ranks before the last stage of a pipeline the result is empty.
        """
        started_ns = time.monotonic_ns()
        self._apply(step)
        if not step.request_ids:
            return StepExecuted(step.epoch, step.step_id, (), ())
        self._pending.settle(step.request_ids)
        arrays = self._batch.gather(step)
        hidden = self.device.forward(arrays)
        if not self._group.is_last_stage:
            self._pending.expect(arrays.sampling_requests)
            return StepExecuted(step.epoch, step.step_id, (), ())
        prompt_entries = self._prompt_logprobs(step, arrays, hidden)
        request_ids, sampled = self._sample(arrays, hidden)
        self._batch.append(request_ids, sampled.token_ids)
        return StepExecuted(
            step.epoch,
            step.step_id,
            request_ids,
            tuple(sampled.token_ids),
            stopped=tuple(sampled.stopped),
            logprobs=tuple(sampled.logprobs),
            prompt_logprobs=prompt_entries,
            failed=tuple(sampled.failed),
            execute_ns=time.monotonic_ns() - started_ns,
            nonfinite=tuple(sampled.nonfinite),
        )

    def warm_up(self) -> None:
        """Run one token through the model, so that the first request does not pay for first-use work."""
        probe = RequestId(-1)
        start = StartRequest(probe, b"\0\0\0\0", 1, 0, SamplingParams(temperature=0.0))
        blocks = ((probe, (BlockId(0),)),)
        self.execute(
            ExecuteStep(Epoch(0), StepId(-1), (probe,), (1,), start=(start,), block_tables=((),), append_blocks=blocks)
        )
        self.execute(ExecuteStep(Epoch(0), StepId(-1), (), (), drop=(probe,)))

    def _apply(self, step: ExecuteStep) -> None:
        for request_id in step.drop:
            if request_id in self._batch:
                self._sampler.remove(request_id)
                self._wants_prompt_logprobs.pop(request_id, None)
                self._pending.forget(request_id)
        self._batch.apply(step)
        if not self._group.is_last_stage:
            return
        for start in step.start:
            token_ids = self._batch.token_ids(start.request_id)
            self._add_to_sampler(start, token_ids)
            if start.params.prompt_logprobs is not None and len(token_ids) == start.num_prompt_tokens:
                self._wants_prompt_logprobs[start.request_id] = (start.params.prompt_logprobs, start.num_prompt_tokens)

    def _add_to_sampler(self, start: StartRequest, token_ids: Sequence[int]) -> None:
        """Have a request sampled; what cannot be is no fault of the others in its step."""
        try:
            self._sampler.add(start.request_id, start.params, token_ids, start.num_prompt_tokens, start.eos_token_ids)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._sampler.give_up(start.request_id, f"{type(error).__name__}: {error}")

    def _sample(self, arrays: StepArrays, hidden: torch.Tensor) -> tuple[tuple[RequestId, ...], SampledTokens]:
        """Sample the rows that are due; rows from which no token could be chosen are left out, as `failed`."""
        request_ids = arrays.sampling_requests
        if not request_ids:
            return (), SampledTokens([], [], [], [])
        is_every_token = len(request_ids) == len(arrays.input_ids)
        logits = self.device.logits(hidden, None if is_every_token else torch.from_numpy(arrays.sampling_tokens))
        sampled = self._sampler.sample(logits, request_ids)
        self._group.send_tokens(sampled.token_ids)
        if self._check_ranks:
            self._group.check_same(sampled.token_ids, "the tokens that were sampled")
        if not sampled.failed:
            return request_ids, sampled
        failed = dict(sampled.failed)
        good = [index for index, request_id in enumerate(request_ids) if request_id not in failed]
        token_ids = [sampled.token_ids[index] for index in good]
        return tuple(request_ids[index] for index in good), replace(sampled, token_ids=token_ids)

    def _prompt_logprobs(
        self, step: ExecuteStep, arrays: StepArrays, hidden: torch.Tensor
    ) -> tuple[PromptLogprobs, ...]:
        """Log-probabilities of the prompt tokens that follow this step's prompt positions."""
        if not self._wants_prompt_logprobs:
            return ()
        entries: list[PromptLogprobs] = []
        for index, request_id in enumerate(step.request_ids):
            wanted = self._wants_prompt_logprobs.get(request_id)
            if wanted is None:
                continue
            num_top, num_prompt_tokens = wanted
            begin, end = int(arrays.query_start[index]), int(arrays.query_start[index + 1])
            first = int(arrays.positions[begin])
            count = min(end - begin, num_prompt_tokens - 1 - first)
            if count > 0:
                targets = self._batch.token_ids(request_id)[first + 1 : first + 1 + count]
                found = prompt_logprobs_of(hidden[begin : begin + count], self.device.logits, targets, num_top)
                entries.append((request_id, first + 1, found))
        return tuple(entries)
