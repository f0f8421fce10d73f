from pathlib import Path

import pytest
from sim_step_samples import draw_samples
from step_time_tools import H100, TINY, write_llmservingsim

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.fitted import FittedModel, fit, save_profile
from octavo.sim.step_time.host_overhead import HostOverhead
from octavo.sim.step_time.interface import StepShape
from octavo.sim.step_time.read_model import read_step_time_model
from octavo.sim.step_time.tables.table_model import TableModel


def test_a_file_is_a_profile_and_a_folder_holds_tables(tmp_path: Path) -> None:
    host = HostOverhead(3, 0)
    save_profile(fit(draw_samples(1, 60), {}), tmp_path / "p.json")
    fitted = read_step_time_model(tmp_path / "p.json", model=TINY, gpu=H100, host=host)
    assert isinstance(fitted, FittedModel)
    folder = tmp_path / "tables"
    folder.mkdir()
    write_llmservingsim(folder)
    tables = read_step_time_model(folder, model=TINY, gpu=H100, host=host)
    assert isinstance(tables, TableModel)
    shape = StepShape(1, 1, 1, (), 1)
    assert fitted.host_ns(shape) == tables.host_ns(shape) == 3


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="there is no profile"):
        read_step_time_model(tmp_path / "absent", model=TINY, gpu=H100)
