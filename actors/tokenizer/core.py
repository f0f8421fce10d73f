"""From a prompt to token ids and the recipe of each sequence; decides what is refused before it costs anything."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

import msgspec

from ...messages.errors import ContextLengthExceededError, InvalidRequestError
from ...messages.ids import RequestId
from ...messages.request import ChatPrompt, PromptReady, RequestEnded, SubmitPrompt, SubmitRequest
from ...messages.sampling import SamplingParams
from .codec import TextCodec

TokenizerInbox = SubmitPrompt
TokenizerOutbox = PromptReady | SubmitRequest | RequestEnded

_MAX_SEED = 2**63 - 1
_MANY_CHARS = 8192  # as in `actor.LONG_PROMPT_CHARS`: less is tokenized in no time


class TokenizerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds that prompts are held to.

    Attributes:
        vocab_size: rows of the model's embedding; token ids must be below it.
        max_model_len: longest sequence, prompt and output together.
        max_logprobs: most alternatives a request may ask for; -1 means no bound.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int = 20


class TokenizerCore:
    """Tokenizes prompts and fills in what their parameters leave open. Holds nothing of a request.

    A `SubmitPrompt` is answered by `PromptReady` and one `SubmitRequest` for each sequence, or by one `RequestEnded`
    with reason `refused` for each. Tokenizing costs about 1.2 us a token: the carrier hands long prompts to a thread.
    """

    def __init__(self, config: TokenizerConfig, codec: TextCodec) -> None:
        self._config = config
        self._codec = codec
        self._max_model_len = config.max_model_len
        # A checkpoint's files may name any; what the model cannot sample would not be there to be masked.
        self._eos_token_ids = tuple(token_id for token_id in codec.eos_token_ids if token_id < config.vocab_size)

    def handle(self, message: TokenizerInbox, now_ns: int) -> list[TokenizerOutbox]:
        """Answer one prompt; `now_ns` is not needed here."""
        try:
            return self._submit(message)
        except InvalidRequestError as error:
            return [_refused(request_id, error) for request_id in message.request_ids]

    def _submit(self, message: SubmitPrompt) -> list[TokenizerOutbox]:
        params = message.params
        if len(message.request_ids) != params.n or params.n < 1:
            raise InvalidRequestError(f"n={params.n} takes as many request ids, got {message.request_ids}", param="n")
        self._check_params(params)
        token_ids = self._truncate(self._prompt_token_ids(message), message)
        max_tokens = self._max_tokens(len(token_ids), params)
        first_id = message.request_ids[0]
        seed = _fallback_seed(first_id) if params.seed is None else params.seed
        params = msgspec.structs.replace(
            params,
            max_tokens=max_tokens,
            seed=seed,
            bad_words_token_ids=self._bad_words_token_ids(params),
            clip_max_tokens=False,  # it is done
        )
        prompt = _int32_bytes(token_ids)
        eos_token_ids = () if params.ignore_eos else self._eos_token_ids
        self._check_some_token_is_left(params, eos_token_ids)
        ready = PromptReady(message.request_ids, tuple(token_ids), params)
        return [
            ready,
            *(
                SubmitRequest(
                    request_id=request_id,
                    prompt_token_ids=prompt,
                    params=msgspec.structs.replace(params, n=1, seed=_sibling_seed(seed, i)),
                    eos_token_ids=eos_token_ids,
                    arrival_ns=message.arrival_ns,
                    priority=message.priority,
                    cache_salt=message.cache_salt,
                    fork_of=first_id if i else RequestId(-1),
                    deadline_ns=message.deadline_ns,
                )
                for i, request_id in enumerate(message.request_ids)
            ),
        ]

    def _prompt_token_ids(self, message: SubmitPrompt) -> list[int]:
        prompt = message.prompt
        if isinstance(prompt, ChatPrompt):
            text = self._codec.render_chat(prompt)
            self._check_num_chars(text, message)
            token_ids = self._codec.encode(text, prompt.add_special_tokens)
        elif isinstance(prompt, str):
            self._check_num_chars(prompt, message)
            token_ids = self._codec.encode(prompt, message.add_special_tokens)
        else:
            token_ids = list(prompt)
        if not token_ids:
            raise InvalidRequestError("the prompt is empty: it must have at least one token", param="prompt")
        self._check_token_ids("prompt", token_ids)
        return token_ids

    def _check_num_chars(self, text: str, message: SubmitPrompt) -> None:
        """Refuse a text that is too long whatever its tokens are: tokenizing megabytes takes seconds of a core."""
        if message.truncate_prompt_tokens or len(text) < _MANY_CHARS:
            return
        max_token_chars = self._codec.max_token_chars
        if max_token_chars is not None and len(text) > self._max_model_len * max_token_chars:
            raise ContextLengthExceededError.of_prompt(
                f"at least {-(-len(text) // max_token_chars)}", self._max_model_len
            )

    def _truncate(self, token_ids: list[int], message: SubmitPrompt) -> list[int]:
        keep = message.truncate_prompt_tokens
        if keep < -1:
            raise InvalidRequestError(
                f"truncate_prompt_tokens={keep}: give the number of tokens to keep, or -1 for the model's length",
                param="truncate_prompt_tokens",
            )
        if keep == -1:
            # Room stays for the answer, else what was cut to fit would be refused as too long.
            params = message.params
            num_output = 1 if params.clip_max_tokens else max(1, params.max_tokens or 1)
            keep = max(1, self._max_model_len - num_output)
        return token_ids[-keep:] if keep else token_ids

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """`max_tokens`, or all that the context leaves.

        Raises:
            ContextLengthExceededError: prompt and output asked for do not fit.
        """
        max_tokens = params.max_tokens
        room = self._max_model_len - num_prompt_tokens
        if room < 1:
            raise ContextLengthExceededError.of_prompt(num_prompt_tokens, self._max_model_len)
        if max_tokens is None or (params.clip_max_tokens and max_tokens > room):
            return room
        if max_tokens > room:
            raise ContextLengthExceededError(
                f"This model's maximum context length is {self._max_model_len} tokens, and you asked for "
                f"{num_prompt_tokens + max_tokens} ({num_prompt_tokens} in the prompt, {max_tokens} for the output): "
                f"shorten the prompt, or lower max_tokens to at most {room}",
                param="max_tokens",
            )
        return max_tokens

    def _bad_words_token_ids(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each bad word as it is spelt at the beginning of a text and after a space.

        Both are kept whenever they differ; vLLM keeps the second only where both have the same length, and so lets a
        word pass that the space splits differently.
        """
        if not params.bad_words:
            return params.bad_words_token_ids
        sequences = list(params.bad_words_token_ids)
        for word in params.bad_words:
            bare = word.lstrip()
            for text in (bare, " " + bare):
                token_ids = tuple(self._codec.encode(text, False))
                if token_ids:
                    self._check_token_ids("bad_words", token_ids)
                    sequences.append(token_ids)
        return tuple(dict.fromkeys(sequences))

    def _check_params(self, params: SamplingParams) -> None:
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("logit_bias", params.logit_bias or ())
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids or ())
        for sequence in params.bad_words_token_ids:
            self._check_token_ids("bad_words_token_ids", sequence)
        if not all(params.stop):
            raise InvalidRequestError("a stop string may not be empty", param="stop")
        if not all(word.strip() for word in params.bad_words):
            raise InvalidRequestError("a bad word may not be empty or blank", param="bad_words")
        self._check_logprobs("logprobs", params.logprobs)
        self._check_logprobs("prompt_logprobs", params.prompt_logprobs)

    def _check_some_token_is_left(self, params: SamplingParams, eos_token_ids: Iterable[int]) -> None:
        """Refuse parameters that could leave no token to choose from, at whichever position.

        A bad word of several tokens excludes its last one only behind the others. Which of those come is known too
        late, in the middle of an answer: so one token has to be left that no bad word ends with.
        """
        allowed = params.allowed_token_ids
        num_allowed = self._config.vocab_size if allowed is None else len(set(allowed))
        excluded = {sequence[-1] for sequence in params.bad_words_token_ids}
        if params.min_tokens:
            excluded.update(eos_token_ids, params.stop_token_ids)
        if num_allowed > len(excluded if allowed is None else excluded.intersection(allowed)):
            return
        bad_words = params.bad_words_token_ids
        why = ("ends one of bad_words" if bad_words else "") + (" or " if bad_words and params.min_tokens else "")
        why += "ends the answer before min_tokens" if params.min_tokens else ""
        param = "stop_token_ids" if not bad_words else "bad_words"
        raise InvalidRequestError(
            f"no token may be left to choose: each one that is allowed {why}. Allow another one, or relax these",
            param=param if allowed is None else "allowed_token_ids",
        )

    def _check_logprobs(self, param: str, asked: int | None) -> None:
        bound = self._config.max_logprobs
        if asked is None or bound == -1:
            return
        wanted = self._config.vocab_size if asked == -1 else asked
        if wanted > bound:
            raise InvalidRequestError(
                f"{param}={asked} asks for {wanted} alternatives, at most {bound} are allowed: lower it, or start the "
                "server with a larger --max-logprobs",
                param=param,
            )

    def _check_token_ids(self, param: str, token_ids: Iterable[int]) -> None:
        token_ids = list(token_ids)
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._config.vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self._config.vocab_size)
            raise InvalidRequestError(
                f"{param}: token id {wrong} is not in the vocabulary, whose ids are 0 to {self._config.vocab_size - 1}",
                param=param,
            )


def _refused(request_id: RequestId, error: InvalidRequestError) -> RequestEnded:
    return RequestEnded(
        request_id=request_id,
        reason="refused",
        error_code=error.code,
        error=str(error),
        error_param=error.param or "",
    )


def _int32_bytes(token_ids: list[int]) -> bytes:
    """Token ids as int32, little endian."""
    values = array("i", token_ids)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _sibling_seed(seed: int, index: int) -> int:
    """Each sibling draws from its own stream; the first keeps the seed itself."""
    return (seed + index) & _MAX_SEED if index else seed


def _fallback_seed(request_id: RequestId) -> int:
    """A seed for a request that brings none: the same request always draws the same.

    Source: the output function of SplitMix64 (Steele, Lea and Flood 2014).
    """
    mask = 2**64 - 1
    z = (request_id + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return (z ^ (z >> 31)) & _MAX_SEED
