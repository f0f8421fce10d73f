"""The batch that stays on the executor between steps; a step's message says only what changed.

Without torch: rows are kept in numpy arrays, and a step's tensors are views of what is gathered here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...messages.ids import BlockId, RequestId
from ...messages.step import ExecuteStep, StartRequest

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepArrays:
    """One step's ragged batch; shapes as in `octavo.kernels.attention_batch.AttentionBatch`.

    Attributes:
        input_ids, positions: `[num_tokens]`.
        sampling_tokens: index of the last token of each row that samples, `[num_sampling]`.
        sampling_requests: those rows, in order.
    """

    input_ids: Int64
    positions: Int64
    slot_mapping: Int64
    query_start: Int32
    context_lens: Int32
    block_tables: Int32
    max_query_len: int
    max_context_len: int
    num_decodes: int
    sampling_tokens: Int64
    sampling_requests: tuple[RequestId, ...]


class StandingBatch:
    """Tokens, progress and block tables of the requests that are on the executor.

    Args:
        max_num_rows: requests that can stand at once.
        max_model_len: longest sequence of a request, in tokens.
        block_size: tokens in a KV block.
    """

    def __init__(self, *, max_num_rows: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self._free_rows = list(range(max_num_rows - 1, -1, -1))
        self._row_of: dict[RequestId, int] = {}
        self._token_ids: Int32 = np.zeros((max_num_rows, max_model_len + 1), dtype=np.int32)
        self._num_tokens: Int32 = np.zeros(max_num_rows, dtype=np.int32)
        self._num_computed: Int32 = np.zeros(max_num_rows, dtype=np.int32)
        self._block_table: Int32 = np.zeros((max_num_rows, max_blocks), dtype=np.int32)
        self._num_blocks: Int32 = np.zeros(max_num_rows, dtype=np.int32)
        self._rows_key: tuple[RequestId, ...] = ()
        self._rows: Int64 = np.zeros(0, dtype=np.int64)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._row_of

    def __len__(self) -> int:
        return len(self._row_of)

    def apply(self, step: ExecuteStep) -> None:
        """Take in what the step changes, before its rows are computed."""
        for request_id in step.drop:
            self.drop(request_id)
        for start, block_table in zip(step.start, step.block_tables, strict=True):
            self._start(start, block_table)
        for request_id, block_ids in step.append_blocks:
            row = self._row_of[request_id]
            end = self._num_blocks[row] + len(block_ids)
            self._block_table[row, self._num_blocks[row] : end] = block_ids
            self._num_blocks[row] = end

    def _start(self, start: StartRequest, block_table: Sequence[BlockId]) -> None:
        row = self._free_rows.pop()
        self._row_of[start.request_id] = row
        token_ids = np.frombuffer(start.token_ids, dtype=np.int32)
        self._token_ids[row, : len(token_ids)] = token_ids
        self._num_tokens[row] = len(token_ids)
        self._num_computed[row] = start.num_computed_tokens
        self._block_table[row, : len(block_table)] = block_table
        self._num_blocks[row] = len(block_table)
        self._rows_key = ()

    def drop(self, request_id: RequestId) -> None:
        """Forget a request; unknown ids are ignored (its start may have been lost with an epoch)."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row)
            self._rows_key = ()

    def clear(self) -> None:
        """Forget every request."""
        for request_id in list(self._row_of):
            self.drop(request_id)

    def token_ids(self, request_id: RequestId) -> list[int]:
        """Prompt and outputs known so far."""
        row = self._row_of[request_id]
        return self._token_ids[row, : self._num_tokens[row]].tolist()  # type: ignore[no-any-return]  # numpy types tolist as Any

    def gather(self, step: ExecuteStep) -> StepArrays:
        """Arrange the step's rows and count their tokens as computed."""
        rows = self._rows_of(step.request_ids)
        num_new = np.asarray(step.num_tokens, dtype=np.int32)
        before = self._num_computed[rows]
        context_lens = before + num_new
        self._num_computed[rows] = context_lens
        max_query_len = int(num_new.max())
        if max_query_len == 1:
            token_row = rows
            positions = before.astype(np.int64)
            query_start = np.arange(len(rows) + 1, dtype=np.int32)
        else:
            query_start = np.zeros(len(rows) + 1, dtype=np.int32)
            np.cumsum(num_new, out=query_start[1:])
            token_row = np.repeat(rows, num_new)
            within = np.arange(query_start[-1], dtype=np.int64) - np.repeat(query_start[:-1], num_new)
            positions = np.repeat(before, num_new).astype(np.int64) + within
        block_of = self._block_table[token_row, positions // self._block_size].astype(np.int64)
        samples = context_lens == self._num_tokens[rows]
        max_context_len = int(context_lens.max())
        return StepArrays(
            input_ids=self._token_ids[token_row, positions].astype(np.int64),
            positions=positions,
            slot_mapping=block_of * self._block_size + positions % self._block_size,
            query_start=query_start,
            context_lens=context_lens,
            block_tables=self._block_table[rows, : -(-max_context_len // self._block_size)],
            max_query_len=max_query_len,
            max_context_len=max_context_len,
            num_decodes=int(np.argmax(num_new != 1)) if max_query_len != 1 else len(rows),
            sampling_tokens=(query_start[1:][samples] - 1).astype(np.int64),
            sampling_requests=(
                step.request_ids
                if samples.all()
                else tuple(
                    request_id for request_id, yes in zip(step.request_ids, samples.tolist(), strict=True) if yes
                )
            ),
        )

    def append(self, request_ids: Sequence[RequestId], token_ids: Sequence[int]) -> None:
        """Add each request's sampled token, which its next step will compute."""
        rows = self._rows_of(tuple(request_ids))
        self._token_ids[rows, self._num_tokens[rows]] = token_ids
        self._num_tokens[rows] += 1

    def _rows_of(self, request_ids: tuple[RequestId, ...]) -> Int64:
        if request_ids != self._rows_key:
            self._rows = np.fromiter(
                (self._row_of[request_id] for request_id in request_ids), np.int64, len(request_ids)
            )
            self._rows_key = request_ids
        return self._rows
