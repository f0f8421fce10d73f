"""The ring: a step is planned, stamped with blocks, executed, and its tokens come back.

One lap a step: scheduler -`PlanStep`-> KV allocator -`ExecuteStep`-> executor -`StepExecuted`-> scheduler, which
passes the results that it accepts on to the detokenizer. Messages carry what changes, so their size does not grow with
context length.
"""

from __future__ import annotations

from .base import Message
from .ids import BlockId, Epoch, RequestId, StepId
from .request import TokenLogprobs
from .sampling import SamplingParams


class StartRequest(Message, frozen=True):
    """A request that joins the executor's standing batch, new or taken up again after preemption.

    Attributes:
        token_ids: int32, little endian: prompt, then outputs so far.
        num_prompt_tokens: how many of them are the prompt's.
        num_computed_tokens: leading tokens whose KV already lies in the cache.
        eos_token_ids: end tokens; with `params.stop_token_ids` they end the request once sampled.
    """

    request_id: RequestId
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()


class PlanStep(Message, frozen=True):
    """Scheduler -> KV allocator: one step, in counts.

    Applied in this order: `release`, `start`, `grow`. Every scheduled row computes `num_tokens[i]` tokens of
    `request_ids[i]`; a row whose last known token is computed samples the next one.

    Attributes:
        release: requests that give up their blocks, each with the int32 token ids whose KV is known to be computed, so
            that full blocks stay findable; empty bytes: forget the KV.
            A plan may hold releases and no rows: it goes round like any other, and an empty `StepExecuted` answers it.
        start: requests that join; what `MatchPrefix` pinned for them becomes the head of their block table.
        grow: `(request_id, num_blocks)`, blocks to append before this step.
        computed_prompt_tokens: `(request_id, n)`: after this step the first n tokens of the request's
            `StartRequest.token_ids` are in the cache, so its full blocks may be shared from the next step on; only rows
            that compute some of those.
    """

    epoch: Epoch
    step_id: StepId
    request_ids: tuple[RequestId, ...]
    num_tokens: tuple[int, ...]
    start: tuple[StartRequest, ...] = ()
    grow: tuple[tuple[RequestId, int], ...] = ()
    release: tuple[tuple[RequestId, bytes], ...] = ()
    computed_prompt_tokens: tuple[tuple[RequestId, int], ...] = ()


class ExecuteStep(Message, frozen=True):
    """KV allocator -> executor: the same step with block identities.

    Applied in this order: `drop`, `start`, `append_blocks`; then the rows are computed in one forward pass, whose KV
    writes come before its KV reads.

    Attributes:
        block_tables: for each of `start`, the block table's head (cached blocks), in the same order.
        append_blocks: `(request_id, block_ids)`, appended to the request's block table.
        drop: requests that leave the standing batch.
    """

    epoch: Epoch
    step_id: StepId
    request_ids: tuple[RequestId, ...]
    num_tokens: tuple[int, ...]
    start: tuple[StartRequest, ...] = ()
    block_tables: tuple[tuple[BlockId, ...], ...] = ()
    append_blocks: tuple[tuple[RequestId, tuple[BlockId, ...]], ...] = ()
    drop: tuple[RequestId, ...] = ()


class StepExecuted(Message, frozen=True):
    """Executor -> scheduler: the tokens of one step; scheduler -> detokenizer: the very same, once it is accepted.

    Where there are several detokenizers, each hears of its own rows alone, and nothing of a step that has none of them.

    Results of another epoch or step than the scheduler waits for go no further, nor do malformed ones. What the
    scheduler concludes from a step (`RequestEnded`) comes behind the step itself. So whoever hears of tokens hears of
    every one that the scheduler counts, once and in order, whatever becomes of executors.

    Attributes:
        request_ids: rows that sampled, in the order of the step's rows.
        token_ids: one for each of them.
        stopped: rows among them whose token is an end or stop token (and `min_tokens` is reached).
        logprobs: `(request_id, TokenLogprobs)` for the rows that asked.
        prompt_logprobs: `(request_id, first_position, entries)` for rows that computed prompt tokens and asked.
        failed: `(request_id, message)`: rows that could not be computed or sampled; they end with `error`.
        execute_ns: time the executor spent on the step.
        nonfinite: those among `failed` for which the model computed NaN, infinity, or no finite logit at all.
    """

    epoch: Epoch
    step_id: StepId
    request_ids: tuple[RequestId, ...]
    token_ids: tuple[int, ...]
    stopped: tuple[RequestId, ...] = ()
    logprobs: tuple[tuple[RequestId, TokenLogprobs], ...] = ()
    prompt_logprobs: tuple[tuple[RequestId, int, tuple[TokenLogprobs, ...]], ...] = ()
    failed: tuple[tuple[RequestId, str], ...] = ()
    execute_ns: int = 0
    nonfinite: tuple[RequestId, ...] = ()


class PlanDue(Message, frozen=True):
    """Runtime -> scheduler: the inbox is drained; plan steps as long as the pipeline has room."""


class DecodeStretch(Message, frozen=True):
    """Scheduler -> KV allocator, under virtual time alone: steps that were planned and executed without messages.

    Stands for `num_steps` plans of nothing but one token for each of the same rows. Made by
    `SchedulerCore.advance_decode`, applied by `KVAllocatorCore.advance_decode`.

    Attributes:
        first_step_id: of the first step planned in the stretch; as many steps older than it were executed as there are
            steps in flight.
        request_ids: the rows of every one of these steps.
        grow: `(step_offset, request_id)`, one block to append before step `first_step_id + step_offset`, in the order
            in which the plans would have asked.
    """

    epoch: Epoch
    first_step_id: StepId
    num_steps: int
    request_ids: tuple[RequestId, ...]
    grow: tuple[tuple[int, RequestId], ...] = ()
