"""Presets are the models that they are named after."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.models.checkpoint import DEFAULT_MODEL, SHIPPED
from octavo.models.plain_config import read_plain_config
from octavo.models.registry import load_config, native_class
from octavo.models.shapes import PRESETS, write_config_folder
from octavo.sim.step_time.config_shape import read_shape
from octavo.sim.step_time.known_models import find_model


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_is_a_configuration_that_a_native_model_serves(name: str, tmp_path: Path) -> None:
    write_config_folder(name, tmp_path, tokenizer=SHIPPED / DEFAULT_MODEL)
    config = load_config(tmp_path)
    assert native_class(config) is not None
    assert str(config.dtype) in ("bfloat16", "torch.bfloat16")
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "name", ["qwen3-0.6b", "qwen3-8b", "qwen3-14b", "qwen3-30b-a3b", "llama-3.1-8b", "llama-3.2-1b"]
)
def test_a_preset_has_the_sizes_that_the_simulator_knows(name: str, tmp_path: Path) -> None:
    write_config_folder(name, tmp_path, tokenizer=None)
    ours, known = read_shape(tmp_path), find_model(name)
    assert ours.num_params == known.num_params
    assert ours.kv_bytes_per_token() == known.kv_bytes_per_token()


def test_a_plain_preset_is_read_without_transformers(tmp_path: Path) -> None:
    write_config_folder("qwen3-8b", tmp_path, tokenizer=None)
    config = read_plain_config(tmp_path)
    assert config is not None
    assert (config.hidden_size, config.num_hidden_layers, config.dtype) == (4096, 36, "bfloat16")


def test_fields_can_be_replaced(tmp_path: Path) -> None:
    write_config_folder("qwen3-8b", tmp_path, tokenizer=None, num_hidden_layers=2)
    assert read_shape(tmp_path).num_layers == 2
