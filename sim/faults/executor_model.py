"""An executor without a model: it checks every token of KV that a step reads, and answers with the oracle's tokens."""

from __future__ import annotations

from collections.abc import Mapping

from ...actors.scheduler.config import MAX_GROWTH
from ...messages.ids import Epoch, RequestId
from ...messages.request import TokenLogprobs
from ...messages.step import ExecuteStep, StepExecuted
from .oracle import Oracle
from .violation import Violation


class PoisonError(Exception):
    """A request that no executor survives is in the step."""


class _Row:
    """A request in the standing batch.

    Attributes:
        num_tokens: tokens that are known on the device.
        num_started: of them, those that it began with; behind them it may take blocks that it will need soon.
        num_computed: of them, those whose KV is written.
        has_failed: it samples nothing any more.
        wants_prompt_logprobs: asked for, and not reported before.
    """

    __slots__ = (
        "block_table",
        "has_failed",
        "num_computed",
        "num_started",
        "num_tokens",
        "oracle",
        "wants_prompt_logprobs",
    )

    def __init__(self, oracle: Oracle, num_tokens: int, num_computed: int, block_table: list[int]) -> None:
        self.oracle = oracle
        self.num_tokens = self.num_started = num_tokens
        self.num_computed = num_computed
        self.block_table = block_table
        self.has_failed = False
        self.wants_prompt_logprobs = (
            oracle.submit.params.prompt_logprobs is not None and num_tokens == oracle.num_prompt
        )


