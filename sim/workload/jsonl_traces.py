"""Traces of one JSON object a line: Mooncake's and Qwen-Bailian's, whose block ids drive real prefix hits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TypeVar

import msgspec

from .content_ids import FIRST_PRIVATE_ID
from .csv_traces import MAX_TIME_NS, MAX_TOKENS, is_empty, skip
from .request import WorkloadCounts
from .trace_file import TraceFile
from .trace_rows import TraceRows

MOONCAKE_BLOCK_SIZE = 512
SMALL_BLOCK_SIZE = 16
_NUM_PROBED_LINES = 1000
_KNOWN = "Known: Mooncake (timestamp, input_length, output_length, hash_ids), Qwen-Bailian (chat_id besides)"

_Row = TypeVar("_Row", bound="_MooncakeRow")


class _MooncakeRow(msgspec.Struct, gc=False, kw_only=True):
    timestamp: int | float
    input_length: int
    output_length: int
    hash_ids: list[int] | None = None


class _BailianRow(_MooncakeRow, gc=False, kw_only=True):
    chat_id: int
    parent_chat_id: int


class _Blocks(msgspec.Struct, frozen=True):
    """How a trace cuts prompts into blocks."""

    size: int
    full_only: bool  # a partial last block has no id

    def expected(self, num_tokens: int) -> int:
        return num_tokens // self.size if self.full_only else -(-num_tokens // self.size)

    def __str__(self) -> str:
        return f"blocks of {self.size} tokens{', full ones only' if self.full_only else ''}"


_CANDIDATES = (
    _Blocks(MOONCAKE_BLOCK_SIZE, False),
    _Blocks(SMALL_BLOCK_SIZE, True),
    _Blocks(SMALL_BLOCK_SIZE, False),
    _Blocks(MOONCAKE_BLOCK_SIZE, True),
    *(_Blocks(size, full_only) for full_only in (False, True) for size in (256, 128, 64, 32, 1024, 2048)),
)


def read_jsonl(file: TraceFile, max_rows: int | None, block_size: int | None) -> TraceRows:
    """Every request of a Mooncake or Qwen-Bailian trace.

    Block ids are kept as they are; where they do not fit below `FIRST_PRIVATE_ID` (64-bit hashes), all are renumbered
    in order of appearance.

    Args:
        block_size: tokens an id stands for; None tells it from the number of ids of the first lines.

    Raises:
        InvalidTraceError: neither format, or a row that is malformed.
    """
    first = next((line for line in file.lines() if line.strip()), b"")
    try:
        keys = msgspec.json.decode(first, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        file.fail(f"is not a JSON object: {error}", _KNOWN)
    if missing := [name for name in ("timestamp", "input_length", "output_length") if name not in keys]:
        file.fail(f"no trace format lacks {', '.join(missing)}; found {', '.join(keys)[:200]}", _KNOWN)
    if "chat_id" in keys:
        return _read(file, _BailianRow, 1e9, max_rows, block_size or SMALL_BLOCK_SIZE)
    return _read(file, _MooncakeRow, 1e6, max_rows, block_size)


def _read(
    file: TraceFile, row_type: type[_Row], ns_per_unit: float, max_rows: int | None, block_size: int | None
) -> TraceRows:
    decode: Callable[[bytes], _Row] = msgspec.json.Decoder(row_type).decode
    blocks, renumbered = _probe(
        file, decode, _NUM_PROBED_LINES if max_rows is None else min(max_rows, _NUM_PROBED_LINES), block_size
    )
    counts = WorkloadCounts()
    rows = TraceRows(counts, block_size=blocks.size, full_blocks_only=blocks.full_only)
    roots: dict[int, int] = {}  # chat -> the chat its conversation began with
    numbers: dict[int, int] = {}
    max_time = MAX_TIME_NS / ns_per_unit
    max_id = 2**64 if renumbered else FIRST_PRIVATE_ID
    for line in file.lines():
        if counts.num_rows == max_rows:
            break
        counts.num_rows += 1
        if not line or line.isspace():
            skip(counts, "blank line")
            continue
        row = _decode(file, decode, line)
        num_prompt, num_output = row.input_length, row.output_length
        if not (0 <= num_prompt <= MAX_TOKENS and 0 <= num_output <= MAX_TOKENS and 0 <= row.timestamp <= max_time):
            _fail_range(file, row, max_time)
        if is_empty(counts, num_prompt, num_output, "output of 0 tokens"):
            continue
        ids = row.hash_ids
        if ids:
            if len(ids) != blocks.expected(num_prompt):
                _fail_blocks(file, row, blocks)
            if min(ids) < 0 or max(ids) >= max_id:
                wrong = next(content_id for content_id in ids if not 0 <= content_id < max_id)
                file.fail(f"hash id {wrong} is not from 0 to {max_id - 1}", "Renumber the blocks from 0")
            if renumbered:
                ids = [numbers.setdefault(content_id, len(numbers)) for content_id in ids]
        rows.add(round(row.timestamp * ns_per_unit), num_prompt, num_output, ids)
        if isinstance(row, _BailianRow):
            parent = row.parent_chat_id
            roots[row.chat_id] = root = roots.get(parent, parent) if parent >= 0 else row.chat_id
            rows.set_session(root)
    if len(numbers) > FIRST_PRIVATE_ID:
        file.fail(f"more than {FIRST_PRIVATE_ID} different blocks", "Read a part of it", line=0)
    return rows


def _decode(file: TraceFile, decode: Callable[[bytes], _Row], line: bytes) -> _Row:
    try:
        return decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        file.fail(f"is not a request of this trace: {error}", "Was the file cut off here? Mend or remove the line")


def _probe(
    file: TraceFile, decode: Callable[[bytes], _Row], num_lines: int, block_size: int | None
) -> tuple[_Blocks, bool]:
    """Block size by the number of ids, and whether they must be renumbered; from the first lines."""
    sizes: list[tuple[int, int]] = []
    renumbered = False
    for line in islice(file.lines(), num_lines):
        if line and not line.isspace():
            row = _decode(file, decode, line)
            if row.hash_ids is not None and row.input_length > 0:
                sizes.append((row.input_length, len(row.hash_ids)))
                renumbered = renumbered or any(content_id >= FIRST_PRIVATE_ID for content_id in row.hash_ids)
    candidates: tuple[_Blocks, ...] = _CANDIDATES
    if block_size is not None:
        candidates = (_Blocks(block_size, False), _Blocks(block_size, True))
    for blocks in candidates:
        if all(num_ids == blocks.expected(num_tokens) for num_tokens, num_ids in sizes):
            return blocks, renumbered
    # The first lines contradict each other or fit no size: the reading of the rows says which line it is.
    num_fitting = [sum(num_ids == each.expected(num_tokens) for num_tokens, num_ids in sizes) for each in candidates]
    return candidates[num_fitting.index(max(num_fitting))], renumbered


def _fail_range(file: TraceFile, row: _MooncakeRow, max_time: float) -> None:
    for name, number, limit in (
        ("timestamp", row.timestamp, max_time),
        ("input_length", row.input_length, MAX_TOKENS),
        ("output_length", row.output_length, MAX_TOKENS),
    ):
        if not 0 <= number <= limit:
            file.fail(f"{name} is {number}, not from 0 to {limit:.0f}", "Mend or remove the line")


def _fail_blocks(file: TraceFile, row: _MooncakeRow, blocks: _Blocks) -> None:
    num_ids = len(row.hash_ids or ())
    file.fail(
        f"{num_ids} hash_ids for a prompt of {row.input_length} tokens; {blocks} make "
        f"{blocks.expected(row.input_length)}",
        "Give the trace's block size, if it is another",
    )
