"""How a request wants its tokens chosen."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of one request; names and meanings follow vLLM and the OpenAI API.

    The values are checked by `octavo.gateway.params.validate_params`, once, at the edge.

    Attributes:
        n: independent completions of the same prompt, >= 1.
        temperature: 0 means greedy.
        top_k: keep the k likeliest tokens; 0 or -1 means all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches it, in (0, 1].
        min_p: drop tokens less likely than `min_p` times the likeliest, in [0, 1].
        presence_penalty, frequency_penalty: subtracted per token seen in the output, in [-2, 2].
        repetition_penalty: > 0; divides (positive) or multiplies (negative) logits of tokens in prompt or output.
        logit_bias: added to the logits of these token ids, each in [-100, 100].
        allowed_token_ids: if given, every other token is excluded.
        bad_words: strings that must not appear; the tokenizer turns them into `bad_words_token_ids`.
        bad_words_token_ids: token sequences that may not be completed.
        max_tokens: None means as many as the context allows.
        min_tokens: end-of-sequence and stop tokens are excluded until this many were produced.
        stop: strings that end the output; matched on text.
        stop_token_ids: token ids that end the output.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logprobs: None, or how many alternatives to report beside the chosen token; -1 means the vocabulary.
        prompt_logprobs: the same for the prompt's tokens.
        seed: None draws one at the edge; the recipe always holds a number.
        skip_special_tokens, spaces_between_special_tokens, include_stop_str_in_output: how text is made.
        clip_max_tokens: where `max_tokens` is more than the context leaves, take what it leaves; else that is refused.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    clip_max_tokens: bool = False
