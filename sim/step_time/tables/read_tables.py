"""Which project's tables lie in a folder, and the model made of them."""

from __future__ import annotations

from pathlib import Path

from ....messages.errors import InvalidConfigError
from ..gpus import GpuSpec, gpu_in
from ..host_overhead import HostOverhead
from ..model_shape import ModelShape
from ..roofline import RooflineModel
from .aiconfigurator import is_aiconfigurator, of_gpu, read_aiconfigurator
from .llmservingsim import is_llmservingsim, read_llmservingsim
from .table_files import find_tables
from .table_model import TableModel
from .vidur import is_vidur, read_vidur


def read_tables(
    folder: Path, *, model: ModelShape, gpu: GpuSpec, tp: int = 1, host: HostOverhead | None = None
) -> TableModel:
    """Read the tables of a folder, whichever project's they are, told from their names and columns.

    Vidur's layers go before AIConfigurator's products where both are there for the GPU.

    Args:
        folder: with `.csv` or `.csv.gz` files.
        model: LLMServingSim's tables are of one model, and it must be this one; Vidur's say which; AIConfigurator's
            serve any.
        gpu: whose tables to take where there are several's; works out what the tables lack.

    Raises:
        InvalidConfigError: no format is recognised, none is of this GPU or model, or a table is malformed.
        UnsupportedModelError: the tables lack kernels that the model needs.
    """
    tables = find_tables(folder)
    closed_form = RooflineModel(model, gpu, tp=tp)
    if is_llmservingsim(tables):
        return TableModel(read_llmservingsim(tables, closed_form), host)
    if is_vidur(tables) or is_aiconfigurator(tables):
        ours = of_gpu(tables, gpu.name)
        if not ours:
            found = sorted({other.name for name in tables if (other := gpu_in(name)) is not None})
            raise InvalidConfigError(
                f"{folder} holds no tables of {gpu.name}; there: {', '.join(found) or 'files that name no GPU'}",
                field="gpu",
            )
        parts = read_vidur(ours, closed_form) if is_vidur(ours) else read_aiconfigurator(ours, closed_form)
        return TableModel(parts, host)
    raise InvalidConfigError(
        f"{folder} holds no tables that are known: LLMServingSim's dense, per_sequence and attention; Vidur's "
        f"<gpu>_<model>_mlp; AIConfigurator's <gpu>_gemm_<dtype> (each .csv or .csv.gz). "
        f"There: {', '.join(tables) or 'no CSV file'}",
        field="profile",
    )
