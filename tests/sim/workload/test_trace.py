"""Readers of recorded traces: each format, in every shape a file comes in."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from journaled_ring import record_ring

from octavo.messages.errors import InvalidJournalError, InvalidTraceError
from octavo.sim.workload.content_ids import FIRST_PRIVATE_ID, content_ids_of
from octavo.sim.workload.from_journal import read_journal
from octavo.sim.workload.request import TraceRequest, Workload
from octavo.sim.workload.superpose import scale_rate
from octavo.sim.workload.trace import read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951691,879,55
"""


def read(folder: Path, text: str | bytes, **options: int) -> Workload:
    path = folder / "trace"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_trace(path, **options)


def rows(workload: Workload) -> list[tuple[int, int, int]]:
    return [(r.arrival_ns, r.num_prompt_tokens, r.num_output_tokens) for r in workload.arrivals()]


def mooncake(*lines: tuple[float, int, int, list[int]]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines)


def ids_of(requests: list[TraceRequest]) -> list[int]:
    return [content_id for r in requests for content_id in [*dict.fromkeys(run[0] for run in r.segments), r.answer_id]]


def test_azure_times_are_exact_to_the_seventh_decimal(tmp_path: Path) -> None:
    workload = read(tmp_path, AZURE)
    assert rows(workload) == [(0, 374, 44), (4_314_579_000, 396, 109), (4_314_579_100, 879, 55)]
    assert not workload.has_shared_prefixes
    assert (workload.counts.num_rows, workload.counts.num_requests) == (3, 3)


def test_nothing_is_shared_when_a_trace_tells_no_contents(tmp_path: Path) -> None:
    ids = ids_of(list(read(tmp_path, AZURE).arrivals()))
    assert len(set(ids)) == len(ids) == 6
    assert all(0 <= content_id < 2**31 for content_id in ids)


@pytest.mark.parametrize(
    "second",
    [
        "2023-11-16 18:15:47.6805900",
        "2023-11-16T18:15:47.6805900",
        "2023-11-16 18:15:47.680590000",
        "2023-11-16 18:15:47.68059+00:00",
        "2023-11-16 19:15:47.68059+01:00",
        "2023-11-16 18:15:47.68059Z",
    ],
)
def test_azure_timestamps_of_every_year_are_read(tmp_path: Path, second: str) -> None:
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,1,1\n{second},2,2\n"
    assert rows(read(tmp_path, text))[1][0] == 1_000_000_000


def test_azure_across_midnight_and_new_year(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-12-31 23:59:59.5,1,1\n2024-01-01 00:00:00,2,2\n"
    assert rows(read(tmp_path, text))[1][0] == 500_000_000


def test_azure_multimodal_has_a_column_more(tmp_path: Path) -> None:
    text = "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2025-01-01 00:00:00,3,17,5\n"
    assert rows(read(tmp_path, text)) == [(0, 17, 5)]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("is_last_ended", [False, True])
def test_the_shape_of_the_file_changes_nothing(
    tmp_path: Path, compress: bool, mark: bytes, end: bytes, is_last_ended: bool
) -> None:
    for text in (AZURE, mooncake((0, 700, 5, [0, 1]), (3000, 512, 6, [0]))):
        data = mark + text.encode().replace(b"\n", end)
        data = data if is_last_ended else data.removesuffix(end)
        shaped = read(tmp_path, gzip.compress(data) if compress else data)
        plain = read(tmp_path, text)
        assert list(shaped.arrivals()) == list(plain.arrivals())
        assert shaped.counts == plain.counts


def test_gzip_members_in_a_row_are_one_trace(tmp_path: Path) -> None:
    head, tail = AZURE[:60], AZURE[60:]
    assert rows(read(tmp_path, gzip.compress(head.encode()) + gzip.compress(tail.encode()))) == rows(
        read(tmp_path, AZURE)
    )


def test_blank_lines_and_rows_without_work_are_counted_and_left_out(tmp_path: Path) -> None:
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n\n1,0,5\n2,5,0\n3,0,0\n4,5,6\n  \n"
    workload = read(tmp_path, text)
    assert rows(workload) == [(0, 5, 6)]
    assert workload.counts.num_skipped == {"blank line": 2, "prompt of 0 tokens": 2, "output of 0 tokens": 1}
    assert workload.counts.num_rows == 6
    text = mooncake((0, 0, 5, []), (0, 5, 0, [7]), (9, 5, 5, [7])) + "\n"
    workload = read(tmp_path, text)
    assert rows(workload) == [(0, 5, 5)]
    assert workload.counts.num_rows == workload.counts.num_requests + sum(workload.counts.num_skipped.values()) == 4


def test_burst_gpt_failures_are_counted_and_left_out(tmp_path: Path) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n"
    )
    workload = read(tmp_path, text)
    assert rows(workload) == [(0, 472, 18), (113_000_000_000, 417, 276)]
    assert workload.counts.num_skipped == {"response of 0 tokens (a failure)": 1}


