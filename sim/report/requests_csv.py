"""One line a request, for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ..results import RequestRecord

COLUMNS = (
    "index", "replica", "tenant", "outcome", "num_prompt_tokens", "num_output_tokens", "num_cached_tokens",
    "num_preemptions", "arrival_s", "scheduled_s", "first_token_s", "last_token_s", "ended_s", "ttft_s", "tpot_s",
    "e2e_s",
)  # fmt: skip


def write_requests(path: Path, records: Sequence[RequestRecord]) -> None:
    """Write all requests; times in seconds of virtual time, empty where they never came.

    Raises:
        OSError: cannot be written.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_row(record) for record in records)


def _row(record: RequestRecord) -> list[object]:
    has_first, is_done = record.first_token_ns >= 0, record.outcome == "done"
    return [
        record.index,
        record.replica,
        _tame(record.tenant),
        record.outcome,
        record.num_prompt_tokens,
        record.num_output_tokens,
        record.num_cached_tokens,
        record.num_preemptions,
        *(
            _seconds(time_ns)
            for time_ns in (
                record.arrival_ns,
                record.scheduled_ns,
                record.first_token_ns,
                record.last_token_ns,
                record.ended_ns,
            )
        ),
        f"{record.ttft_s:.9f}" if has_first else "",
        f"{record.tpot_s:.9f}" if is_done and record.num_output_tokens > 1 else "",
        f"{record.e2e_s:.9f}" if is_done else "",
    ]


def _seconds(time_ns: int) -> str:
    return f"{time_ns / 1e9:.9f}" if time_ns >= 0 else ""


def _tame(text: str) -> str:
    """Spreadsheets run what begins like a formula; a trace's text must not be run."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
