"""Runs steps ahead: launches one before the tokens of the last are read."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch

from ....kernels.step_layout import StepLayout
from ....messages.ids import RequestId
from ....messages.request import TokenLogprobs
from ....messages.step import ExecuteStep, StepExecuted
from ..device import Device
from ..memory_profile import logits_rows
from ..sampler import Sampler
from ..token_logprobs import prompt_logprobs_of
from .device_batch import DeviceBatch
from .forward_pass import ForwardPass
from .graphs import Graphs
from .launched import Launched, Staging
from .logit_edits import NO_EDITS, asks_for_edits, edits_of
from .mixed_sizes import MixedSize, MixedSizes
from .packed_step import PackedStep, Standing
from .sampling_plan import SamplingPlan, plan_sampling
from .step_diff import StepDiff
from .stream import Stream, stream_of
from .warm_up import warm_up_steps


class GpuRunner:
    """Launches steps on the device and collects what came of them, in the same order; for the executor's own thread.

    Bias, penalties and `min_tokens` are the device's to apply (`logit_edits`). Requests with masks (allowed tokens, bad
    words of several tokens), with more bias than there is room for, or that ask for what the device does not report are
    sampled by the `Sampler`. A step with such a request is complete when `launch` returns.

    Args:
        device: model and KV cache.
        max_num_seqs: requests in one step.
        max_num_batched_tokens: tokens in one step; warm-up goes as far.
        pipeline_depth: steps in flight; requests that ended stand until the step that drops them.
        block_size: tokens in a KV block.
        graph_sizes: rows of decode steps to capture, see `Graphs`.
        graph_tokens: tokens of prompts' chunks in one step to capture beside decodes, see `MixedSizes`.
        check_ranks: compare what the ranks that share the model sample.
        stream: where the device's work goes; None: where the model is.
        forward: what launches it, for measurements; None: what the device computes with.
    """

    def __init__(
        self,
        device: Device,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        pipeline_depth: int,
        block_size: int,
        graph_sizes: Sequence[int] = (),
        graph_tokens: Sequence[int] = (),
        check_ranks: bool = False,
        stream: Stream | None = None,
        forward: ForwardPass | None = None,
    ) -> None:
        self.device = device
        self.max_launched = pipeline_depth
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._check_ranks = check_ranks
        where = device.model.device
        self._stream = stream or stream_of(where)
        max_rows, mixed_sizes = max((max_num_seqs, *graph_sizes)), MixedSizes(max_num_seqs, graph_tokens)
        self._layout = StepLayout(max(max_rows, mixed_sizes.most_rows), device.plan.max_model_len, block_size)
        num_state_rows = max_num_seqs * (pipeline_depth + 1)
        self._batch = DeviceBatch(self._layout, num_state_rows, mixed_sizes)
        self._forward = forward or ForwardPass(
            device, self._layout, num_state_rows, max_rows=max_rows, most_padded_tokens=mixed_sizes.most_tokens
        )
        self._graphs = Graphs(
            *(self._forward.decode, graph_sizes, where),
            mixed=self._forward.mixed,
            mixed_sizes=mixed_sizes,
            must_fit=device.group.world_size > 1,
        )
        self._is_warming_up = False
        self._sampler = Sampler(device.model.vocab_size, where)
        self._plan: SamplingPlan | None = None
        self._wants_prompt_logprobs: dict[RequestId, tuple[int, list[int]]] = {}
        self._pins = where.type == "cuda"
        self._staging = [Staging.empty(self._layout, pin=self._pins) for _ in range(pipeline_depth + 1)]
        self._launched: deque[Launched] = deque()
        self._last_done_ns = 0
        self._num_made_ready = 0

    @property
    def num_captured(self) -> int:
        """Graphs captured so far."""
        return self._graphs.num_captured

    @property
    def num_compiled(self) -> int:
        """Kernels that this process has compiled so far, or taken from a cache of compiled ones; 0 on a CPU."""
        if self.device.model.device.type != "cuda":
            return 0
        from ....kernels.gpu.launch import compilations

        return compilations()

    @property
    def num_late(self) -> int:
        """Kernels compiled and graphs captured since `warm_up`: each of them has kept every stream waiting."""
        return self.num_compiled + self.num_captured - self._num_made_ready

    def watch_graphs(self, wrap: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """See `Graphs.watch`; after `warm_up`."""
        self._graphs.watch(wrap)

    def bind_threads(self) -> None:
        """See `Device.bind_threads`; and what libraries hold for each thread that launches, they take now."""
        self.device.bind_threads()
        if self._pins:
            self._stream.submit(self._begin_libraries).wait()

    def drain(self) -> None:
        """Wait for what was launched, and let it go."""
        while self._launched:
            self._settle(self._launched.popleft())

    def reset(self) -> None:
        """Forget every request and the KV: a new epoch begins."""
        self.drain()
        self._batch.clear()
        self._sampler = Sampler(self.device.model.vocab_size, self.device.model.device)
        self._plan = None
        self._wants_prompt_logprobs.clear()
        self._stream.submit(self.device.reset).wait()

    def execute(self, step: ExecuteStep) -> StepExecuted:
        """Launch and collect; nothing else may be in flight."""
        return self.collect(self.launch(step))

    def launch(self, step: ExecuteStep) -> Launched:
        """Enqueue all of a step: its changes, one forward pass, the sampling, the tokens' way back."""
        launched_ns = time.monotonic_ns()
        diff = self._apply(step)
        staging = self._take_staging()
        wants = self._wants_prompt_logprobs
        is_reported = bool(wants) and not wants.keys().isdisjoint(step.request_ids)
        pads = not (is_reported or self._is_warming_up)
        try:
            if diff.packed_words <= len(staging.words_array):
                words = staging.words
                packed = self._batch.pack(step, diff, staging.words_array, pads=pads)
            else:
                words = torch.empty(diff.packed_words, dtype=torch.int32, pin_memory=self._pins)
                packed = self._batch.pack(step, diff, words.numpy(), pads=pads)
            plan = self._plan_of(step, packed.sampled)
        except BaseException:
            self._staging.append(staging)
            raise
        launched = Launched(step, packed, plan, staging=staging, words=words, launched_ns=launched_ns)
        self._launched.append(launched)
        if plan.on_device and not is_reported:
            launched.completion = self._stream.submit(partial(self._run, launched))
        else:
            launched.completion = self._stream.submit(partial(self._run_with_sampler, launched))
            launched.completion.wait()  # the sampler's state is the host's: the next step's changes come after this
        return launched

    def is_done(self, launched: Launched) -> bool:
        """Whether `collect` would return at once."""
        return launched.is_done()

    def collect(self, launched: Launched) -> StepExecuted:
        """Wait for the oldest step that was not collected, and report it."""
        assert launched is self._launched[0], "steps are collected in the order of their launch"
        self._settle(launched)
        self._launched.popleft()
        tokens = launched.read()
        for standing, _ in tokens.failed:
            self._batch.fail(standing)
            for later in self._launched:
                later.any_failed = True
        if self._check_ranks:
            self.device.group.check_same(tokens.token_ids, "the tokens that were sampled")
        now_ns = time.monotonic_ns()
        started_ns, self._last_done_ns = max(launched.launched_ns, self._last_done_ns), now_ns
        return launched.executed(tokens, now_ns - started_ns if launched.step.request_ids else 0)

    def warm_up(self) -> None:
        """Compile every kernel and capture every graph, so that no step has to, and the first is like any other."""
        self._is_warming_up = True  # whatever a graph computes later is launched here, as what does not fit one will be
        for step in warm_up_steps(
            max_num_seqs=self._max_num_seqs,
            max_num_batched_tokens=self._max_num_batched_tokens,
            max_model_len=self._layout.max_model_len,
            block_size=self._layout.block_size,
            num_blocks=self.device.plan.num_blocks,
        ):
            self.execute(step)  # the last is without rows, as `capture` wants it
        self._is_warming_up = False
        self._stream.submit(torch.inference_mode()(self._graphs.capture)).wait()
        self._num_made_ready = self.num_compiled + self.num_captured

    # ---- before a step ----

    def _apply(self, step: ExecuteStep) -> StepDiff:
        """Take in what the step changes; returns what the device has to hear of it."""
        diff = StepDiff(self._layout)
        for request_id in step.drop:
            if request_id in self._batch:
                self._batch.drop(request_id)
                self._sampler.remove(request_id)
                self._wants_prompt_logprobs.pop(request_id, None)
        for start, block_table in zip(step.start, step.block_tables, strict=True):
            token_ids = memoryview(start.token_ids).cast("i")
            request_id, params, num_prompt_tokens = start.request_id, start.params, start.num_prompt_tokens
            asks = asks_for_edits(params)
            edits = edits_of(start, self.device.model.vocab_size) if asks else NO_EDITS
            self._sampler.add(
                *(request_id, params, token_ids, num_prompt_tokens, start.eos_token_ids),
                is_edited=asks and edits is not None,
            )
            standing = self._batch.start(start, len(block_table), self._sampler.state_of(request_id))
            standing.is_edited = edits is not None and edits is not NO_EDITS
            diff.write_start(standing.row, start, block_table, standing.sampling.seed, edits or NO_EDITS)
            if params.prompt_logprobs is not None and len(token_ids) == num_prompt_tokens:
                self._wants_prompt_logprobs[request_id] = (params.prompt_logprobs, token_ids.tolist())
        if step.append_blocks:
            diff.write_blocks(self._batch.append_blocks(step))
        return diff

    def _take_staging(self) -> Staging:
        """Memory that no step in flight uses, waiting for the oldest of them if need be."""
        for launched in self._launched:
            if self._staging:
                break
            self._settle(launched)
        return self._staging.pop()

    def _settle(self, launched: Launched) -> None:
        staging = launched.settle()
        if staging is not None:
            self._staging.append(staging)

    def _plan_of(self, step: ExecuteStep, sampled: Sequence[Standing]) -> SamplingPlan:
        """How these are sampled: decided anew when they change, and while the sampler's masks may."""
        if self._plan is None or not self._plan.on_device or self._plan.standing != sampled:
            is_all = len(sampled) == len(step.request_ids)
            self._plan = plan_sampling(
                sampled,
                step.request_ids if is_all else tuple([each.request_id for each in sampled]),
                self.device.model.vocab_size,
                any_stop=self._batch.any_stop,
                has_special=self._batch.has_special,
            )
        return self._plan

    # ---- on the device, for the stream ----

    @torch.inference_mode()
    def _begin_libraries(self) -> None:
        """A product by cuBLAS: a thread's first takes milliseconds, and a workspace for as long as the thread lives."""
        model = self.device.model
        some = torch.ones((64, 64), dtype=model.dtype, device=model.device)
        torch.mm(some, some)

    @torch.inference_mode()
    def _run(self, launched: Launched) -> None:
        """A step without a word from the host."""
        forward, packed, plan = self._forward, launched.packed, launched.plan
        size = self._size_for(packed)
        forward.load(launched.words, packed, has_size=size is not None)
        if not packed.num_rows:
            return
        num_samples = len(packed.sampled)
        logits: torch.Tensor | None = None
        if size is not None:
            self._graphs.run(size)
            if not num_samples:
                return
        else:
            hidden = forward.compute(packed)
            if not num_samples:
                return
            logits = forward.sampling_logits(packed, hidden)
            forward.sample(logits)
            if plan.reports_edited:
                logits = forward.sampling_logits(packed, hidden)  # once more, as the model computed them
        words = forward.sampled(num_samples)
        if plan.num_top is not None:
            if logits is None:
                logits = forward.logits_again(num_samples)
            words = forward.with_logprobs(words, logits, plan.num_top)
        launched.results[: len(words)].copy_(words, non_blocking=True)

    @torch.inference_mode()
    def _run_with_sampler(self, launched: Launched) -> None:
        """A step whose tokens the `Sampler` chooses, or that reports on its prompts."""
        forward, packed, plan = self._forward, launched.packed, launched.plan
        size = self._size_for(packed)
        forward.load(launched.words, packed, has_size=size is not None)
        if size is not None:
            self._graphs.run(size)  # samples as well, and what it has appended is written over
            logits = forward.logits_again(len(packed.sampled))
        else:
            hidden = forward.compute(packed)
            launched.prompt_logprobs = self._prompt_logprobs(launched, hidden)
            logits = forward.sampling_logits(packed, hidden)
        counts = self._batch.num_output_tokens(packed.sampled)
        for standing, num_output_tokens in zip(packed.sampled, counts, strict=True):
            standing.sampling.num_output_tokens = num_output_tokens - 1
        raw = logits
        if any(standing.is_edited for standing in packed.sampled):
            logits = forward.edit(raw.clone())
        sampled = self._sampler.sample(logits, plan.request_ids, raw=raw)
        forward.append(torch.tensor(sampled.token_ids, dtype=torch.int64))
        launched.sampled = sampled

    def _size_for(self, packed: PackedStep) -> int | MixedSize | None:
        """What is computed in place of the step, padding included; None: it is launched as it comes."""
        if packed.is_decode:
            return self._graphs.size_for(packed.num_rows)
        return packed.padded_to

    def _prompt_logprobs(
        self, launched: Launched, hidden: torch.Tensor
    ) -> tuple[tuple[RequestId, int, tuple[TokenLogprobs, ...]], ...]:
        """Log-probabilities of the prompt tokens that follow this step's prompt positions; none in a decode step."""
        entries: list[tuple[RequestId, int, tuple[TokenLogprobs, ...]]] = []
        words, layout = launched.words, self._layout
        for index, request_id in enumerate(launched.step.request_ids):
            wanted = self._wants_prompt_logprobs.get(request_id)
            if wanted is None:
                continue
            num_top, prompt = wanted
            first = int(words[layout.starts + index])
            begin, end = words[layout.query_start + index : layout.query_start + index + 2].tolist()
            count = min(end - begin, len(prompt) - 1 - first)
            if count > 0:
                targets = prompt[first + 1 : first + 1 + count]
                found = prompt_logprobs_of(
                    *(hidden[begin : begin + count], self.device.logits, targets, num_top),
                    max_rows=logits_rows(self._max_num_seqs) // 2,  # they are there in the model's dtype, too
                )
                entries.append((request_id, first + 1, found))
            if first + count + 1 >= len(prompt):
                del self._wants_prompt_logprobs[request_id]
        return tuple(entries)
