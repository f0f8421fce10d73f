"""A client's messages, checked and made plain for the chat template."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ...messages.errors import InvalidRequestError
from ...messages.request import ChatPrompt
from .protocol import ChatMessage, ContentPart

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""`developer` is the newer name of `system`, which is the one that templates know."""

RESERVED_TEMPLATE_NAMES = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "conversation",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
    }
)
MAX_TEMPLATE_KWARGS = 64
MAX_TEMPLATE_VALUE_CHARS = 4096


def chat_prompt(
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    template_kwargs: dict[str, bool | int | float | str | None],
    max_messages: int,
    add_special_tokens: bool = False,
) -> ChatPrompt:
    """A conversation for the tokenizer: every content is one string.

    Raises:
        InvalidRequestError: names the message that is wrong.
    """
    if not messages:
        raise InvalidRequestError("messages is empty: send at least one", param="messages")
    if len(messages) > max_messages:
        raise InvalidRequestError(
            f"messages has {len(messages)} entries, but at most {max_messages} are allowed", param="messages"
        )
    if continue_final_message and add_generation_prompt is not False:
        if add_generation_prompt:
            raise InvalidRequestError(
                "add_generation_prompt and continue_final_message exclude each other", param="continue_final_message"
            )
        add_generation_prompt = False
    _check_template_kwargs(template_kwargs)
    plain = [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return ChatPrompt(
        msgspec.json.encode(plain),
        add_generation_prompt=add_generation_prompt is not False,
        continue_final_message=bool(continue_final_message),
        template_kwargs_json=msgspec.json.encode(template_kwargs),
        add_special_tokens=add_special_tokens,
    )


def _plain_message(message: ChatMessage, path: str) -> dict[str, str]:
    role = ROLES.get(message.role)
    if role is None:
        raise InvalidRequestError(f"{path}.role is not one of {', '.join(ROLES)}", param=f"{path}.role")
    if message.tool_calls:
        raise InvalidRequestError(
            f"{path}.tool_calls: tools are not supported by this server", param=f"{path}.tool_calls"
        )
    content = message.content
    if content is None:
        if role != "assistant":
            raise InvalidRequestError(f"{path}.content is missing", param=f"{path}.content")
        content = ""
    if not isinstance(content, str):
        content = "\n".join(_part_text(part, f"{path}.content[{index}]") for index, part in enumerate(content))
    plain = {"role": role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _part_text(part: str | ContentPart, path: str) -> str:
    if isinstance(part, str):
        return part
    if part.type not in ("text", "refusal"):
        raise InvalidRequestError(
            f"{path}.type: only text is served, no images, audio, video or files", param=f"{path}.type"
        )
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise InvalidRequestError(f"{path}.{part.type} is missing", param=f"{path}.{part.type}")
    return text


def _check_template_kwargs(template_kwargs: dict[str, bool | int | float | str | None]) -> None:
    if len(template_kwargs) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequestError(
            f"chat_template_kwargs has more than {MAX_TEMPLATE_KWARGS} entries", param="chat_template_kwargs"
        )
    for name, value in template_kwargs.items():
        if name in RESERVED_TEMPLATE_NAMES or not name.isidentifier() or name.startswith("_") or len(name) > 64:
            raise InvalidRequestError(f"chat_template_kwargs must not set {name[:64]!r}", param="chat_template_kwargs")
        if isinstance(value, str) and len(value) > MAX_TEMPLATE_VALUE_CHARS:
            raise InvalidRequestError(f"chat_template_kwargs: {name} is too long", param="chat_template_kwargs")
