import json
from pathlib import Path

import pytest

from octavo.messages.errors import ModelNotFoundError
from octavo.sim.step_time.known_models import DEFAULT_MODEL, KNOWN_MODELS, find_model


@pytest.mark.parametrize(
    ("name", "num_params"),
    [  # of the checkpoints on the hub
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_248_023_552),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-72b", 72_706_203_648),
        ("mixtral-8x7b", 46_702_792_704),
        ("mixtral-8x22b", 140_630_071_296),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("qwen3-235b-a22b", 235_093_634_560),
    ],
)
def test_a_known_model_has_the_parameters_of_its_checkpoint(name: str, num_params: int) -> None:
    assert find_model(name).num_params == num_params


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("Qwen/Qwen3-0.6B", "qwen3-0.6b"),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
        (DEFAULT_MODEL, "llama-3.1-8b"),
    ],
)
def test_a_model_is_found_by_its_hub_name(asked: str, name: str) -> None:
    assert find_model(asked).name == name


def test_every_known_model_is_found_by_its_own_name_and_by_that_of_its_checkpoint() -> None:
    assert [find_model(model.name) for model in KNOWN_MODELS] == list(KNOWN_MODELS)
    assert [find_model(model.hub_name) for model in KNOWN_MODELS] == list(KNOWN_MODELS)


def test_a_folder_goes_before_a_known_name(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 9, "intermediate_size": 8}))
    assert find_model(str(tmp_path)).vocab_size == 9


def test_an_unknown_model_is_refused_with_the_nearest_and_all() -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean llama-3\.1-8b\?.*qwen3-8b"):
        find_model("lama-3.1-8b")
