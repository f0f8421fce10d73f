from pathlib import Path

import pytest
from step_time_tools import write_csv

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.tables.table_files import TableFile, find_tables


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_plain_and_gzip_with_any_line_end_read_alike(tmp_path: Path, name: str, newline: str) -> None:
    write_csv(tmp_path / name, "layer,tokens,time", ["x,1,2.5", "", "y,3,4e3"], newline=newline)
    table = find_tables(tmp_path)["a"]
    assert list(table.rows(("layer", "time"))) == [("x", "2.5"), ("y", "4e3")]
    assert list(table.numbers(("time", "tokens"))) == [(2.5, 1.0), (4000.0, 3.0)]


def test_a_last_newline_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n\n1\n2")
    assert list(TableFile(tmp_path / "a.csv").numbers(("n",))) == [(1.0,), (2.0,)]


def test_only_csv_files_are_found_by_name(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv.gz", "notes.txt", "c.json"):
        write_csv(tmp_path / name, "n", ["1"])
    (tmp_path / "folder.csv").mkdir()
    assert list(find_tables(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"n,t\n", "holds no rows"),
        (b"n,t\n1,2\n\n3\n", r"a\.csv:4: 1 fields, but the header has 2"),
        (b"n,t\n1,2\n3,x\n", r"a\.csv:3: n, t are 3, x, but must be numbers"),
        (b"n,t\n1,-2\n", r"a\.csv:2: .*must be numbers from 0 up"),
        (b"n,t\n1,nan\n", r"a\.csv:2: .*must be numbers from 0 up"),
        (b"n,x\n1,2\n", "column t is missing; there are n, x"),
        (b"\x1f\x8b broken", "cannot be read as a table"),
        (b"\xff\xfe\x00", "cannot be read as a table"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InvalidConfigError, match=message):
        list(TableFile(tmp_path / "a.csv").numbers(("n", "t")))
