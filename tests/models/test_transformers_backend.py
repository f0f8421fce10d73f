"""Any decoder of transformers, served from paged KV, gives the tokens that transformers.generate gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from paged_runner import PagedRunner, assert_greedy_tokens_agree, run_paged
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES, TinyArchitecture
from tiny_models import (
    build_tiny_model,
    greedy_reference,
    random_token_ids,
    reference_logits,
    save_tiny_model,
    tiny_config,
)
from transformers import AutoConfig, PretrainedConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.utils import logging as transformers_logging

from octavo.models.errors import ModelLoadError
from octavo.models.transformers_attention import UnsupportedAttentionError, sliding_window_of
from octavo.models.transformers_backend import TransformersCausalLM, load_transformers_model, page_model

NUM_NEW_TOKENS = 16  # from 21 tokens on, past four more blocks, every window and the next chunk of attention
BLOCK_SIZE = 4
PROMPTS = [random_token_ids(21, seed=1), random_token_ids(9, seed=2), random_token_ids(13, seed=3)]


class Runner(PagedRunner):
    """A `PagedRunner` whose rows may begin with blocks of another row."""

    def share(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target` begin with the first `num_tokens` of `source`, in the same blocks."""
        num_blocks = num_tokens // self.block_size
        assert num_blocks * self.block_size == num_tokens <= self._lengths[source]
        self._blocks[target][:num_blocks] = self._blocks[source][:num_blocks]
        self._lengths[target] = num_tokens


def load(folder: Path, **options: Any) -> TransformersCausalLM:
    options = {"dtype": torch.float32, "trust_remote_code": False, "device": torch.device("cpu"), **options}
    if "config" not in options:
        options["config"] = AutoConfig.from_pretrained(folder)
    model = load_transformers_model(str(folder), **options)
    assert isinstance(model, TransformersCausalLM)
    return model


def runner_of(model: TransformersCausalLM, num_rows: int) -> Runner:
    return Runner(model, num_rows=num_rows, max_len=64, block_size=BLOCK_SIZE)


def decode(runner: Runner, logits: dict[int, torch.Tensor], prompts: dict[int, list[int]]) -> dict[int, list[int]]:
    """Greedy decode of all rows together, from the logits of their prompts' last tokens to `NUM_NEW_TOKENS`."""
    tokens = {row: [*prompt, int(logits[row][-1].argmax())] for row, prompt in prompts.items()}
    while True:
        open_rows = {row: [t[-1]] for row, t in tokens.items() if len(t) < len(prompts[row]) + NUM_NEW_TOKENS}
        if not open_rows:
            return tokens
        for row, row_logits in runner.step(open_rows).items():
            tokens[row].append(int(row_logits[-1].argmax()))


def generate_alone(model: TransformersCausalLM, prompt: list[int]) -> list[int]:
    runner = runner_of(model, 1)
    return decode(runner, runner.step({0: prompt}), {0: prompt})[0]


def generate_in_chunks(model: TransformersCausalLM, prompt: list[int], chunk: int) -> list[int]:
    runner, logits = runner_of(model, 1), {}
    for start in range(0, len(prompt), chunk):
        logits = runner.step({0: prompt[start : start + chunk]})
    return decode(runner, logits, {0: prompt})[0]


