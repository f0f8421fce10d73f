"""How the texts of a byte-pair vocabulary are cut before merging, by `tokenizer.ggml.pre`.

The expressions are those of the models' own tokenizer.json. The names are those that `get_vocab_base_pre` in
`convert_hf_to_gguf.py` writes and `llama_vocab::impl::load` in src/llama-vocab.cpp of ggml-org/llama.cpp reads; from
there also which of them take a whole word before merging, and which begin a text with its first token unless told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2: Final = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text is cut.

    Attributes:
        patterns: each cuts the pieces that those before it have left.
        normal_form: of Unicode, to which a text is brought first; empty for none.
        takes_whole_words: a piece that is in the vocabulary is one token, whatever merges would give.
        adds_bos: whether a text begins with its first token where the file does not say.
    """

    patterns: tuple[str, ...]
    normal_form: str = ""
    takes_whole_words: bool = False
    adds_bos: bool = False


_OF_LLAMA3: Final = PreTokenizer((_LLAMA3,), takes_whole_words=True, adds_bos=True)
_OF_QWEN2: Final = PreTokenizer((_QWEN2,), normal_form="NFC")
_OF_GPT2: Final = PreTokenizer((_GPT2,))
_OF_DIGITS: Final = PreTokenizer((r"\p{N}", _GPT2))

PRE_TOKENIZERS: Final = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _OF_GPT2,
    "phi-2": _OF_GPT2,
    "mpt": _OF_GPT2,
    "olmo": _OF_GPT2,
    "llama3": _OF_LLAMA3,
    "llama-v3": _OF_LLAMA3,
    "llama-bpe": _OF_LLAMA3,
    "falcon3": _OF_LLAMA3,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2": _OF_QWEN2,
    "deepseek-r1-qwen": _OF_QWEN2,
    "smollm": _OF_DIGITS,
    "starcoder": _OF_DIGITS,
    "refact": _OF_DIGITS,
    "codeshell": _OF_DIGITS,
    "tekken": PreTokenizer((_TEKKEN,), takes_whole_words=True, adds_bos=True),
}
