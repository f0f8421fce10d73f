"""Engines on tiny random checkpoints, for tests of the whole graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_models import VOCAB_SIZE, save_tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from octavo import Engine


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose 256 tokens are the bytes, with a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
    fast.save_pretrained(folder)


def save_servable(model_type: str, folder: Path, seed: int = 0, **overrides: Any) -> Any:
    """Write checkpoint and tokenizer of a tiny model to `folder`; returns the `transformers` model."""
    model = save_tiny_model(model_type, folder, seed, **overrides)
    save_byte_tokenizer(folder)
    return model


def engine_on(folder: Path, **fields: Any) -> Engine:
    """An engine in float32 with a small pool, unless `fields` say otherwise."""
    return Engine(
        str(folder),
        **{"dtype": "float32", "num_blocks": 256, "block_size": 4, "max_model_len": 128, "num_threads": 1, **fields},
    )
