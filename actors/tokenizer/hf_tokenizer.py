"""A checkpoint's own tokenizer: through `tokenizers` where tokenizer.json, or a GGUF file, says all, else through
`transformers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tokenizers import Tokenizer

from ...messages.errors import InvalidRequestError, ModelNotFoundError, UnsupportedModelError
from ...messages.request import ChatPrompt
from ..executor.gguf_tokenizer import is_gguf, read_gguf_tokenizer
from .longest_token import longest_token
from .plain_tokenizer import RESERVED_KWARGS, PlainTokenizer, load_plain_tokenizer
from .token_bytes import OTHER, DecoderKind, LeadingSpace, classify_decoder

# With these classes tokenizer.json is the whole truth, so the class need not be looked up by `AutoTokenizer`, whose
# import brings torch along (measured: 1.0 s without, 3.5 s with it).
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")

_FEW_TOKENS = 1024
_MAX_TOKEN_IDS = 2**31 - 1

_T = TypeVar("_T")


class HFTokenizer:
    """Text to token ids and back, chat templates, and the bytes of each token.

    Nothing is changed after construction, so several threads may use one instance.

    Attributes:
        eos_token_ids: tokens that end an answer: the tokenizer's, then generation_config.json's (or config.json's).
        special_token_ids: tokens that `skip_special_tokens` leaves out of the text.
        added_token_ids: tokens outside the trained vocabulary; special ones and others.
        vocab_size: highest token id + 1.
        model_vocab_size: rows of the model's embedding by config.json, or `vocab_size` where it does not say.
        leading_space: what decoding does to the space at the beginning of a text.
    """

    def __init__(self, tokenizer: Any, *, eos_token_ids: Iterable[int] = (), model_vocab_size: int = 0) -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: `PreTrainedTokenizerBase`, fast or slow; or a `PlainTokenizer`.
            eos_token_ids: end tokens beside the tokenizer's own.
            model_vocab_size: rows of the embedding; 0 if not known.
        """
        self._tokenizer = tokenizer
        self._fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._kind: DecoderKind = OTHER
        if self._fast is not None:
            # A tokenizer.json may bring both; a prompt must be neither cut nor padded.
            self._fast.no_truncation()
            self._fast.no_padding()
            decoder = self._fast.decoder
            if decoder is not None:
                self._kind = classify_decoder(decoder.__getstate__())
        added = tokenizer.added_tokens_decoder
        self.added_token_ids: frozenset[int] = frozenset(added)
        self.special_token_ids: frozenset[int] = frozenset(tokenizer.all_special_ids) | frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        own = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *eos_token_ids]))
        self.vocab_size: int = max(len(tokenizer), max(added, default=-1) + 1)
        self.model_vocab_size: int = model_vocab_size or self.vocab_size
        self.leading_space: LeadingSpace = self._kind.leading_space
        self._reserved_kwargs = _reserved_kwargs(tokenizer)

    @property
    def is_bytewise(self) -> bool:
        """Whether a text is the concatenation of its tokens' bytes (but for `leading_space`)."""
        return self._kind.spelling != "other"

    @cached_property
    def max_token_chars(self) -> int | None:
        """Most characters of a text that one token stands for; None where no such bound is known."""
        return None if self._fast is None else longest_token(self._fast)

    @property
    def bos_token_id(self) -> int | None:
        bos: int | None = self._tokenizer.bos_token_id
        return bos

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @cached_property
    def chat_template(self) -> str | None:
        """The template that `render_chat` uses."""
        try:
            template: str = self._tokenizer.get_chat_template()
        except ValueError:
            return None
        return template

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it count as such.

        Raises:
            InvalidRequestError: the text has a surrogate without its partner, which no tokenizer can take.
        """
        try:
            if self._fast is not None:
                # A batch of one: `encode` keeps the interpreter's lock, and a text of megabytes every stream waiting,
                # for seconds. Without offsets it is also done in a quarter of the time.
                batch = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
                ids: list[int] = batch[0].ids
            else:
                text.encode()
                ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequestError(
                "the prompt is not valid Unicode: it has a surrogate (U+D800 to U+DFFF) without its partner",
                param="prompt",
            ) from error
        return ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids outside the vocabulary have none. Spaces are not cleaned up."""
        if self._fast is not None:
            ids = list(token_ids)
            if len(ids) > _FEW_TOKENS:  # a batch is decoded without the interpreter's lock
                return str(self._fast.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])
            text: str = self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            text = self._tokenizer.decode(
                [token_id for token_id in token_ids if token_id < self.vocab_size],
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to a text, a part of a character perhaps; empty outside the vocabulary.

        Where the tokenizer is not bytewise, the bytes of `token_text`.
        """
        if not self.is_bytewise:
            return self.decode([token_id], False).encode()
        token: str | None = self._fast.id_to_token(token_id)
        return b"" if token is None else self._kind.token_bytes(token)

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, for logprobs; part of a character shows as U+FFFD."""
        if self.is_bytewise:
            return self.token_bytes(token_id).decode(errors="replace")
        return self.decode([token_id], False)

    def render_chat(self, prompt: ChatPrompt) -> str:
        """The conversation as text, by the chat template; encode it with `add_special_tokens=False`.

        Raises:
            InvalidRequestError: there is no template, the messages or variables are malformed, or the template
                refuses them (`raise_exception`) or fails on them.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions, or start the server with --chat-template FILE",
                param="messages",
            )
        messages = _decode_json(prompt.messages_json, list, "messages")
        variables = _decode_json(prompt.template_kwargs_json, dict, "chat_template_kwargs")
        if reserved := sorted(self._reserved_kwargs & variables.keys()):
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {', '.join(reserved)}: only variables that the template reads",
                param="chat_template_kwargs",
            )
        if prompt.add_generation_prompt and prompt.continue_final_message:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other: set one of them to false",
                param="continue_final_message",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                **variables,
            )
        except Exception as error:  # a template is a program: on a client's messages it may raise anything
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"the model's chat template does not accept these messages: {reason}", param="messages"
            ) from error
        assert isinstance(text, str)
        return text


def _reserved_kwargs(tokenizer: Any) -> frozenset[str]:
    """Names that are not a template's variables, though `apply_chat_template` takes them."""
    if isinstance(tokenizer, PlainTokenizer):
        return RESERVED_KWARGS
    return frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents", "kwargs"}


def _decode_json(data: bytes, kind: type[_T], param: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{param}: {error}", param=param) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{path} is not a JSON object: {error}; download the checkpoint again") from error


def _token_ids(value: object) -> list[int]:
    """`eos_token_id` of a config: absent, a number, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if type(token_id) is int and 0 <= token_id < _MAX_TOKEN_IDS]


def _read_template(chat_template: str) -> str:
    """A template given by path, or by itself: text with a brace or a line end is no path."""
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise InvalidRequestError(f"--chat-template {chat_template}: no such file", param="chat_template")
    return path.read_text(encoding="utf-8")


def _compile_template(tokenizer: Any, *, given: bool) -> None:
    """Compile the template now rather than on the first request, and refuse one that the operator misspelt."""
    if not tokenizer.chat_template:
        return
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except TemplateSyntaxError as error:
        if given:
            raise InvalidRequestError(
                f"--chat-template is not valid jinja, line {error.lineno}: {error.message}", param="chat_template"
            ) from error
    except Exception:  # noqa: S110  a template may refuse this conversation; it has been compiled all the same
        pass


def _set_template(tokenizer: Any, chat_template: str | None) -> None:
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    _compile_template(tokenizer, given=chat_template is not None)


def _load_gguf(path: Path, chat_template: str | None, eos_token_ids: list[int]) -> HFTokenizer:
    files = read_gguf_tokenizer(path)
    try:
        backend = Tokenizer.from_str(msgspec.json.encode(files.tokenizer_json).decode())
    except Exception as error:  # the library's own class, for a vocabulary that does not hold together
        raise UnsupportedModelError(
            f"no tokenizer could be made of the vocabulary in {path}: {error}. "
            "Give --tokenizer the folder or hub name of the model's own tokenizer"
        ) from error
    tokenizer = PlainTokenizer(backend, files.special_tokens, [], files.chat_template)
    _set_template(tokenizer, chat_template)
    return HFTokenizer(tokenizer, eos_token_ids=eos_token_ids or files.eos_token_ids, model_vocab_size=files.vocab_size)


def _load(folder: Path, trust_remote_code: bool) -> Any:
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    plain = load_plain_tokenizer(folder, tokenizer_config)
    if plain is not None:
        return plain
    tokenizer_class = tokenizer_config.get("tokenizer_class")
    if (folder / "tokenizer.json").is_file() and tokenizer_class in _PLAIN_CLASSES:
        from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def load_tokenizer(
    folder: Path,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    generation_config: Path | None = None,
) -> HFTokenizer:
    """Load the tokenizer of a checkpoint in Hugging Face layout or of a GGUF file; reaches for nothing outside it.

    Args:
        folder: with tokenizer.json, or what `transformers` needs for a slow tokenizer; or a GGUF file.
        chat_template: path of a jinja file, or the template itself, in place of the checkpoint's own.
        trust_remote_code: run a tokenizer class that the checkpoint brings.
        generation_config: file that names end tokens; None is the one in `folder`.

    Raises:
        ModelNotFoundError: there is no such folder.
        UnsupportedModelError: no tokenizer could be made of what lies there.
        InvalidRequestError: the chat template is not there, or is not valid jinja.
    """
    if is_gguf(folder):
        stated = {} if generation_config is None else _read_json(generation_config)
        return _load_gguf(folder, chat_template, _token_ids(stated.get("eos_token_id")))
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} is not a folder: give the checkpoint's folder or a hub name")
    try:
        tokenizer = _load(folder, trust_remote_code)
    except Exception as error:  # whatever the library meets in foreign files
        raise UnsupportedModelError(
            f"no tokenizer could be loaded from {folder} ({type(error).__name__}: {error}): it needs tokenizer.json, "
            "or a folder given with --tokenizer"
        ) from error
    _set_template(tokenizer, chat_template)
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config") or config
    eos_token_ids = _token_ids(_read_json(generation_config or folder / "generation_config.json").get("eos_token_id"))
    if not eos_token_ids:  # as `transformers.generate` does: config.json counts only where the other is silent
        eos_token_ids = _token_ids(config.get("eos_token_id")) or _token_ids(text_config.get("eos_token_id"))
    vocab_size = text_config.get("vocab_size")
    return HFTokenizer(
        tokenizer,
        eos_token_ids=eos_token_ids,
        model_vocab_size=vocab_size if isinstance(vocab_size, int) else 0,
    )
