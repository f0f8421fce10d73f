"""Our rendering of chat templates beside that of `transformers`."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import TemplateSyntaxError
from tiny_tokenizers import CHAT_TEMPLATE, SPECIAL, byte_level_backend
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from octavo.actors.tokenizer.chat_template import ChatTemplate

BLOCKS = (
    "{%- for message in messages %}\n"
    "  {%- if loop.first and message.role != 'system' %}\n<|im_start|>system\nnone<|im_end|>\n  {%- endif %}\n"
    "  {%- if message.content is string %}{{ message.role }}: {{ message.content | trim }}\n"
    "  {%- else %}{{ message.role }}:{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}\n"
    "  {%- if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "  {%- generation %}{{ message.role | upper }}{% endgeneration %}\n"
    "{%- endfor %}{{ eos_token }}{% if add_generation_prompt %}assistant:{% endif %}"
)
REASONING = (
    "{% for m in messages %}{{ m.reasoning_content or '-' }}/{{ m.thinking or '-' }}/"
    "{{ m.reasoning or '-' }};{% endfor %}"
)
TOOLS = (
    "{% set ns = namespace(count=0) %}{% for tool in tools or [] %}{% set ns.count = ns.count + 1 %}"
    "{{ tool | tojson }} {{ tool | tojson(indent=2) }}{% endfor %}{{ ns.count }}{{ documents | tojson }}"
    "{{ dict(a=1) | tojson(sort_keys=true) }}{{ dict.fromkeys(['x'], 'é<') | tojson }}{{ strftime_now('') }}"
    "{{ messages | tojson }}{{ enable_thinking }}"
)
ATTACK = "{{ messages.__class__.__mro__ }}"
MUTATION = "{{ messages.append(1) }}"
UNDERSCORE = "{% set ns = namespace(__class__=1) %}"
UNDERSCORE_LATER = "{% set ns = namespace() %}{% set ns._x = 1 %}"
HELLO = [{"role": "user", "content": " Hello! "}]
TALK = [
    {"role": "system", "content": "Be brief.", "name": None},
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": None, "thinking": "hm"},
    {"role": "tool", "content": "<b>\u2028"},
    {"role": "assistant", "content": "So  ", "reasoning": "because"},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two "}, {"type": "x"}]}
]
CASES: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
    (CHAT_TEMPLATE, HELLO, {}),
    (CHAT_TEMPLATE, HELLO, {"add_generation_prompt": True, "suffix": "!", "bos_token": "<B>"}),
    (CHAT_TEMPLATE, [{"role": "pirate", "content": "x"}], {}),
    (CHAT_TEMPLATE, HELLO, {"continue_final_message": True}),
    (CHAT_TEMPLATE, [], {}),
    (BLOCKS, TALK, {"add_generation_prompt": True}),
    (BLOCKS, TALK, {"continue_final_message": True}),
    (BLOCKS, PARTS, {}),
    (BLOCKS, PARTS, {"continue_final_message": True}),
    (BLOCKS, [{"role": "user", "content": [{"type": "x"}]}], {"continue_final_message": True}),
    (BLOCKS, [{"role": "user"}], {"continue_final_message": True}),
    (REASONING, TALK, {}),
    (REASONING, TALK, {"continue_final_message": True}),
    ("nothing of the content", HELLO, {"continue_final_message": True}),
    (TOOLS, TALK, {"tools": [{"name": "é", "q": '"'}], "documents": [{"title": "t"}], "enable_thinking": False}),
    (TOOLS, TALK, {"tools": ["not a schema"]}),
    (TOOLS, TALK, {"documents": ["not a document"]}),
    (TOOLS, PARTS, {}),
    (ATTACK, HELLO, {}),
    (MUTATION, HELLO, {}),
    (UNDERSCORE, HELLO, {}),
    (UNDERSCORE_LATER, HELLO, {}),
    ("{{ messages[7].role.x.y }}", HELLO, {}),
]


@pytest.mark.parametrize(("template", "messages", "options"), CASES)
def test_texts_and_refusals_are_those_of_transformers(
    template: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level_backend(), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = template
    named = ("add_generation_prompt", "continue_final_message", "tools", "documents")
    ours = {name: value for name, value in options.items() if name in named}
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    variables |= {name: value for name, value in options.items() if name not in named}
    before = repr(messages)
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:
        with pytest.raises(Exception, match=r".") as caught:
            ChatTemplate(template).render(messages, variables=variables, **ours)
        assert type(caught.value) is type(error)
    else:
        assert ChatTemplate(template).render(messages, variables=variables, **ours) == expected
    assert repr(messages) == before


def test_text_that_is_no_template_is_refused_when_it_is_compiled() -> None:
    with pytest.raises(TemplateSyntaxError):
        ChatTemplate("{% for %}" + SPECIAL[0])
