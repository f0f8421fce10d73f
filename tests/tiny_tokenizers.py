"""Small tokenizers trained on the spot: byte-level BPE, sentencepiece-like with byte fallback, and WordPiece."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from octavo.actors.tokenizer.hf_tokenizer import HFTokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. User: hello! Stop here, please.",
    "नमस्ते दुनिया, कैसे हैं आप? क्षत्रिय",
    "你好，世界！今天天气怎么样？",
    "🎉🎊👩‍👩‍👧‍👦🇫🇷🇩🇪👍🏽 party e\u0301te\u0301 café naïve",
    "def f(x):\n    return x + 1\n\n",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ' is unknown') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ suffix if suffix else '' }}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


@functools.cache
def byte_level_backend() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    # Not spelt in the byte alphabet; spelt in it by chance; neither is special.
    tokenizer.add_tokens([AddedToken("<think> 🤔", normalized=False), AddedToken("Ġtool", normalized=False)])
    return _with_bos(tokenizer)


@functools.cache
def metaspace_backend(strip: bool = True) -> Tokenizer:
    """Shaped as Llama 2's tokenizer.json: metaspace pieces, byte fallback, one space stripped at the beginning."""
    pieces = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("▁The quick brown fox jumps over lazy dog. User: hello! Stop".replace(" ", "")))
    words = ["▁t", "▁th", "▁the", "▁h", "▁he", "▁hel", "▁hell", "▁hello", "▁d", "▁do", "▁dog", "▁▁"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *letters, *words, "t", "d"]))}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "h"), ("▁h", "e"), ("▁he", "l"), ("▁hel", "l")]
    merges += [("▁hell", "o"), ("▁", "d"), ("▁d", "o"), ("▁do", "g"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return _with_bos(tokenizer)


@functools.cache
def wordpiece_backend() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return _with_bos(tokenizer)


def wrap(backend: Tokenizer, *, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


@functools.cache
def byte_level() -> HFTokenizer:
    return HFTokenizer(wrap(byte_level_backend()))


@functools.cache
def metaspace(strip: bool = True) -> HFTokenizer:
    return HFTokenizer(wrap(metaspace_backend(strip)))


@functools.cache
def wordpiece() -> HFTokenizer:
    return HFTokenizer(wrap(wordpiece_backend()))


def save(folder: Path, backend: Tokenizer, *, chat_template: str | None = CHAT_TEMPLATE, **configs: object) -> Path:
    """A checkpoint folder with the tokenizer and the JSON files given by keyword."""
    wrap(backend, chat_template=chat_template).save_pretrained(folder)
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
