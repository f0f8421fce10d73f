"""A tokenizer of which tokenizer.json and a few names say everything, loaded without importing `transformers`.

That import is a second of a server's start. Whatever is not known to be plain is left to `transformers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from .chat_template import ChatTemplate

_CLASSES: Final = ("PreTrainedTokenizerFast", "TokenizersBackend")
_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WITHOUT_EFFECT: Final = ("tokenizer_class", "clean_up_tokenization_spaces", "model_max_length", "model_input_names")
_OTHER_FILES: Final = (
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json", "additional_chat_templates"),
    *("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
)
_MAX_VOCAB: Final = 100_000  # above it `transformers` looks for tokenizers with a certain mistake, and mends them

# Parameters of `PreTrainedTokenizerBase.apply_chat_template`, none of which is a variable of a template.
RESERVED_KWARGS: Final = frozenset(
    {
        *("conversation", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("tokenizer_kwargs", "sanitize_control_tokens"),
    }
)


class PlainTokenizer:
    """What `HFTokenizer` asks of a `transformers` tokenizer, by the same names.

    Args:
        backend: of tokenizer.json.
        special_tokens: by name (`eos_token`), in the order of `transformers`.
        extra_special_tokens: further ones without a name.
        chat_template: jinja, or None.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: dict[str, str],
        extra_special_tokens: list[str],
        chat_template: str | None,
    ) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.special_tokens_map = special_tokens
        tokens = dict.fromkeys([*special_tokens.values(), *extra_special_tokens])
        ids = (backend.token_to_id(token) for token in tokens)
        self.all_special_ids: list[int] = [token_id for token_id in ids if token_id is not None]
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self._compiled: ChatTemplate | None = None

    def _id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_chat_template(self) -> str:
        if self.chat_template is None:
            raise ValueError("there is no chat template")
        return self.chat_template

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as text; errors as `ChatTemplate.render`."""
        assert not tokenize, "texts only"
        text = self.get_chat_template()
        if self._compiled is None or self._compiled.text != text:
            self._compiled = ChatTemplate(text)
        return self._compiled.render(
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            variables={**self.special_tokens_map, **kwargs},
        )


def load_plain_tokenizer(folder: Path, tokenizer_config: dict[str, Any]) -> PlainTokenizer | None:
    """The tokenizer in `folder`, or None if it takes `transformers` to say what it is.

    Args:
        tokenizer_config: what tokenizer_config.json says.

    Raises:
        Exception: the library cannot read tokenizer.json.
    """
    fields = {name: value for name, value in tokenizer_config.items() if name not in _WITHOUT_EFFECT}
    extra = fields.pop("additional_special_tokens", None) or []
    named = {name: fields.pop(name) for name in _NAMED if fields.get(name) is not None}
    if (
        tokenizer_config.get("tokenizer_class") not in _CLASSES
        or any(value is not None for value in fields.values())
        or not _are_texts([*named.values(), *(extra if isinstance(extra, list) else [extra])])
        or not (folder / "tokenizer.json").is_file()
        or any((folder / name).exists() for name in _OTHER_FILES)
    ):
        return None
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if not added.issuperset([*named.values(), *extra]) or backend.get_vocab_size() > _MAX_VOCAB:
        return None
    template = folder / "chat_template.jinja"
    return PlainTokenizer(backend, named, extra, template.read_text(encoding="utf-8") if template.is_file() else None)


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
