"""From a request's fields to `SamplingParams`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeVar

import msgspec

from ...messages.errors import InvalidRequestError
from ...messages.sampling import SamplingParams
from ..generation_config import RequestDefaults
from ..params import MAX_LOGIT_BIAS, validate_params
from .engine_protocol import EngineLike
from .protocol import SamplingFields
from .settings import ServerSettings

_T = TypeVar("_T")

MAX_LOGIT_BIAS_BYTES = 64 * MAX_LOGIT_BIAS
MAX_BIAS = 100.0
MAX_PRIORITY = 2**31

_LOGIT_BIAS = msgspec.json.Decoder(dict[str, float] | None)
_CACHE_SALT = re.compile(r"[A-Za-z0-9_\-+=.:~]{1,128}")
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


def sampling_params(
    request: SamplingFields,
    engine: EngineLike,
    settings: ServerSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
    asked_as: Mapping[str, str] = MappingProxyType({}),
    defaults: RequestDefaults | None = None,
) -> SamplingParams:
    """Check a request's sampling fields; `null` takes the server's default.

    Args:
        max_tokens, logprobs, prompt_logprobs: these mean different things in completions and in chat; `max_tokens`
            None is the default.
        asked_as: names that the request has for parameters, where they are others.
        defaults: in place of the engine's.

    Raises:
        InvalidRequestError: names the field.
    """
    defaults = defaults or engine.request_defaults
    default = defaults.params
    max_tokens, clip_max_tokens = (
        (default.max_tokens, default.clip_max_tokens) if max_tokens is None else (max_tokens, False)
    )
    if defaults.max_tokens_limit is not None and max_tokens is not None:
        max_tokens = min(max_tokens, defaults.max_tokens_limit)
    stop = request.stop
    params = SamplingParams(
        n=_or(request.n, 1),
        temperature=_or(request.temperature, default.temperature),
        top_k=_or(request.top_k, default.top_k),
        top_p=_or(request.top_p, default.top_p),
        min_p=_or(request.min_p, default.min_p),
        presence_penalty=_or(request.presence_penalty, default.presence_penalty),
        frequency_penalty=_or(request.frequency_penalty, default.frequency_penalty),
        repetition_penalty=_or(request.repetition_penalty, default.repetition_penalty),
        logit_bias=_logit_bias(request.logit_bias),
        allowed_token_ids=None if request.allowed_token_ids is None else tuple(request.allowed_token_ids),
        bad_words=tuple(request.bad_words or ()),
        max_tokens=max_tokens,
        min_tokens=_or(request.min_tokens, 0),
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        seed=request.seed,
        skip_special_tokens=_or(request.skip_special_tokens, True),
        spaces_between_special_tokens=_or(request.spaces_between_special_tokens, True),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        clip_max_tokens=clip_max_tokens,
    )
    try:
        return validate_params(
            params,
            vocab_size=engine.vocab_size,
            max_logprobs=engine.config.max_logprobs,
            max_model_len=engine.max_model_len,
            max_n=settings.max_n,
        )
    except InvalidRequestError as error:
        name = error.param or ""
        asked = asked_as.get(name, name)
        raise InvalidRequestError(str(error).replace(name, asked, 1), param=error.param and asked) from None


def check_common(request: SamplingFields, engine: EngineLike) -> None:
    """Check the fields that are no sampling parameters.

    Raises:
        InvalidRequestError: names the field.
    """
    if request.stream_options is not None and not request.stream:
        raise InvalidRequestError("stream_options needs stream to be true", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequestError("prompt_logprobs cannot be streamed: set stream to false", param="prompt_logprobs")
    if request.cache_salt is not None and not _CACHE_SALT.fullmatch(request.cache_salt):
        raise InvalidRequestError(
            "cache_salt must be 1 to 128 characters out of letters, digits and _-+=.:~", param="cache_salt"
        )
    if request.request_id is not None and not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequestError("request_id must be 1 to 128 printable ASCII characters", param="request_id")
    if request.priority is not None and not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequestError(f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}", param="priority")
    if request.user is not None and "\0" in request.user:
        raise InvalidRequestError("user must not hold NUL characters", param="user")
    keep = request.truncate_prompt_tokens
    if keep is not None and keep != -1 and not 1 <= keep <= engine.max_model_len:
        raise InvalidRequestError(
            f"truncate_prompt_tokens must be -1 or from 1 to {engine.max_model_len}", param="truncate_prompt_tokens"
        )


def _logit_bias(raw: msgspec.Raw) -> dict[int, float] | None:
    if not bytes(raw):
        return None
    if len(bytes(raw)) > MAX_LOGIT_BIAS_BYTES:
        raise InvalidRequestError(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", param="logit_bias")
    try:
        biases = _LOGIT_BIAS.decode(raw)
    except msgspec.DecodeError as error:
        message = str(error).partition(" - at `")[0]
        raise InvalidRequestError(f"logit_bias: {message}", param="logit_bias") from None
    if biases is None:
        return None
    for key in biases:
        # `int` takes more than clients should send: spaces, underscores, digits of other scripts.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError('the keys of logit_bias must be token ids, such as "42"', param="logit_bias")
    # Keys are digits and values numbers by now: a colon stands behind each key, and nowhere else.
    if len({int(key) for key in biases}) != bytes(raw).count(b":"):
        raise InvalidRequestError("logit_bias names a token id twice", param="logit_bias")
    # vLLM clamps, and some clients send 1000 for "always".
    return {int(key): min(max(bias, -MAX_BIAS), MAX_BIAS) for key, bias in biases.items()}


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