class ExecutorModel:
    """Keeps, slot by slot, which history the KV memory was written for.

    Each row reads its whole context back after all rows have written, as attention does: a block that is shared
    wrongly, given away too early, or never filled is found in the step that would have read it.

    Args:
        epoch: the incarnation; steps of others are not for it.
        oracles: what each request is.
        num_blocks, block_size: the KV memory.
        max_num_seqs, max_num_batched_tokens: bounds of a step.
        max_sequence_len: tokens that one request may have.
    """

    def __init__(
        self,
        epoch: Epoch,
        oracles: Mapping[RequestId, Oracle],
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_sequence_len: int,
    ) -> None:
        self.epoch = epoch
        self.rows: dict[RequestId, _Row] = {}
        self.fail_next = False  # the next row that samples fails
        self._oracles = oracles
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_sequence_len = max_sequence_len
        self._memory: list[list[int]] = [[0] * block_size for _ in range(num_blocks)]

    def execute(self, step: ExecuteStep) -> StepExecuted:
        """Apply a step and compute it.

        Raises:
            PoisonError: nothing was computed, the executor is dead.
            Violation: the step is not what a step may be.
        """
        self._apply(step)
        batch = self._gather(step)
        for row, _ in batch:
            if row.oracle.is_poison:
                raise PoisonError(f"request {row.oracle.submit.request_id} killed the executor")
        if sum(row.oracle.is_poison_in_company for row, _ in batch) > 1:
            raise PoisonError("two requests killed the executor together")
        self._write(batch)
        for row, num_tokens in batch:
            row.num_computed += num_tokens
            if not row.has_failed:
                self._read(row)
        return self._sample(step, batch)

    def _apply(self, step: ExecuteStep) -> None:
        rows = self.rows
        for request_id in step.drop:
            rows.pop(request_id, None)
        if len(step.start) != len(step.block_tables):
            raise Violation("a step starts requests without block tables")
        for start, block_table in zip(step.start, step.block_tables, strict=True):
            if start.request_id in rows:
                raise Violation("a request starts that is running already", f"request {start.request_id}")
            oracle = self._oracles[start.request_id]
            num_tokens = len(start.token_ids) // 4
            oracle.token_at(num_tokens - 1)
            if memoryview(start.token_ids).cast("i").tolist() != oracle.tokens[:num_tokens]:
                raise Violation("a request starts with tokens that are not its own", f"request {start.request_id}")
            if start.num_prompt_tokens != oracle.num_prompt:
                raise Violation("a request starts with another prompt length", f"request {start.request_id}")
            rows[start.request_id] = _Row(oracle, num_tokens, start.num_computed_tokens, list(block_table))
        for request_id, block_ids in step.append_blocks:
            rows[request_id].block_table.extend(block_ids)
        if len(rows) > self._max_num_seqs:
            raise Violation("more requests run than max_num_seqs", f"{len(rows)} of {self._max_num_seqs}")

    def _gather(self, step: ExecuteStep) -> list[tuple[_Row, int]]:
        request_ids, num_tokens = step.request_ids, step.num_tokens
        if sum(num_tokens) > self._max_num_batched_tokens:
            raise Violation("a step exceeds the token budget", f"{sum(num_tokens)} of {self._max_num_batched_tokens}")
        if len(set(request_ids)) != len(request_ids) or len(request_ids) != len(num_tokens):
            raise Violation("a request is twice in a step", f"step {step.step_id}: {request_ids}")
        batch: list[tuple[_Row, int]] = []
        seen_chunk = False
        for request_id, count in zip(request_ids, num_tokens, strict=True):
            row = self.rows.get(request_id)
            if row is None:
                raise Violation("a row belongs to no running request", f"request {request_id}, step {step.step_id}")
            if count < 1 or row.num_computed + count > row.num_tokens:
                raise Violation(
                    "a row computes tokens that nobody knows",
                    f"request {request_id}: {row.num_computed} + {count} of {row.num_tokens}",
                )
            if count > 1:
                seen_chunk = True
            elif seen_chunk:
                raise Violation("rows of one token do not come first", f"step {step.step_id}")
            batch.append((row, count))
        return batch

    def _write(self, batch: list[tuple[_Row, int]]) -> None:
        size, memory = self._block_size, self._memory
        written: set[int] = set()
        for row, num_tokens in batch:
            begin = row.num_computed
            histories, table = row.oracle.histories, row.block_table
            if begin + num_tokens > len(table) * size:
                raise Violation(
                    "a row has no block to write to", f"request {row.oracle.submit.request_id}, {len(table)} blocks"
                )
            for position in range(begin, begin + num_tokens):
                block_id = table[position // size]
                offset = position % size
                slot = block_id * size + offset
                if slot in written:
                    raise Violation("two rows write one slot", f"block {block_id}")
                written.add(slot)
                memory[block_id][offset] = histories[position]

    def _read(self, row: _Row) -> None:
        size, memory, oracle = self._block_size, self._memory, row.oracle
        num_full, rest = divmod(row.num_computed, size)
        table = row.block_table
        num_ahead = len(table) - num_full - (rest > 0)
        if num_ahead and not (0 < num_ahead < MAX_GROWTH and row.num_computed > row.num_started):
            raise Violation(
                "a block table is not as long as its tokens need",
                f"request {oracle.submit.request_id}: {len(table)} blocks, {row.num_computed} tokens",
            )
        for index in range(num_full):
            if memory[table[index]] != oracle.full_block(index, size):
                raise Violation(
                    "a row reads KV of another history",
                    f"request {oracle.submit.request_id}, block {table[index]} at {index}",
                )
        if rest:
            begin = num_full * size
            if memory[table[num_full]][:rest] != oracle.histories[begin : begin + rest]:
                raise Violation(
                    "a row reads KV of another history",
                    f"request {oracle.submit.request_id}, block {table[num_full]} at {num_full}",
                )

    def _sample(self, step: ExecuteStep, batch: list[tuple[_Row, int]]) -> StepExecuted:
        request_ids: list[RequestId] = []
        token_ids: list[int] = []
        stopped: list[RequestId] = []
        failed: list[tuple[RequestId, str]] = []
        prompt_logprobs: list[tuple[RequestId, int, tuple[TokenLogprobs, ...]]] = []
        for request_id, (row, num_tokens) in zip(step.request_ids, batch, strict=True):
            oracle = row.oracle
            params = oracle.submit.params
            if row.wants_prompt_logprobs and row.num_computed - num_tokens < oracle.num_prompt - 1:
                prompt_logprobs.append(_prompt_logprobs(request_id, oracle, row.num_computed - num_tokens, num_tokens))
            position = row.num_tokens
            if row.num_computed < position:
                continue
            row.num_tokens = position + 1
            token = oracle.token_at(position)
            if row.has_failed:
                continue
            if self.fail_next:
                self.fail_next = False
                row.has_failed = True
                self._spoil(row)
                failed.append((request_id, "not a number"))
                continue
            num_outputs = position + 1 - oracle.num_prompt
            if position >= self._max_sequence_len or num_outputs > max(1, params.max_tokens or 1):
                raise Violation("a row samples past its last token", f"request {request_id}: output {num_outputs}")
            request_ids.append(request_id)
            token_ids.append(token)
            if token in oracle.stop_ids and num_outputs >= params.min_tokens:
                stopped.append(request_id)
        return StepExecuted(
            step.epoch,
            step.step_id,
            tuple(request_ids),
            tuple(token_ids),
            tuple(stopped),
            prompt_logprobs=tuple(prompt_logprobs),
            failed=tuple(failed),
        )

    def _spoil(self, row: _Row) -> None:
        """What made a row fail may have come from the KV that it wrote last (nobody else can have read it)."""
        newest = row.num_computed - 1
        if newest >= row.oracle.num_prompt:
            self._memory[row.block_table[newest // self._block_size]][newest % self._block_size] = -1


def _prompt_logprobs(
    request_id: RequestId, oracle: Oracle, begin: int, num_tokens: int
) -> tuple[RequestId, int, tuple[TokenLogprobs, ...]]:
    """Entries for the prompt tokens that this row's positions predict."""
    end = min(begin + num_tokens, oracle.num_prompt - 1)
    entries = tuple(TokenLogprobs(oracle.tokens[position + 1], -1.0, 1) for position in range(begin, end))
    return request_id, begin + 1, entries