def test_burst_gpt_sessions_are_kept(tmp_path: Path) -> None:
    text = (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "1,s7,1,m,4,5,9,x\n2,,1,m,4,5,9,x\n3,s8,1,m,4,5,9,x\n4,s7,1,m,4,5,9,x\n"
    )
    assert [r.session for r in read(tmp_path, text).arrivals()] == [0, -1, 1, 0]


def test_generic_rows_may_say_tenant_priority_and_patience(tmp_path: Path) -> None:
    text = (
        "arrived_at,num_prefill_tokens,num_decode_tokens,tenant,priority,cancel_after_s,timeout_s\n"
        "0,5,6,gold,-3,1.5,20\n1,7,8,,,,\n"
    )
    first, second = read(tmp_path, text).arrivals()
    assert (first.tenant, first.priority, first.cancel_after_ns, first.timeout_ns) == (
        "gold",
        -3,
        1_500_000_000,
        20_000_000_000,
    )
    assert (second.tenant, second.priority, second.cancel_after_ns, second.timeout_ns) == ("", 0, 0, 0)


def test_seconds_since_the_epoch_keep_their_nanoseconds(tmp_path: Path) -> None:
    text = (
        "arrived_at,num_prefill_tokens,num_decode_tokens\n"
        "1700000000.000000001,1,1\n1700000000.000000003,12.0,1\n1.7000000005e9,1,1\n"
    )
    assert rows(read(tmp_path, text)) == [(0, 1, 1), (2, 12, 1), (499_999_999, 1, 1)]


