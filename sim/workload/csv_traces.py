"""Traces that are tables: Azure's, BurstGPT's, and the generic one."""

from __future__ import annotations

import csv
import datetime
import math
import re
from collections.abc import Callable, Iterator

from .request import WorkloadCounts
from .trace_file import TraceFile
from .trace_rows import TraceRows

MAX_TOKENS = 2**31 - 1
MAX_TIME_NS = 2**62
_NS = 1_000_000_000
_FRACTION_DIGITS = 9
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?", re.ASCII)
_DECIMAL = re.compile(r"\+?(\d+)(?:\.(\d*))?", re.ASCII)

Columns = dict[str, int]

AZURE = ("timestamp", "contexttokens", "generatedtokens")
BURST_GPT = ("timestamp", "request tokens", "response tokens")
GENERIC = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")
KNOWN_HEADERS = (
    "TIMESTAMP,ContextTokens,GeneratedTokens (Azure); Timestamp,Request tokens,Response tokens (BurstGPT); "
    "arrived_at,num_prefill_tokens,num_decode_tokens (generic, seconds)"
)


def read_csv(file: TraceFile, max_rows: int | None) -> TraceRows:
    """Every request of a table whose header is one of `KNOWN_HEADERS`.

    Raises:
        InvalidTraceError: an unknown header, or a row that is malformed.
    """
    table = _table(file)
    header = next(table, [])
    columns: Columns = {}
    for place, name in enumerate(header):
        if columns.setdefault(name.strip().lower(), place) != place:
            file.fail(f"the column {name.strip()!r} stands twice in the header", "Remove one")
    for needed, read in ((AZURE, _read_azure), (BURST_GPT, _read_burst_gpt), (GENERIC, _read_generic)):
        if all(name in columns for name in needed):
            rows = TraceRows(WorkloadCounts())
            read(file, _data(file, table, len(header), rows.counts, max_rows), columns, rows)
            return rows
    shown = ",".join(header)
    file.fail(
        f"no trace format has the header {shown[:200]!r}",
        f"Known: {KNOWN_HEADERS}; JSON lines of Mooncake and Qwen-Bailian; our journal",
    )


def _table(file: TraceFile) -> Iterator[list[str]]:
    def text() -> Iterator[str]:
        for line in file.lines():
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                file.fail(f"byte {error.start + 1} of the line is not UTF-8", "Is this a text file?")

    reader = csv.reader(text())
    try:
        yield from reader
    except csv.Error as error:
        file.fail(f"is not a table: {error}", "Is this a CSV file with line ends LF or CRLF?")


def _data(
    file: TraceFile, table: Iterator[list[str]], num_columns: int, counts: WorkloadCounts, max_rows: int | None
) -> Iterator[list[str]]:
    """Rows with all their cells; blank lines are counted and left out."""
    for cells in table:
        if counts.num_rows == max_rows:
            return
        counts.num_rows += 1
        if len(cells) == num_columns:
            yield cells
        elif not any(cell.strip() for cell in cells):
            skip(counts, "blank line")
        else:
            file.fail(
                f"{len(cells)} columns, where the header has {num_columns}",
                "Was the file cut off here? Mend or remove the line",
            )


def skip(counts: WorkloadCounts, reason: str) -> None:
    """Count a row that is left out."""
    counts.num_skipped[reason] = counts.num_skipped.get(reason, 0) + 1


def is_empty(counts: WorkloadCounts, num_prompt_tokens: int, num_output_tokens: int, no_output: str) -> bool:
    """Whether there is nothing to serve; counted then."""
    if num_prompt_tokens and num_output_tokens:
        return False
    skip(counts, no_output if num_prompt_tokens else "prompt of 0 tokens")
    return True


def _read_azure(file: TraceFile, data: Iterator[list[str]], columns: Columns, rows: TraceRows) -> None:
    time_at, prompt_at, output_at = (columns[name] for name in AZURE)
    read_time = _timestamp_reader(file)
    for cells in data:
        arrival_ns = read_time(cells[time_at])
        num_prompt = parse_count(file, cells[prompt_at], "ContextTokens")
        num_output = parse_count(file, cells[output_at], "GeneratedTokens")
        if not is_empty(rows.counts, num_prompt, num_output, "output of 0 tokens"):
            rows.add(arrival_ns, num_prompt, num_output)


