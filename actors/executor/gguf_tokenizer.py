"""The tokenizer in a GGUF file, for the tokenizer actor: of the actors the executor alone may ask `models`."""

from __future__ import annotations

from pathlib import Path

from ...messages.errors import UnsupportedModelError
from ...models.errors import ModelLoadError
from ...models.gguf.reader import is_gguf
from ...models.gguf.tokenizer import TokenizerFiles, read_tokenizer

__all__ = ["TokenizerFiles", "is_gguf", "read_gguf_tokenizer"]


def read_gguf_tokenizer(path: Path) -> TokenizerFiles:
    """What the file says of its tokenizer.

    Raises:
        UnsupportedModelError: it is not whole, or of a kind that is not known.
    """
    try:
        return read_tokenizer(path)
    except ModelLoadError as error:
        raise UnsupportedModelError(str(error)) from error