def test_rows_out_of_order_are_sorted_and_counted_and_ties_stay_by_line(tmp_path: Path) -> None:
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n3,1,1\n1,2,1\n3,3,1\n1,4,1\n"
    workload = read(tmp_path, text)
    assert [r.num_prompt_tokens for r in workload.arrivals()] == [2, 4, 1, 3]
    assert workload.counts.num_changed == {"sorted: earlier than the line before": 2}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_arrivals_are_by_time_then_line(tmp_path_factory: pytest.TempPathFactory, times: list[int]) -> None:
    lines = [f"{time},{place + 1},1" for place, time in enumerate(times)]
    text = "arrived_at,num_prefill_tokens,num_decode_tokens\n" + "\n".join(lines)
    workload = read(tmp_path_factory.mktemp("t"), text)
    expected = sorted((time - min(times), place + 1) for place, time in enumerate(times))
    assert [(r.arrival_ns // 10**9, r.num_prompt_tokens) for r in workload.arrivals()] == expected
    assert list(workload.arrivals()) == list(workload.arrivals())


def test_mooncake_blocks_keep_their_ids_and_the_last_may_be_partial(tmp_path: Path) -> None:
    first, second = read(tmp_path, mooncake((0, 1100, 5, [0, 1, 2]), (3000, 1024, 6, [0, 9]))).arrivals()
    assert first.segments == ((0, 512), (1, 512), (2, 76))
    assert second.segments == ((0, 512), (9, 512))
    assert second.arrival_ns == 3_000_000_000
    assert first.answer_id >= FIRST_PRIVATE_ID
    assert first.answer_id != second.answer_id


def test_sixteen_token_full_blocks_are_told_by_the_number_of_ids(tmp_path: Path) -> None:
    text = mooncake((285.059, 40, 5, [3, 4]), (417.476, 32, 6, [3, 5]), (418, 15, 7, []))
    first, second, third = read(tmp_path, text).arrivals()
    assert first.segments[:2] == ((3, 16), (4, 16))
    assert [num_tokens for _, num_tokens in first.segments] == [16, 16, 8]
    assert second.segments == ((3, 16), (5, 16))
    assert third.num_prompt_tokens == 15
    assert second.arrival_ns == 132_417_000
    tails = [first.segments[2][0], third.segments[0][0], first.answer_id, second.answer_id, third.answer_id]
    assert len(set(tails)) == 5 and min(tails) >= FIRST_PRIVATE_ID


@pytest.mark.parametrize("size", [32, 64, 128, 256, 1024])
def test_other_block_sizes_are_told_or_given(tmp_path: Path, size: int) -> None:
    text = mooncake((0, 5 * size + 1, 5, list(range(6))), (1, 7 * size, 5, list(range(7))))
    assert next(read(tmp_path, text).arrivals()).segments[0] == (0, size)
    assert next(read(tmp_path, text, block_size=size).arrivals()).segments[0] == (0, size)


def test_a_row_that_contradicts_the_block_size_is_named(tmp_path: Path) -> None:
    text = mooncake((0, 1100, 5, [0, 1, 2]), (0, 600, 5, [0, 1]), (0, 600, 5, [0, 1, 7]))
    with pytest.raises(InvalidTraceError, match=r"trace:3: 3 hash_ids for a prompt of 600 tokens.*make 2") as caught:
        read(tmp_path, text)
    assert caught.value.line == 3


def test_block_ids_that_are_hashes_are_renumbered(tmp_path: Path) -> None:
    big = 2**63 + 5
    first, second = read(tmp_path, mooncake((0, 600, 5, [big, 3]), (0, 513, 5, [big, 4]))).arrivals()
    assert [run[0] for run in first.segments] == [0, 1]
    assert [run[0] for run in second.segments] == [0, 2]


def test_mooncake_without_block_ids_shares_nothing(tmp_path: Path) -> None:
    workload = read(tmp_path, '{"timestamp":0,"input_length":9,"output_length":1}\n')
    assert not workload.has_shared_prefixes
    assert next(workload.arrivals()).segments == ((FIRST_PRIVATE_ID, 9),)


def test_bailian_turns_of_a_chat_are_one_session(tmp_path: Path) -> None:
    lines = [
        {"chat_id": 55, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 20, "output_length": 3},
        {"chat_id": 60, "parent_chat_id": -1, "timestamp": 1.0, "input_length": 16, "output_length": 3},
        {"chat_id": 159, "parent_chat_id": 55, "timestamp": 61.114, "input_length": 40, "output_length": 9},
        {"chat_id": 160, "parent_chat_id": 159, "timestamp": 61.114, "input_length": 33, "output_length": 9},
    ]
    hashes = [[1, 2], [7], [1, 2, 3], [1, 2, 3]]
    text = "".join(
        json.dumps(line | {"type": "text", "turn": 1, "hash_ids": ids}) + "\n"
        for line, ids in zip(lines, hashes, strict=True)
    )
    workload = read(tmp_path, text)
    requests = list(workload.arrivals())
    assert [r.session for r in requests] == [55, 60, 55, 55]
    assert requests[2].segments == ((1, 16), (2, 16), (3, 8))
    assert requests[2].arrival_ns == 60_614_000_000
    assert workload.has_shared_prefixes


def test_declared_contents_cover_all_that_occur(tmp_path: Path) -> None:
    workload = read(tmp_path, mooncake((0, 1100, 5, [0, 4, 2]), (3000, 1024, 6, [0, 9])))
    ids = ids_of(list(workload.arrivals()))
    declared = content_ids_of(workload)
    assert max(i for i in ids if i < FIRST_PRIVATE_ID) < declared.num_shared == 10
    assert max(ids) < FIRST_PRIVATE_ID + declared.num_private


def test_the_first_rows_alone_are_read_when_asked_for(tmp_path: Path) -> None:
    assert len(rows(read(tmp_path, AZURE + "not,a,row\n", max_rows=3))) == 3
    assert len(rows(read(tmp_path, mooncake((0, 5, 5, [1]), (0, 5, 5, [1])) + "{", max_rows=2))) == 2


def test_a_journal_of_the_engine_is_a_trace_too(tmp_path: Path) -> None:
    path = tmp_path / "run.octavo"
    record_ring(path, seed=1, num_requests=6, num_steps=250)
    requests = list(read_journal(path).arrivals())
    assert len(requests) == 6
    workload = read_trace(path)
    assert list(workload.arrivals()) == requests
    assert workload.counts.num_requests == 6
    assert list(read_trace(path, max_rows=2).arrivals()) == requests[:2]
    path.write_bytes(path.read_bytes()[:7] + b"\xff rest")
    with pytest.raises(InvalidJournalError):
        read_trace(path)


HOSTILE = {
    "empty": (b"", 0, "is empty"),
    "blank": (b"\n \n", 0, "no line of text"),
    "header alone": (AZURE.partition("\n")[0].encode(), 0, "holds no request"),
    "only failures": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1,5,0\n", 0, "holds no request.*1 x output"),
    "unknown header": (b"a,b,c\n1,2,3\n", 1, "no trace format has the header 'a,b,c'. Known: TIMESTAMP"),
    "column twice": (b"arrived_at,Arrived_At,num_prefill_tokens,num_decode_tokens\n1,1,2,3\n", 1, "stands twice"),
    "unknown keys": (b'{"time":0,"input_length":5}\n', 1, "lacks timestamp, output_length; found time, input_length"),
    "json array": (b'[{"timestamp":0}]', 1, "JSON array"),
    "cut json": (b'{"timestamp":0,"input_length":5,"output', 1, "not a JSON object"),
    "cut json later": (b'{"timestamp":0,"input_length":5,"output_length":5}\n{"timest', 2, "cut off here"),
    "cut csv": (AZURE.encode() + b"2023-11-16 18:15", 5, "1 columns, where the header has 3"),
    "negative": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1,-5,5\n", 2, "num_prefill_tokens is '-5'"),
    "not a number": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1,nan,5\n", 2, "num_prefill_tokens is 'nan'"),
    "infinite": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1,5,inf\n", 2, "num_decode_tokens is 'inf'"),
    "huge": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1,99999999999,5\n", 2, "more tokens than"),
    "broken": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1,5.5,5\n", 2, "a whole number"),
    "word": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1,five,5\n", 2, "'five', where a number of tokens"),
    "thousands of digits": (
        b"arrived_at,num_prefill_tokens,num_decode_tokens\n1," + b"9" * 5000 + b",5\n",
        2,
        "num_prefill_tokens",
    ),
    "early": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n-1,5,5\n", 2, "arrived_at is '-1'"),
    "no time": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n,5,5\n", 2, "arrived_at is ''"),
    "nan time": (b"arrived_at,num_prefill_tokens,num_decode_tokens\nnan,5,5\n", 2, "arrived_at is 'nan'"),
    "late": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n1e300,5,5\n", 2, "milliseconds"),
    "later": (b"arrived_at,num_prefill_tokens,num_decode_tokens\n" + b"9" * 5000 + b",5,5\n", 2, "milliseconds"),
    "no such day": (b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-02-30 00:00:00,1,1\n", 2, "2023-02-30"),
    "no such hour": (b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-02-03 25:00:00,1,1\n", 2, "25:00:00"),
    "date alone": (b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-02-03,1,1\n", 2, "where a time like"),
    "priority": (b"arrived_at,num_prefill_tokens,num_decode_tokens,priority\n1,5,5,high\n", 2, "priority 'high'"),
    "json negative": (mooncake((0, -1, 5, [])).encode(), 1, "input_length is -1"),
    "json negative time": (mooncake((-4, 1, 5, [0])).encode(), 1, "timestamp is -4"),
    "json huge": (mooncake((0, 2**40, 5, [])).encode(), 1, "input_length"),
    "json string": (b'{"timestamp":0,"input_length":"5","output_length":5}\n', 1, "Expected `int`"),
    "json late": (mooncake((1e300, 1, 5, [0])).encode(), 1, "timestamp"),
    "json negative id": (mooncake((0, 5, 5, [-1])).encode(), 1, "hash id -1"),
    "json nan": (b'{"timestamp":NaN,"input_length":5,"output_length":5}\n', 1, "JSON"),
    "utf-16": (AZURE.encode("utf-16"), 0, "UTF-16"),
    "binary": (b"\x7fELF\0\0\1\2", 0, "binary file"),
    "latin-1": (AZURE.encode() + b"\xe9,1,2\n", 5, "not UTF-8"),
    "old line ends": (AZURE.replace("\n", "\r").encode(), 1, "table"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", 0, "git lfs pull"),
    "cut gzip": (
        gzip.compress((AZURE + "2023-11-16 18:15:51,1,1\n" * 50).encode())[:-8],
        0,
        "ends early, after line 54",
    ),
    "damaged gzip": (gzip.compress(AZURE.encode())[:-8] + b"\0" * 8, 0, "damaged"),
    "gzip with a tail": (gzip.compress(AZURE.encode()) + b"tail", 0, "damaged"),
    "gzip magic alone": (b"\x1f\x8b", 0, "ends early"),
    "gzip of nothing": (gzip.compress(b""), 0, "no line of text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_malformed_file_is_refused_with_file_and_line(tmp_path: Path, name: str) -> None:
    data, line, message = HOSTILE[name]
    with pytest.raises(InvalidTraceError, match=message) as caught:
        read(tmp_path, data)
    assert caught.value.file == str(tmp_path / "trace")
    assert caught.value.line == line
    assert str(caught.value).startswith(f"{tmp_path / 'trace'}{f':{line}' if line else ''}: ")
    assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidTraceError, match="no such file"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(InvalidTraceError, match="is a folder"):
        read_trace(tmp_path)
    with pytest.raises(InvalidTraceError, match="not a regular file"):
        read_trace("/dev/null")


def test_an_error_reaches_another_process_whole(tmp_path: Path) -> None:
    with pytest.raises(InvalidTraceError) as caught:
        read(tmp_path, AZURE + "x,1,2")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.file, again.line) == (str(caught.value), caught.value.file, 5)


def test_a_workload_reaches_another_process_whole(tmp_path: Path) -> None:
    workload = scale_rate(read(tmp_path, mooncake((0, 700, 5, [0, 1]), (3000, 512, 6, [0]))), 2.5, seed=1)
    assert list(pickle.loads(pickle.dumps(workload)).arrivals()) == list(workload.arrivals())


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    with pytest.raises(InvalidTraceError, match="longer than 16777216 bytes"):
        read(tmp_path, gzip.compress(b"x" * (40 << 20)))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
@example(b"octavoj")
@example(b"octavoj\x01" + bytes(40))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("t")
    heads = (b"", AZURE.encode(), mooncake((0, 5, 5, [1])).encode(), b"\x1f\x8b\x08\x00", gzip.compress(AZURE.encode()))
    for head in heads:
        try:
            workload = read(folder, head + data)
        except (InvalidTraceError, InvalidJournalError) as error:
            assert str(folder / "trace") in str(error)
        else:
            assert workload.counts.num_requests == len(rows(workload))
