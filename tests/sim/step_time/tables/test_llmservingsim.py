from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_time_tools import H100, TINY, assert_run_equals_steps, decode_shapes, write_csv, write_llmservingsim

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.tables.read_tables import read_tables
from octavo.sim.step_time.tables.table_model import TableModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TableModel:
    folder = tmp_path_factory.mktemp("llmservingsim")
    write_llmservingsim(folder)
    return read_tables(folder, model=TINY, gpu=H100, host=HostOverhead(0, 0))


def dense_us(num_tokens: int) -> float:
    return 2 + 0.2 * num_tokens + 2 * (2 * 2 + 48 + 8 * 0.1 * num_tokens)


def sample_us(num_rows: int) -> float:
    return 37 + 0.4 * num_rows


def prefill_us(num_new: int, num_history: float) -> float:
    return 8 + 0.01 * num_new + 0.0001 * num_new * (num_history + num_new / 2)


def test_decodes_add_up_from_the_tables(model: TableModel) -> None:
    shape = StepShape(4, 4 * 256, 256, (), 4)
    assert model.step_ns(shape) == pytest.approx(1000 * (dense_us(4) + sample_us(4) + 2 * (8 + 0.001 * 4 * 256)), abs=1)


def test_a_prompt_adds_up_from_the_tables(model: TableModel) -> None:
    shape = StepShape(0, 0, 0, ((16, 64),), 1)
    expected = dense_us(16) + sample_us(1) + 2 * prefill_us(16, 64)
    assert model.step_ns(shape) == pytest.approx(1000 * expected, abs=1)


def test_a_mixed_batch_uses_what_was_measured_of_both_together(model: TableModel) -> None:
    shape = StepShape(4, 4 * 256, 256, ((16, 64),), 5)
    attention = prefill_us(16, 64) + 0.002 * 4 * 256
    assert model.step_ns(shape) == pytest.approx(1000 * (dense_us(20) + sample_us(5) + 2 * attention), abs=1)


def test_several_prompts_count_as_one_with_as_many_pairs(model: TableModel) -> None:
    two = model.step_ns(StepShape(0, 0, 0, ((8, 64), (8, 64)), 0))
    # 16 new tokens, 2 * (8 * 64 + 32) pairs: one chunk of 16 with a history of 60
    assert two == model.step_ns(StepShape(0, 0, 0, ((16, 60),), 0))
    # Two fresh prompts have fewer pairs than one chunk of both: no history at all.
    assert model.step_ns(StepShape(0, 0, 0, ((8, 0), (8, 0)), 0)) == model.step_ns(StepShape(0, 0, 0, ((16, 0),), 0))


@given(decode_shapes(max_rows=20, max_len=1500), st.integers(0, 60))
def test_a_run_of_decodes_equals_its_steps_bit_for_bit(model: TableModel, shape: StepShape, num_steps: int) -> None:
    assert_run_equals_steps(model, shape, num_steps)


@pytest.mark.parametrize(
    ("shape", "num_outside"),
    [
        (StepShape(16, 1600, 1024, (), 16), 0),
        (StepShape(17, 1600, 1024, (), 16), 1),
        (StepShape(16, 1600, 1025, (), 16), 1),
        (StepShape(0, 0, 0, ((64, 1024),), 1), 0),
        (StepShape(0, 0, 0, ((65, 0),), 1), 1),
        (StepShape(0, 0, 0, ((8, 1025),), 1), 1),
        (StepShape(4, 40, 10, ((8, 1025),), 1), 1),
        (StepShape(4, 40, 10, ((8, 5),), 1), 0),
        (StepShape(4, 40, 10, (), 17), 1),
    ],
)
def test_what_lies_outside_the_tables_counts_as_extrapolated(
    model: TableModel, shape: StepShape, num_outside: int
) -> None:
    assert model.num_extrapolated(shape, 1) == num_outside


def test_outside_the_tables_it_goes_on_instead_of_failing(model: TableModel) -> None:
    steps = [model.step_ns(StepShape(n, n * kv, kv, (), n)) for n, kv in ((16, 1024), (32, 1024), (32, 4096))]
    assert steps == sorted(set(steps))
    assert model.step_ns(StepShape(0, 0, 0, ((5000, 9000),), 1)) > model.step_ns(StepShape(0, 0, 0, ((64, 1024),), 1))


def test_a_table_without_mixed_batches_adds_both(tmp_path: Path) -> None:
    write_llmservingsim(tmp_path)
    write_csv(
        tmp_path / "attention.csv.gz",
        "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us",
        ["0,0,1,16,10", "0,0,16,16,100", "16,0,0,0,1000"],
    )
    model = read_tables(tmp_path, model=TINY, gpu=H100)
    mixed = model.step_ns(StepShape(16, 256, 16, ((16, 0),), 16))
    assert mixed == pytest.approx(1000 * (dense_us(32) + sample_us(16) + 2 * 1100), abs=1)


@pytest.mark.parametrize(
    ("name", "header", "rows", "message"),
    [
        ("dense.csv", "layer,tokens,time_us", ["qkv_proj,1,1"], "layer embedding, final_layernorm is missing"),
        ("dense.csv", "layer,tokens,time", ["qkv_proj,1,1"], "column time_us is missing"),
        ("per_sequence.csv", "layer,sequences,time_us", ["lm_head,1,1"], "layer sampler is missing"),
        (
            "attention.csv.gz",
            "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us",
            ["0,0,1,16,3"],
            "needs rows of decodes alone and of prefill alone",
        ),
    ],
)
def test_an_incomplete_table_is_refused(tmp_path: Path, name: str, header: str, rows: list[str], message: str) -> None:
    write_llmservingsim(tmp_path)
    write_csv(tmp_path / name, header, rows)
    with pytest.raises(InvalidConfigError, match=message):
        read_tables(tmp_path, model=TINY, gpu=H100)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    write_llmservingsim(tmp_path)
    (tmp_path / "per_sequence.csv").unlink()
    with pytest.raises(InvalidConfigError, match=r"per_sequence\.csv is missing"):
        read_tables(tmp_path, model=TINY, gpu=H100)
