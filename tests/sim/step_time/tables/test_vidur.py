from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from step_time_tools import H100, TINY, assert_run_equals_steps, decode_shapes, write_aiconfigurator, write_vidur

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.gpus import find_gpu
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.roofline import RooflineModel
from octavo.sim.step_time.tables.read_tables import read_tables
from octavo.sim.step_time.tables.table_model import TableModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vidur")
    write_vidur(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> TableModel:
    return read_tables(folder, model=TINY, gpu=H100)


def layers_ms(num_tokens: int, tp: int = 1) -> float:
    return 2 * 9 * (0.01 + 0.0001 * num_tokens) / tp + 0.5


def test_a_step_is_the_measured_layers_and_the_closed_forms_rest(model: TableModel) -> None:
    roofline = RooflineModel(TINY, H100)
    shape = StepShape(0, 0, 0, ((256, 0),), 1)
    head = roofline.head_ns(1) + 60_000 + 500
    attention = roofline.prefill_attention_ns(256, 0) + 2 * 4000
    assert model.step_ns(shape) == pytest.approx(layers_ms(256) * 1e6 + head + attention, rel=1e-6)
    assert model.describe()["attention"] == "closed form"


def test_rows_of_the_table_may_come_in_any_order_and_are_linear_between(model: TableModel) -> None:
    assert model.parts.dense_ns(100) == pytest.approx(layers_ms(100) * 1e6)
    assert model.parts.dense_ns(600) == pytest.approx(layers_ms(600) * 1e6)


def test_tensor_parallelism_takes_its_rows_and_the_nodes_all_reduce(folder: Path) -> None:
    two = read_tables(folder, model=TINY, gpu=H100, tp=2)
    reduce_ms = 2 * 2 * (0.02 + 2 * 64 * 64 / 1e8)
    assert two.parts.dense_ns(64) == pytest.approx((layers_ms(64, 2) - 0.5 + 0.5 + reduce_ms) * 1e6, rel=1e-6)
    assert two.describe()["all_reduce"] == "measured"


@given(decode_shapes(max_len=5000), st.integers(0, 60))
def test_a_run_of_decodes_equals_its_steps_bit_for_bit(model: TableModel, shape: StepShape, num_steps: int) -> None:
    assert_run_equals_steps(model, shape, num_steps)


def test_more_tokens_than_measured_count_as_extrapolated(model: TableModel) -> None:
    assert model.num_extrapolated(StepShape(0, 0, 0, ((1024, 0),), 1), 1) == 0
    assert model.num_extrapolated(StepShape(0, 0, 0, ((1025, 0),), 1), 1) == 1


def test_attention_comes_from_aiconfigurator_where_its_tables_lie_beside(tmp_path: Path) -> None:
    write_vidur(tmp_path)
    write_aiconfigurator(tmp_path)
    model = read_tables(tmp_path, model=TINY, gpu=H100)
    assert (model.describe()["format"], model.describe()["attention"]) == ("Vidur", "AIConfigurator")


def test_layers_that_were_not_measured_are_refused_with_what_there_is(folder: Path) -> None:
    other = msgspec.structs.replace(TINY, intermediate_size=192)
    with pytest.raises(InvalidConfigError, match=r"no Vidur profile on H100-SXM has layers like tiny's.*h100_tiny_mlp"):
        read_tables(folder, model=other, gpu=H100)
    with pytest.raises(InvalidConfigError, match="at TP 4"):
        read_tables(folder, model=TINY, gpu=H100, tp=4)
    with pytest.raises(InvalidConfigError, match="holds no tables of A100-80GB"):
        read_tables(folder, model=TINY, gpu=find_gpu("a100"))
