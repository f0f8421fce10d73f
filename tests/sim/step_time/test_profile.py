import json
from pathlib import Path

import pytest
from sim_step_samples import draw_samples

from octavo.messages.errors import InvalidConfigError
from octavo.sim.step_time.fit_profile import fit
from octavo.sim.step_time.profile import Profile, load_profile, save_profile


@pytest.fixture(scope="module")
def profile() -> Profile:
    return fit(draw_samples(1, 100), {"model": "tiny", "seconds": 90, "share": 0.5})


def test_a_profile_is_read_back_as_it_was(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    save_profile(profile, file)
    assert load_profile(file) == profile
    assert json.loads(file.read_text())["version"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"format": None}, "its format is None"),
        ({"version": 2}, "version 2, but version 1"),
        ({"knots": [8, 4]}, "knots"),
        ({"slopes": []}, "slopes"),
        ({"coefficients": {}}, "its coefficients are"),
        ({"extra": 1}, "extra"),
        ({"num_samples": "many"}, "num_samples"),
        ({"host": {"step_ns": -1}}, "step_ns=-1"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused(profile: Profile, tmp_path: Path, changes: dict, message: str) -> None:
    file = tmp_path / "p.json"
    save_profile(profile, file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InvalidConfigError, match=message) as caught:
        load_profile(file)
    assert str(file) in str(caught.value)


def test_a_negative_coefficient_is_refused(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    save_profile(profile, file)
    content = json.loads(file.read_text())
    content["coefficients"]["constant"] = -1.0
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidConfigError, match="negative or too large"):
        load_profile(file)


@pytest.mark.parametrize("content", [b"", b"[]", b"hello", b"\xff\xfe", b'{"format": '])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(content)
    with pytest.raises(InvalidConfigError, match="is no step-time profile"):
        load_profile(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigError, match=r"absent\.json cannot be read"):
        load_profile(tmp_path / "absent.json")
