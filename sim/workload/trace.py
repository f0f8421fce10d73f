"""A recorded trace as a workload."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from .content_ids import FIRST_PRIVATE_ID, ContentIds
from .csv_traces import read_csv
from .cut import FirstRequests
from .jsonl_traces import read_jsonl
from .request import TraceRequest, Workload, WorkloadCounts
from .ticks import spread_ticks
from .trace_file import TraceFile
from .trace_rows import TraceRows

_JOURNAL_MAGIC = b"octavoj"  # whatever its version: the journal's own reader judges that


class TraceWorkload:
    """Requests as they were recorded: open loop, time 0 is the first one's arrival."""

    def __init__(self, rows: TraceRows, *, name: str) -> None:
        self.name = name
        self.content_ids: ContentIds = rows.content_ids
        self.has_shared_prefixes = rows.has_shared_prefixes
        self._rows = rows
        self._order = rows.order()
        self.counts: WorkloadCounts = rows.counts
        self.counts.num_requests = len(rows)
        if not isinstance(self._order, range):
            times = rows.arrival_ns
            num_late = sum(earlier > later for earlier, later in pairwise(times))
            self.counts.num_changed["sorted: earlier than the line before"] = num_late
        self._begin_ns = rows.arrival_ns[self._order[0]]

    def __len__(self) -> int:
        return len(self._order)

    def arrivals(self) -> Iterator[TraceRequest]:
        """By time, ties by line."""
        return self._rows.requests(self._order, self._begin_ns)

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        """None: what came next came at its own time."""
        return ()


def read_trace(
    path: str | Path,
    *,
    spread_seed: int | None = None,
    max_rows: int | None = None,
    block_size: int | None = None,
    name: str | None = None,
) -> Workload:
    """Read a trace, whose format is told from its contents; plain or gzip.

    Formats: Azure's CSV (2023, 2024, multimodal 2025), BurstGPT's CSV, generic CSV (`arrived_at, num_prefill_tokens,
    num_decode_tokens`), Mooncake's JSON lines (also with 16-token blocks), Qwen-Bailian's; our own journal. Rows with
    nothing to serve are left out, unsorted ones sorted, both counted; a malformed row is an error.

    Args:
        spread_seed: spread requests uniformly over each tick of a coarse clock (Mooncake: 3 s); None: as recorded.
        max_rows: read only so many lines of data.
        block_size: tokens that a hash id of JSON lines stands for, where it cannot be told.
        name: for reports; None takes the file's.

    Raises:
        InvalidTraceError: cannot be read, with file and line.
        InvalidJournalError: a journal cannot be read.
    """
    file = TraceFile(path)
    if file.starts_with(_JOURNAL_MAGIC):
        return _read_journal(path, spread_seed=spread_seed, max_rows=max_rows, name=name)
    first = next((line for line in file.lines() if line.strip()), None)
    if first is None:
        file.fail("holds no line of text", line=0)
    if first.startswith(b"version https://git-lfs"):
        file.fail("is a Git LFS pointer, not the data", "Fetch it with `git lfs pull`", line=0)
    if first.lstrip().startswith(b"["):
        file.fail("is one JSON array", "Write one object a line (JSON lines)")
    is_json = first.lstrip().startswith(b"{")
    rows = read_jsonl(file, max_rows, block_size) if is_json else read_csv(file, max_rows)
    if not len(rows):
        skipped = ", ".join(f"{num} x {reason}" for reason, num in rows.counts.num_skipped.items())
        file.fail(f"holds no request{f' ({skipped})' if skipped else ''}", line=0)
    if 2 * len(rows) > FIRST_PRIVATE_ID:
        file.fail(f"holds more than {FIRST_PRIVATE_ID // 2} requests", "Read a part of it", line=0)
    workload = TraceWorkload(rows, name=name if name is not None else Path(path).name)
    return workload if spread_seed is None else spread_ticks(workload, seed=spread_seed)


def _read_journal(path: str | Path, *, spread_seed: int | None, max_rows: int | None, name: str | None) -> Workload:
    from .from_journal import read_journal  # the engine's cores, which no other trace needs

    workload: Workload = read_journal(path, name=name)
    if max_rows is not None:
        workload = FirstRequests(workload, max_rows)
    return workload if spread_seed is None else spread_ticks(workload, seed=spread_seed)
