"""The comparison runs, and names each way that there is."""

from __future__ import annotations

import pytest
import torch
from c_library import needs_c

from octavo.kernels import cpu_build, linear_packed
from octavo.kernels.bench_packed import main

pytestmark = needs_c


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_number_of_rows_gets_a_time_for_each_way(
    dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_packed, "_LEAST_BYTES", 0)
    num_threads = str(torch.get_num_threads())
    main(["--rows", "1", "5", "--dtype", dtype, "--divisor", "8", "--repeats", "1", "--threads", num_threads])
    *said, header, one, five = capsys.readouterr().out.splitlines()
    for name in ("torch", "linear_dense", "int8", "int4"):
        assert name in header
    assert ("widened" in header) == (dtype == "bfloat16")
    assert ("linear_packed" in header) != any("not packed here" in line for line in said)
    num_ways = len(header.replace(" widened", "-widened").split()) - 1
    for line, num_rows in ((one, "1"), (five, "5")):
        assert line.split()[0] == num_rows
        assert len([number for number in line.split()[1:] if float(number) > 0]) == num_ways


def test_without_the_c_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    with pytest.raises(SystemExit, match="no C library"):
        main([])
