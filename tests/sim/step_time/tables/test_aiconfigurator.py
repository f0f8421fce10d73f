from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from step_time_tools import H100, TINY, assert_run_equals_steps, decode_shapes, write_aiconfigurator, write_csv

from octavo.messages.errors import InvalidConfigError, UnsupportedModelError
from octavo.sim.step_time.gpus import find_gpu
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.known_models import find_model
from octavo.sim.step_time.roofline import RooflineModel
from octavo.sim.step_time.tables.aiconfigurator import Products, elementwise_ns
from octavo.sim.step_time.tables.read_tables import read_tables
from octavo.sim.step_time.tables.table_files import find_tables
from octavo.sim.step_time.tables.table_model import TableModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aiconfigurator")
    write_aiconfigurator(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> TableModel:
    return read_tables(folder, model=TINY, gpu=H100)


@pytest.mark.parametrize(("n", "k"), [(64, 64), (100, 300), (512, 32), (1000, 64), (600, 700)])
def test_products_between_and_beyond_the_tables_sizes_are_in_proportion(folder: Path, n: int, k: int) -> None:
    curve = Products(find_tables(folder)["h100_sxm_gemm_bf16"]).curve(n, k)
    for m in (1, 16, 17, 1024):
        assert curve.at(m) == pytest.approx(m * n * k * 1e-3)
    assert curve.xs == [1, 16, 17, 1024]


def test_the_largest_product_that_did_not_fit_is_taken_in_proportion(tmp_path: Path) -> None:
    rows = [f"{m},{n},{k},{m * n * k * 1e-9}" for m in (1, 8) for n in (32, 64) for k in (32, 64) if n * k < 4096]
    write_csv(tmp_path / "h100_gemm_bf16.csv", "m,n,k,latency_ms", rows)
    assert Products(find_tables(tmp_path)["h100_gemm_bf16"]).curve(64, 64).at(8) == pytest.approx(8 * 4096 * 1e-3)


def test_decodes_add_up_from_the_tables(model: TableModel) -> None:
    params = 64 * (4 + 4) * 16 + 64 * 64 + 2 * 128 * 64 + 64 * 128
    per_layer = 16 * params * 1e-3 + elementwise_ns(RooflineModel(TINY, H100), 16) + 1e4 + 16 * 256 * 0.1
    head = 16 * 256 * 64 * 1e-3 + 25_000 + 16 * 500
    assert model.step_ns(StepShape(16, 16 * 256, 256, (), 16)) == pytest.approx(2 * per_layer + 5000 + head, rel=1e-4)


def test_a_prompt_adds_up_from_the_tables(model: TableModel) -> None:
    params = 64 * (4 + 4) * 16 + 64 * 64 + 2 * 128 * 64 + 64 * 128
    attention = 1e4 + 4 * 1024 * 1024 * 1e-3
    per_layer = 1024 * params * 1e-3 + elementwise_ns(RooflineModel(TINY, H100), 1024) + attention
    assert model.step_ns(StepShape(0, 0, 0, ((1024, 0),), 0)) == pytest.approx(2 * per_layer + 5000, rel=1e-4)


@given(decode_shapes(max_rows=100, max_len=6000), st.integers(0, 60))
def test_a_run_of_decodes_equals_its_steps_bit_for_bit(model: TableModel, shape: StepShape, num_steps: int) -> None:
    assert_run_equals_steps(model, shape, num_steps)


def test_tensor_parallelism_divides_products_and_adds_the_measured_all_reduce(folder: Path) -> None:
    two = read_tables(folder, model=TINY, gpu=H100, tp=2)
    assert two.describe()["all_reduce"] == "AIConfigurator"
    reduce_ns = 4000 + 16 * 64 * 1e-2  # of the captured graph: 16 tokens of 64 elements
    params = 64 * (2 + 2) * 16 + 64 * 32 + 2 * 64 * 64 + 64 * 64
    per_layer = 16 * params * 1e-3 + elementwise_ns(RooflineModel(TINY, H100, tp=2), 16) + 2 * reduce_ns
    assert two.parts.dense_ns(16) == pytest.approx(2 * per_layer + 5000)


def test_a_size_without_measured_all_reduces_takes_the_closed_forms(folder: Path) -> None:
    shape = msgspec.structs.replace(TINY, num_heads=8, num_kv_heads=8)
    assert read_tables(folder, model=shape, gpu=H100, tp=8).describe()["all_reduce"] == "closed form"


def test_heads_near_measured_ones_are_taken_in_proportion_and_others_in_closed_form(folder: Path) -> None:
    near = read_tables(folder, model=msgspec.structs.replace(TINY, num_heads=6, hidden_size=96), gpu=H100)
    assert near.describe()["attention"] == "AIConfigurator"
    far = read_tables(folder, model=msgspec.structs.replace(TINY, num_heads=32, hidden_size=512), gpu=H100)
    assert far.describe()["attention"] == "closed form"
    other = read_tables(folder, model=msgspec.structs.replace(TINY, head_dim=64), gpu=H100)
    assert other.describe()["attention"] == "closed form"
    windowed = msgspec.structs.replace(TINY, sliding_window=100, num_sliding_layers=1)
    assert read_tables(folder, model=windowed, gpu=H100).describe()["attention"] == "closed form"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 64), st.integers(1, 4096))
def test_batches_within_the_tables_are_not_extrapolated(model: TableModel, rows: int, kv: int) -> None:
    outside = model.num_extrapolated(StepShape(rows, rows * kv, kv, (), rows), 1)
    # Of the corners (rows, KV), the largest product was not measured.
    bracket = next(b for b in (1, 8, 64) if b >= rows) * next(c for c in (1, 256, 1024, 4096) if c >= kv)
    assert outside == (bracket > 64 * 1024)


def test_what_the_tables_lack_is_said(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="mixtral-8x7b has experts"):
        read_tables(folder, model=find_model("mixtral-8x7b"), gpu=H100)
    with pytest.raises(InvalidConfigError, match="no table of products for fp8 weights on H100-SXM; there: bf16"):
        read_tables(folder, model=TINY.with_dtype("fp8"), gpu=H100)
    with pytest.raises(InvalidConfigError, match="holds no tables of H200-SXM; there: H100-SXM"):
        read_tables(folder, model=TINY, gpu=find_gpu("h200"))


def test_the_gpus_and_precisions_of_one_folder_are_kept_apart(tmp_path: Path) -> None:
    write_aiconfigurator(tmp_path, gpu="h100_sxm")
    write_aiconfigurator(tmp_path, gpu="h200_sxm", dtype="fp8")
    fp8 = TINY.with_dtype("fp8")
    assert read_tables(tmp_path, model=fp8, gpu=find_gpu("h200")).describe()["format"] == "AIConfigurator"
    with pytest.raises(InvalidConfigError, match="no table of products for fp8"):
        read_tables(tmp_path, model=fp8, gpu=H100)
