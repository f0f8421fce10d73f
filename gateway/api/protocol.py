"""What clients may send, as types. Unknown names are refused, so that a misspelt parameter is never silently lost."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Name = Annotated[str, msgspec.Meta(max_length=256)]

_LEFT_OUT: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
"""Default of a field whose value is kept undecoded."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How a stream is told.

    Attributes:
        include_usage: one more chunk at the end, with token counts.
        continuous_usage_stats: token counts so far in every chunk.
        include_obfuscation: accepted; there is no padding to leave out.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Unsupported(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of other servers that are refused by name, unless their value asks for nothing (see `HARMLESS`)."""

    best_of: msgspec.Raw = _LEFT_OUT
    use_beam_search: msgspec.Raw = _LEFT_OUT
    length_penalty: msgspec.Raw = _LEFT_OUT
    early_stopping: msgspec.Raw = _LEFT_OUT
    response_format: msgspec.Raw = _LEFT_OUT
    structured_outputs: msgspec.Raw = _LEFT_OUT
    guided_json: msgspec.Raw = _LEFT_OUT
    guided_regex: msgspec.Raw = _LEFT_OUT
    guided_choice: msgspec.Raw = _LEFT_OUT
    guided_grammar: msgspec.Raw = _LEFT_OUT
    thinking_token_budget: msgspec.Raw = _LEFT_OUT
    repetition_detection: msgspec.Raw = _LEFT_OUT
    kv_transfer_params: msgspec.Raw = _LEFT_OUT
    ec_transfer_params: msgspec.Raw = _LEFT_OUT
    vllm_xargs: msgspec.Raw = _LEFT_OUT
    logprob_token_ids: msgspec.Raw = _LEFT_OUT
    truncation_side: msgspec.Raw = _LEFT_OUT
    stream_interval: msgspec.Raw = _LEFT_OUT
    return_token_offsets: msgspec.Raw = _LEFT_OUT
    mm_processor_kwargs: msgspec.Raw = _LEFT_OUT


HARMLESS: dict[str, tuple[bytes, ...]] = {
    "best_of": (b"1",),
    "use_beam_search": (b"false",),
    "length_penalty": (b"1.0", b"1"),
    "early_stopping": (b"false",),
    "structured_outputs": (b"{}",),
    "kv_transfer_params": (b"{}",),
    "ec_transfer_params": (b"{}",),
    "vllm_xargs": (b"{}",),
    "logprob_token_ids": (b"[]",),
    "truncation_side": (b'"left"',),
    "stream_interval": (b"1",),
    "return_token_offsets": (b"false",),
    "mm_processor_kwargs": (b"{}",),
    "suffix": (b'""',),
    "tools": (b"[]",),
    "tool_choice": (b'"none"', b'"auto"'),
    "functions": (b"[]",),
    "function_call": (b'"none"', b'"auto"'),
    "modalities": (b'["text"]',),
    "documents": (b"[]",),
    "media_io_kwargs": (b"{}",),
    "verbosity": (b'"medium"',),
}
"""Values of unsupported fields that change nothing; `null` always does."""


class SamplingFields(Unsupported, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat have in common; `null` is the same as leaving a field out.

    Attributes:
        logit_bias: kept undecoded until its size is known: decoding a million entries would hold every stream up.
        user, metadata, store, service_tier, safety_identifier, prompt_cache_key, prompt_cache_retention: accepted, for
            clients that always send them; they have no effect.
    """

    model: Name | None = None
    n: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: msgspec.Raw = _LEFT_OUT
    allowed_token_ids: list[TokenId] | None = None
    bad_words: list[str] | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: Int | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Int | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    echo: bool | None = None
    priority: Int | None = None
    request_id: Name | None = None
    cache_salt: Name | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    user: str | None = None
    metadata: msgspec.Raw = _LEFT_OUT
    store: msgspec.Raw = _LEFT_OUT
    service_tier: msgspec.Raw = _LEFT_OUT
    safety_identifier: msgspec.Raw = _LEFT_OUT
    prompt_cache_key: msgspec.Raw = _LEFT_OUT
    prompt_cache_retention: msgspec.Raw = _LEFT_OUT


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/completions`.

    Attributes:
        prompt: a text, token ids, or a list of either; each is answered by itself.
        logprobs: alternatives to report beside each token.
        echo: the answer begins with the prompt; with `max_tokens` 0 it is the prompt alone, for scoring.
    """

    prompt: str | list[str | TokenId | list[TokenId]] | None = None
    logprobs: Int | None = None
    suffix: msgspec.Raw = _LEFT_OUT
    prompt_embeds: msgspec.Raw = _LEFT_OUT


class ContentPart(msgspec.Struct, kw_only=True):
    """Part of a message's content; only `text` and `refusal` parts are served."""

    type: Name = "text"
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """A message of a conversation. Other fields of answers that clients send back are not looked at."""

    role: Name
    content: str | list[str | ContentPart] | None = None
    name: Name | None = None
    tool_calls: list[msgspec.Raw] | None = None


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`.

    Attributes:
        max_completion_tokens: wins over `max_tokens`; neither means as many as the context has room for.
        logprobs, top_logprobs: whether to report log-probabilities, and of how many alternatives.
        echo: if the last message is an assistant's, the answer begins with it.
        reasoning_effort: given to the chat template, with `enable_thinking` false for `none`.
        chat_template_kwargs: more variables for the chat template; plain values.
        parallel_tool_calls, include_reasoning: accepted; they have no effect without tools and reasoning.
    """

    messages: list[ChatMessage]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | Int | float | str | None] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    tools: msgspec.Raw = _LEFT_OUT
    tool_choice: msgspec.Raw = _LEFT_OUT
    functions: msgspec.Raw = _LEFT_OUT
    function_call: msgspec.Raw = _LEFT_OUT
    documents: msgspec.Raw = _LEFT_OUT
    chat_template: msgspec.Raw = _LEFT_OUT
    modalities: msgspec.Raw = _LEFT_OUT
    audio: msgspec.Raw = _LEFT_OUT
    prediction: msgspec.Raw = _LEFT_OUT
    web_search_options: msgspec.Raw = _LEFT_OUT
    verbosity: msgspec.Raw = _LEFT_OUT
    media_io_kwargs: msgspec.Raw = _LEFT_OUT


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /tokenize`: a `prompt`, or `messages` to be rendered by the chat template."""

    model: Name | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, bool | Int | float | str | None] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /detokenize`."""

    tokens: list[TokenId]
    model: Name | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a request; a prompt counts once, however many answers it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