def generate_batched(model: TransformersCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """All together and out of step: the last prompt is prefilled while the others decode already."""
    runner = runner_of(model, len(prompts))
    late = len(prompts) - 1
    logits = runner.step({row: prompts[row] for row in range(late)})
    started = {row: [*prompts[row], int(logits[row][-1].argmax())] for row in range(late)}
    logits = runner.step({late: prompts[late], **{row: [tokens[-1]] for row, tokens in started.items()}})
    out = decode(runner, logits, {**started, late: prompts[late]})
    return [out[row][: len(prompt) + NUM_NEW_TOKENS] for row, prompt in enumerate(prompts)]


def generate_after_prefix_hit(model: TransformersCausalLM, prompt: list[int], others_end: list[int]) -> list[list[int]]:
    """Row 0 computes the prompt; row 1 reuses its first 16 tokens, row 2 too but goes on otherwise."""
    runner = runner_of(model, 3)
    other = prompt[:16] + others_end
    logits = runner.step({0: prompt})
    for row in (1, 2):
        runner.share(0, row, 16)
    logits |= runner.step({1: prompt[16:], 2: other[16:]})
    out = decode(runner, logits, {0: prompt, 1: prompt, 2: other})
    return [out[row] for row in range(3)]


class Oracle:
    """What transformers.generate says, asked once for each prompt."""

    def __init__(self, reference: Any) -> None:
        self._reference = reference
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def check(self, tokens: list[int], prompt: list[int]) -> None:
        """Equal to `generate`, but for ties: then each token must be best, or nearly, by the reference's logits."""
        assert tokens[: len(prompt)] == prompt
        assert len(tokens) == len(prompt) + NUM_NEW_TOKENS
        key = tuple(prompt)
        if key not in self._answers:
            self._answers[key] = greedy_reference(self._reference, prompt, NUM_NEW_TOKENS)
        if tokens[len(prompt) :] != self._answers[key]:
            assert_greedy_tokens_agree(reference_logits(self._reference, tokens), tokens, len(prompt))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
def test_greedy_tokens_are_those_of_generate_alone_batched_chunked_and_after_a_prefix_hit(
    architecture: TinyArchitecture, tmp_path: Path
) -> None:
    reference = save_tiny_model(architecture.model_type, tmp_path, **architecture.overrides)
    model = load(tmp_path)

    assert model.attention == architecture.attention
    num_layers = reference.config.num_hidden_layers
    if architecture.model_type != "diffllama":  # calls attention twice a layer
        assert len(model.kv_cache_specs) == (architecture.num_caches or num_layers)

    oracle, prompt = Oracle(reference), PROMPTS[0]
    alone = generate_alone(model, prompt)
    assert len(set(alone[len(prompt) :])) >= 3, "a model that repeats itself proves nothing"
    oracle.check(alone, prompt)
    oracle.check(generate_in_chunks(model, prompt, 5), prompt)
    for tokens, batched_prompt in zip(generate_batched(model, PROMPTS), PROMPTS, strict=True):
        oracle.check(tokens, batched_prompt)
    first, hit, other = generate_after_prefix_hit(model, prompt, PROMPTS[1])
    oracle.check(first, prompt)
    oracle.check(hit, prompt)
    oracle.check(other, prompt[:16] + PROMPTS[1])


def test_the_matrix_has_the_windows_and_the_breadth_that_it_claims() -> None:
    assert len({architecture.model_type for architecture in ARCHITECTURES}) >= 60
    for architecture in ARCHITECTURES:
        if architecture.window:
            config = tiny_config(architecture.model_type, **architecture.overrides)
            assert config.sliding_window == architecture.window < min(len(prompt) for prompt in PROMPTS)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "deepseek_v3", "bloom", "gptj"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near_float32(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = save_tiny_model(model_type, tmp_path, initializer_range=0.05)
    model = load(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    logits = run_paged(model, PROMPTS[0], chunks=[5, 5, 5], block_size=BLOCK_SIZE)
    assert logits.dtype == torch.float32
    exact = reference_logits(reference, PROMPTS[0])
    assert (logits - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("model_type", ["gemma3_text", "gptj"])
def test_every_block_size_gives_the_same_logits(model_type: str, block_size: int, tmp_path: Path) -> None:
    reference = save_tiny_model(model_type, tmp_path)
    logits = run_paged(load(tmp_path), PROMPTS[0], chunks=[7, 7], block_size=block_size)
    torch.testing.assert_close(logits, reference_logits(reference, PROMPTS[0]), rtol=1e-4, atol=1e-4)


def test_two_models_in_one_process_do_not_meet() -> None:
    references = [build_tiny_model("llama", seed=seed) for seed in (1, 2)]
    exact = [reference_logits(reference, PROMPTS[0]) for reference in references]
    runners = [runner_of(page(reference), 1) for reference in references]
    for start in range(0, 21, 7):
        for runner, logits in zip(runners, exact, strict=True):
            got = runner.step({0: PROMPTS[0][start : start + 7]})[0]
            torch.testing.assert_close(got, logits[start : start + 7], rtol=1e-4, atol=1e-4)


def test_layers_that_share_keys_and_values_share_their_blocks() -> None:
    shared = next(architecture for architecture in ARCHITECTURES if architecture.name == "gemma4_text")
    model = page(build_tiny_model(shared.model_type, **shared.overrides))
    # Two of the six layers bring none of their own; full attention's heads are wider.
    assert [spec.k_head_dim for spec in model.kv_cache_specs] == [16, 32, 16, 32]


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 64,
    "factor": 8.0,
}


def test_longrope_keeps_to_the_short_frequencies_where_they_are_exact(tmp_path: Path) -> None:
    reference = save_tiny_model("phi3", tmp_path, rope_parameters=LONGROPE, original_max_position_embeddings=64)
    model = load(tmp_path)
    assert model.max_position == 64
    logits = run_paged(model, PROMPTS[0], chunks=[5, 5])
    torch.testing.assert_close(logits, reference_logits(reference, PROMPTS[0]), rtol=1e-4, atol=1e-4)


def test_longrope_takes_the_long_frequencies_at_every_length_when_long_contexts_are_asked_for(tmp_path: Path) -> None:
    reference = save_tiny_model("phi3", tmp_path, rope_parameters=LONGROPE, original_max_position_embeddings=64)
    model = load(tmp_path, max_model_len=512)
    assert model.max_position == 512
    prompt = random_token_ids(100, seed=4)
    # The first chunk is short, yet its keys must be those of one pass over the long prompt.
    logits = run_paged(model, prompt, chunks=[20, 70])
    torch.testing.assert_close(logits, reference_logits(reference, prompt), rtol=1e-4, atol=1e-4)


def test_dynamic_rope_serves_up_to_where_frequencies_would_change(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    reference = save_tiny_model("llama", tmp_path, rope_parameters=rope)
    model = load(tmp_path)
    assert model.max_position == 64
    logits = run_paged(model, PROMPTS[0], chunks=[5, 5])
    torch.testing.assert_close(logits, reference_logits(reference, PROMPTS[0]), rtol=1e-4, atol=1e-4)


def page(model: Any) -> TransformersCausalLM:
    return page_model(model, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("mamba", {}),
        ("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1}),
        ("falcon_mamba", {}),
        ("rwkv", {}),
        ("jamba", {}),
        ("bamba", {"mamba_n_heads": 8}),
        ("recurrent_gemma", {}),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8}),
        ("nemotron_h", {"layers_block_type": ["mamba", "attention"]}),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"]}),
        ("minimax", {"layer_types": ["linear_attention", "full_attention"]}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_recurrent_state_is_refused_before_any_weight_is_read(
    model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    config = tiny_config(model_type, **overrides)
    with pytest.raises(ModelLoadError, match=f"'{model_type}' keeps recurrent state.*not paged yet"):
        load(tmp_path, config=config)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("t5", "encoder-decoder"),
        ("deepseek_v32", "indexed_attention.*not paged yet"),
        ("clip", "no decoder that generates text"),
    ],
)
def test_what_is_no_decoder_with_paged_kv_is_refused_by_its_config(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        load(tmp_path, config=AutoConfig.for_model(model_type))


@pytest.mark.parametrize(("model_type", "reason"), [("bert", "not causal"), ("openai-gpt", "into its cache")])
def test_a_model_that_fails_the_check_at_load_is_refused_with_what_failed(
    model_type: str, reason: str, tmp_path: Path
) -> None:
    save_tiny_model(model_type, tmp_path)
    with pytest.raises(ModelLoadError, match=f"cannot be served with a paged KV cache.*{reason}"):
        load(tmp_path)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    config = tiny_config("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelLoadError, match=r"quantized \(gptq\)"):
        load(tmp_path, config=config)


def test_pickled_weights_are_refused_with_advice(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin, a pickle.*save them as safetensors"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors files"):
        load(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        load(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    save_tiny_model("qwen2", tmp_path)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight, model\.embed_tokens\.weight are of another shape"):
        load(tmp_path, config=tiny_config("qwen2", vocab_size=300))


def test_code_that_comes_with_a_checkpoint_is_not_run_unless_asked_for(tmp_path: Path) -> None:
    settings = {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "homemade.Config", "AutoModelForCausalLM": "homemade.Model"},
    }
    config = PretrainedConfig(**settings)
    config.model_type = "homemade"
    with pytest.raises(ModelLoadError, match="trust-remote-code"):
        load(tmp_path, config=config)


def test_loading_prints_nothing_and_leaves_the_logging_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model("gpt_neo", tmp_path)
    capfd.readouterr()
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_weights_take_no_gradients(tmp_path: Path) -> None:
    reference = build_tiny_model("llama")
    model = page(reference)
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    hidden = torch.randn(3, 64)
    assert not model.compute_logits(hidden).requires_grad
    assert model.compute_logits(hidden).shape == (3, model.vocab_size)


def test_windows_are_read_off_masks() -> None:
    assert sliding_window_of(causal_mask_function, 512) == 0
    assert sliding_window_of(sliding_window_causal_mask_function(8), 512) == 8
    assert sliding_window_of(sliding_window_causal_mask_function(4096), 512) == 0
    assert sliding_window_of(causal_mask_function, 1) == 0


def test_chunked_and_bidirectional_masks_are_no_windows() -> None:
    with pytest.raises(UnsupportedAttentionError):
        sliding_window_of(chunked_causal_mask_function(100, torch.zeros(1, dtype=torch.long)), 512)
    with pytest.raises(UnsupportedAttentionError):
        sliding_window_of(bidirectional_mask_function, 512)
