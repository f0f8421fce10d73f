"""Chat templates as `transformers` renders them, without importing it.

Source: `transformers.utils.chat_template_utils` and `PreTrainedTokenizerBase.apply_chat_template` of version 5.23, to
whose texts and refusals those made here are equal. A template is a program from the hub: it runs in jinja's sandbox.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")
_TAG: Final = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """A compiled template.

    Args:
        text: jinja.

    Raises:
        jinja2.TemplateSyntaxError: it is not.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._template = _environment().from_string(text)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        variables: dict[str, Any],
    ) -> str:
        """The conversation as text.

        Args:
            messages: of plain JSON values; fields that are None count as missing.
            continue_final_message: end where the last message's content ends.
            variables: what else the template may read, special tokens among it.

        Raises:
            ValueError, TypeError, jinja2.TemplateError: the messages do not fit the template; the template itself may
                raise anything.
        """
        if not messages:
            raise ValueError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        if tools is not None and not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("Tools should be JSON schemas.")
        if documents is not None and not all(isinstance(document, dict) for document in documents):
            raise TypeError("Documents should be a list of dicts with 'title' and 'text' keys!")
        chat = [_prepared(message) for message in messages]
        final_text = _mark_end(chat[-1], self.text) if continue_final_message else ""
        text = self._template.render(
            messages=chat,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
        return _cut_at_mark(text, final_text) if continue_final_message else text


def _prepared(message: dict[str, Any]) -> dict[str, Any]:
    """Without absent fields, and its reasoning under all the names that templates read."""
    message = {name: value for name, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _mark_end(message: dict[str, Any], template: str) -> str:
    """Put a mark at the end of a message's text; returns that text."""
    content = message.get("content")
    if content is None:
        raise ValueError('continue_final_message is set but the final message has no "content" to continue!')
    if "content" not in template:
        raise ValueError('continue_final_message is set to "content" but this is not an accepted field')
    if not isinstance(content, list):
        message["content"] = content + _TAG
        return str(content)
    for index in reversed(range(len(content))):
        if "text" in content[index]:
            text: str = content[index]["text"]
            message["content"] = [*content]
            message["content"][index] = {**content[index], "text": text + _TAG}
            return text
    raise ValueError("continue_final_message is set but we could not find any text to continue in the final message!")


def _cut_at_mark(text: str, final_text: str) -> str:
    if final_text.strip() not in text or _TAG.strip() not in text:
        raise ValueError(
            "continue_final_message is set but the final message does not appear in the chat after applying the chat "
            f"template! Final message to continue: {final_text.strip()}\nRendered chat:\n{text}"
        )
    at = text.rindex(_TAG.strip())
    kept = text[:at]
    return kept if text[at : at + len(_TAG)] == _TAG else kept.rstrip()  # the template strips messages


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`, by which trainers find what the assistant said; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: jinja2.runtime.Macro) -> str:
        return caller()


class _Dict:
    """`dict` in a template, without the rest of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in a template, without ways into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
        self, positional = args[0], args[1:]
        attributes = dict(*positional, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace in a chat template cannot have the attribute {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Not jinja's own, which escapes what HTML would take amiss.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)  # templates mean the local date