def _read_burst_gpt(file: TraceFile, data: Iterator[list[str]], columns: Columns, rows: TraceRows) -> None:
    time_at, prompt_at, output_at = (columns[name] for name in BURST_GPT)
    session_at = columns.get("session id", columns.get("sessionid"))
    sessions: dict[str, int] = {}
    for cells in data:
        arrival_ns = parse_seconds(file, cells[time_at], "Timestamp")
        num_prompt = parse_count(file, cells[prompt_at], "Request tokens")
        num_output = parse_count(file, cells[output_at], "Response tokens")
        if is_empty(rows.counts, num_prompt, num_output, "response of 0 tokens (a failure)"):
            continue
        rows.add(arrival_ns, num_prompt, num_output)
        if session_at is not None and (name := cells[session_at].strip()):
            rows.set_session(sessions.setdefault(name, len(sessions)))


def _read_generic(file: TraceFile, data: Iterator[list[str]], columns: Columns, rows: TraceRows) -> None:
    """Besides the three columns, where they stand: `tenant`, `priority`, `cancel_after_s`, `timeout_s`."""
    time_at, prompt_at, output_at = (columns[name] for name in GENERIC)
    optional = [name for name in ("tenant", "priority", "cancel_after_s", "timeout_s") if name in columns]
    for cells in data:
        arrival_ns = parse_seconds(file, cells[time_at], "arrived_at")
        num_prompt = parse_count(file, cells[prompt_at], "num_prefill_tokens")
        num_output = parse_count(file, cells[output_at], "num_decode_tokens")
        if is_empty(rows.counts, num_prompt, num_output, "output of 0 tokens"):
            continue
        rows.add(arrival_ns, num_prompt, num_output)
        if optional:
            found = {name: cells[columns[name]].strip() for name in optional}
            rows.set_others(
                priority=_parse_priority(file, found.get("priority", "")),
                tenant=found.get("tenant", ""),
                cancel_after_ns=parse_seconds(file, found.get("cancel_after_s") or "0", "cancel_after_s"),
                timeout_ns=parse_seconds(file, found.get("timeout_s") or "0", "timeout_s"),
            )


def _parse_priority(file: TraceFile, text: str) -> int:
    try:
        return int(text or "0")
    except ValueError:
        file.fail(f"priority {shown(text)} is not a whole number")


def shown(text: str) -> str:
    """A cell as a message shows it."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def parse_count(file: TraceFile, text: str, name: str) -> int:
    """A number of tokens, 0 or more; `12.0` is 12."""
    if len(text) < 10 and text.isdecimal():
        return int(text)
    number = _parse_float(file, text, name, "a number of tokens")
    if number != int(number):
        file.fail(f"{name} is {shown(text)}, where a whole number of tokens should be")
    if number > MAX_TOKENS:
        file.fail(f"{name} is {shown(text)}, more tokens than {MAX_TOKENS}")
    return int(number)


def parse_seconds(file: TraceFile, text: str, name: str) -> int:
    """Seconds as ns; exact to the ninth decimal where they are written as a plain decimal."""
    decimal = _DECIMAL.fullmatch(text.strip())
    if decimal is None:
        number = _parse_float(file, text, name, "a number of seconds")
        time_ns = round(min(number * 1e9, 2.0 * MAX_TIME_NS))
    else:
        whole, fraction = decimal[1], decimal[2] or ""
        time_ns = int(whole[:40]) * _NS + int(fraction[:_FRACTION_DIGITS].ljust(_FRACTION_DIGITS, "0"))
    if time_ns > MAX_TIME_NS:
        file.fail(f"{name} is {shown(text)}, more than {MAX_TIME_NS // _NS} s", "Is it in milliseconds? Write seconds")
    return time_ns


def _parse_float(file: TraceFile, text: str, name: str, what: str) -> float:
    """Finite and not negative."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        file.fail(f"{name} is {shown(text)}, where {what} from 0 should be", "Mend or remove the line")
    return number


def _timestamp_reader(file: TraceFile) -> Callable[[str], int]:
    """Of `2023-11-16 18:15:46.6805900`, with up to nine decimals and with or without a zone, as ns."""
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    known, known_ns = "", 0  # rows of one second follow one another

    def read(text: str) -> int:
        nonlocal known, known_ns
        if len(text) == 27 and text[:20] == known and (fraction := text[20:]).isdecimal() and fraction.isascii():
            return known_ns + int(fraction) * 100
        found = _TIMESTAMP.fullmatch(text.strip())
        if found is None:
            file.fail(f"TIMESTAMP is {shown(text)}, where a time like 2023-11-16 18:15:46.6805900 should be")
        second, digits, zone = found.groups()
        try:
            moment = datetime.datetime.fromisoformat(second + (zone or "Z"))
        except ValueError as error:
            file.fail(f"TIMESTAMP is {shown(text)}: {error}")
        delta = moment - epoch
        time_ns = (delta.days * 86_400 + delta.seconds) * _NS
        if zone is None:
            known, known_ns = f"{second}.", time_ns
        return time_ns + (int(digits.ljust(_FRACTION_DIGITS, "0")) if digits else 0)

    return read
