from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runner import run_paged
from safetensors.torch import load_file
from tiny_models import random_token_ids, reference_logits
from transformers import AutoConfig, AutoModelForCausalLM

from octavo.models import make_checkpoint as module
from octavo.models.llama import LlamaForCausalLM
from octavo.models.make_checkpoint import PRESETS, main, make_checkpoint
from octavo.models.registry import load_model

SMALL: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}


@pytest.mark.parametrize("like", PRESETS)
def test_a_made_checkpoint_is_whole_for_transformers_and_natively(like: str, tmp_path: Path) -> None:
    make_checkpoint(like, tmp_path, dtype=torch.float32, num_layers=2, tokenizer=None, **SMALL)
    reference, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model = load_model(tmp_path, dtype="float32", model_impl="native")
    assert isinstance(model, LlamaForCausalLM)
    token_ids = random_token_ids(9)
    torch.testing.assert_close(
        run_paged(model, token_ids), reference_logits(reference.eval(), token_ids), atol=1e-4, rtol=1e-4
    )


def test_the_same_seed_makes_the_same_weights_in_one_file_or_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        make_checkpoint("qwen3-0.6b", tmp_path / name, seed=seed, num_layers=2, tokenizer=None, **SMALL)
    monkeypatch.setattr(module, "_MAX_SHARD_BYTES", 4096)
    make_checkpoint("qwen3-0.6b", tmp_path / "many", seed=0, num_layers=2, tokenizer=None, **SMALL)
    one = load_file(tmp_path / "one" / "model.safetensors")
    other = load_file(tmp_path / "other" / "model.safetensors")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    many = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert len(shards) > 2
    assert one.keys() == many.keys() == other.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])
    load_model(tmp_path / "many", model_impl="native")


def test_the_tokenizer_and_its_special_ids_come_along(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 0]}')
    make_checkpoint("qwen3-0.6b", out, num_layers=1, tokenizer=source, **SMALL)
    assert (out / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert (out / "chat_template.jinja").is_file()
    config = AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (0, [1, 0], 256)


def test_a_tokenizer_that_is_absent_or_too_large_is_an_error_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--like", "qwen3-0.6b", "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]
    assert main(command) == 1
    assert "has no tokenizer.json" in capsys.readouterr().err
    vocabulary = ", ".join(f'"{index}": {index}' for index in range(300))
    (tmp_path / "tokenizer.json").write_text(f'{{"model": {{"vocab": {{{vocabulary}}}}}}}')
    with pytest.raises(ValueError, match="300 tokens, the model only 256"):
        make_checkpoint("qwen3-0.6b", tmp_path / "out", num_layers=1, tokenizer=tmp_path, **SMALL)
