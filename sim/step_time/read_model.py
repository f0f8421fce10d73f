"""A step-time model from what lies on disk: a fitted profile, or a folder of measured tables."""

from __future__ import annotations

from pathlib import Path

from ...messages.errors import InvalidConfigError
from .gpus import GpuSpec
from .host_overhead import HostOverhead
from .interface import StepTimeModel
from .model_shape import ModelShape


def read_step_time_model(
    path: Path, *, model: ModelShape, gpu: GpuSpec, tp: int = 1, host: HostOverhead | None = None
) -> StepTimeModel:
    """Read a profile file, or tables in a format that is told from the files' names and columns.

    Args:
        path: a JSON profile that `fitted.save_profile` wrote, or a folder with Vidur's, AIConfigurator's or
            LLMServingSim's tables.
        model, gpu, tp: what to take from tables that hold several, and to work out what they lack.
        host: overrides the profile's.

    Raises:
        InvalidConfigError: nothing of that kind is there, or it is malformed.
    """
    if path.is_dir():
        from .tables.read_tables import read_tables

        return read_tables(path, model=model, gpu=gpu, tp=tp, host=host)
    if path.is_file():
        from .fitted import FittedModel, load_profile

        return FittedModel(load_profile(path), host=host)
    raise InvalidConfigError(
        f"there is no profile {path}: give a profile's file or a folder of tables", field="profile"
    )
