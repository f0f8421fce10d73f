from pathlib import Path

import pytest
from step_time_tools import H100, TINY, write_aiconfigurator, write_csv, write_llmservingsim, write_vidur

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.tables.read_tables import read_tables


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_llmservingsim, "LLMServingSim"), (write_vidur, "Vidur"), (write_aiconfigurator, "AIConfigurator")],
)
def test_the_format_is_told_from_the_files(tmp_path: Path, write, name: str) -> None:
    write(tmp_path)
    assert read_tables(tmp_path, model=TINY, gpu=H100).describe()["format"] == name


def test_a_folder_without_known_tables_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match="no CSV file"):
        read_tables(tmp_path, model=TINY, gpu=H100)
    write_csv(tmp_path / "other.csv", "a", ["1"])
    with pytest.raises(InvalidConfigError, match="There: other"):
        read_tables(tmp_path, model=TINY, gpu=H100)


def test_tables_whose_files_name_no_gpu_are_refused(tmp_path: Path) -> None:
    write_aiconfigurator(tmp_path, gpu="mine")
    with pytest.raises(InvalidConfigError, match="files that name no GPU"):
        read_tables(tmp_path, model=TINY, gpu=H100)
