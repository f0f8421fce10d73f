"""Sampling parameters are checked here, once: what passes is accepted by every actor further on."""

from __future__ import annotations

import math

import msgspec

from ..messages.errors import InvalidRequestError
from ..messages.sampling import SamplingParams

GREEDY_BELOW = 1e-5
"""A temperature this small divides logits beyond float32's range; it means greedy."""

MIN_REPETITION_PENALTY = 1e-4
"""Logits are divided by it; much less, and they leave float32's range."""

MAX_NUM_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1


def validate_params(
    params: SamplingParams,
    *,
    vocab_size: int,
    max_logprobs: int,
    max_model_len: int | None = None,
    max_n: int = 16,
) -> SamplingParams:
    """Check every field by itself and against the others.

    Args:
        params: as a client or a program gave them; lists are taken for tuples.
        vocab_size: width of the logits; token ids are below it.
        max_logprobs: most alternatives that may be asked for at a position, -1 for no limit.
        max_model_len: longest prompt and output together, where it is known.
        max_n: most sequences per prompt.

    Returns:
        The same parameters, normalised: temperatures next to 0 are 0, `top_k=-1` is 0, seed -1 is none, and other
        negative seeds are numbers from 0 up.

    Raises:
        InvalidRequestError: names the parameter in `param`.
    """
    params = _with_right_types(params)
    _check_range("n", params.n, 1, max_n)
    _check_range("temperature", params.temperature, 0.0, 2.0)
    _check_range("top_k", params.top_k, -1, 2**31 - 1)
    _check_range("top_p", params.top_p, 0.0, 1.0, above_low=True)
    _check_range("min_p", params.min_p, 0.0, 1.0)
    _check_range("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", params.repetition_penalty, MIN_REPETITION_PENALTY, 10.0)
    _check_lengths(params, max_model_len)
    _check_stops(params, vocab_size)
    _check_token_choice(params, vocab_size)
    _check_num_logprobs("logprobs", params.logprobs, max_logprobs, vocab_size)
    _check_num_logprobs("prompt_logprobs", params.prompt_logprobs, max_logprobs, vocab_size)
    if params.seed is not None:
        _check_range("seed", params.seed, -(2**63), MAX_SEED)
    return msgspec.structs.replace(
        params,
        temperature=0.0 if params.temperature < GREEDY_BELOW else params.temperature,
        top_k=max(params.top_k, 0),
        seed=None if params.seed is None or params.seed == -1 else params.seed & MAX_SEED,
    )


def _with_right_types(params: SamplingParams) -> SamplingParams:
    fields = msgspec.structs.asdict(params)
    for name in ("stop", "bad_words"):
        if isinstance(fields[name], str):
            fields[name] = (fields[name],)
    try:
        return msgspec.convert(fields, SamplingParams)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise InvalidRequestError(f"{path.rstrip('`')}: {message}", param=path.rstrip("`")) from None


def _check_range(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    is_number = not isinstance(value, float) or math.isfinite(value)
    if not is_number or value > high or value < low or (above_low and value == low):
        bounds = f"more than {low:g} and at most {high:g}" if above_low else f"from {_plain(low)} to {_plain(high)}"
        raise InvalidRequestError(f"{name} is {_short(value)}, but must be {bounds}", param=name)


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:.10g}"


def _short(value: float) -> str:
    # Python refuses to print integers of more than 4300 digits, and nobody wants to read them.
    return str(value) if -(2**64) < value < 2**64 or not isinstance(value, int) else "far outside the range"


def _check_lengths(params: SamplingParams, max_model_len: int | None) -> None:
    if params.max_tokens is not None:
        _check_range("max_tokens", params.max_tokens, 1, MAX_TOKENS)
    _check_range("min_tokens", params.min_tokens, 0, MAX_TOKENS)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens is {params.min_tokens}, but must not be above max_tokens, which is {params.max_tokens}",
            param="min_tokens",
        )
    if max_model_len is None:
        return
    max_tokens = None if params.clip_max_tokens else params.max_tokens
    for name, value in (("max_tokens", max_tokens), ("min_tokens", params.min_tokens)):
        if value is not None and value >= max_model_len:
            raise InvalidRequestError(
                f"{name} is {value}, but prompt and output together have room for {max_model_len} tokens: "
                f"ask for at most {max_model_len - 1}",
                param=name,
            )


def _check_stops(params: SamplingParams, vocab_size: int) -> None:
    _check_count("stop", len(params.stop), MAX_NUM_STOPS)
    for stop in params.stop:
        if not stop:
            raise InvalidRequestError("stop must not hold an empty string", param="stop")
        if len(stop) > MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"a stop string has {len(stop)} characters, but at most {MAX_STOP_CHARS} are allowed", param="stop"
            )
    _check_count("stop_token_ids", len(params.stop_token_ids), MAX_TOKEN_IDS)
    for token_id in params.stop_token_ids:
        _check_token_id("stop_token_ids", token_id, vocab_size)


def _check_token_choice(params: SamplingParams, vocab_size: int) -> None:
    if params.logit_bias is not None:
        _check_count("logit_bias", len(params.logit_bias), MAX_LOGIT_BIAS)
        for token_id, bias in params.logit_bias.items():
            _check_token_id("logit_bias", token_id, vocab_size)
            _check_range("logit_bias", bias, -100.0, 100.0)
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            raise InvalidRequestError(
                "allowed_token_ids is empty, so no token could be chosen: leave it out, or name some",
                param="allowed_token_ids",
            )
        _check_count("allowed_token_ids", len(params.allowed_token_ids), vocab_size)
        for token_id in params.allowed_token_ids:
            _check_token_id("allowed_token_ids", token_id, vocab_size)
    _check_count("bad_words", len(params.bad_words), MAX_BAD_WORDS)
    for word in params.bad_words:
        if not word.strip() or len(word) > MAX_STOP_CHARS:
            raise InvalidRequestError(
                f"each of bad_words must have 1 to {MAX_STOP_CHARS} characters and not be blank", param="bad_words"
            )
    _check_count("bad_words_token_ids", len(params.bad_words_token_ids), MAX_TOKEN_IDS)
    for word_ids in params.bad_words_token_ids:
        if not word_ids:
            raise InvalidRequestError("bad_words_token_ids must not hold an empty list", param="bad_words_token_ids")
        for token_id in word_ids:
            _check_token_id("bad_words_token_ids", token_id, vocab_size)


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequestError(f"{name} has {count} entries, but at most {most} are allowed", param=name)


def _check_token_id(name: str, token_id: int, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise InvalidRequestError(
            f"{name} holds token id {_short(token_id)}, but the model's are 0 to {vocab_size - 1}", param=name
        )


def _check_num_logprobs(name: str, value: int | None, max_logprobs: int, vocab_size: int) -> None:
    if value is None:
        return
    unlimited = max_logprobs < 0 or max_logprobs >= vocab_size
    if value == -1 and unlimited:
        return
    most = vocab_size if unlimited else max_logprobs
    if not 0 <= value <= most:
        raise InvalidRequestError(f"{name} is {_short(value)}, but must be from 0 to {most}", param=name)
