"""The life of a request: prompt in, tokens scheduled, text out, one end."""

from __future__ import annotations

from typing import Literal

from .base import Message
from .ids import RequestId
from .sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error", "refused"]
"""`refused`: ended before any token, because a bound was reached or the request can never be served."""


class ChatPrompt(Message, frozen=True):
    """A conversation to be rendered by the model's chat template.

    Attributes:
        messages_json: the `messages` list as JSON (strings only: content parts are already joined).
        template_kwargs_json: extra variables for the template, a JSON object.
        add_special_tokens: let the tokenizer add its own (such as one at the beginning) to those that the template
            writes, which most templates make superfluous.
    """

    messages_json: bytes
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs_json: bytes = b"{}"
    add_special_tokens: bool = False


class SubmitPrompt(Message, frozen=True):
    """Front end -> tokenizer: start a request (one message, `params.n` sequences).

    Attributes:
        request_ids: one id for each of the `params.n` sequences.
        prompt: text, token ids, or a conversation.
        arrival_ns: when the front end took it, on the runtime's clock.
        priority: lower goes first; each level is worth a fixed waiting time, so none starves.
        cache_salt: requests with different salts never share cached blocks.
        add_special_tokens: of a text; a conversation says so itself, and token ids are taken as they are.
        deadline_ns: end with `abort` if not finished by then; 0 means never.
    """

    request_ids: tuple[RequestId, ...]
    prompt: str | tuple[int, ...] | ChatPrompt
    params: SamplingParams
    arrival_ns: int = 0
    priority: int = 0
    cache_salt: str = ""
    add_special_tokens: bool = True
    truncate_prompt_tokens: int = 0  # keep the last so many; 0 means off, -1 the model's length
    deadline_ns: int = 0


class PromptReady(Message, frozen=True):
    """Tokenizer -> detokenizer, on to the front end: the prompt as token ids, before any output."""

    request_ids: tuple[RequestId, ...]
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


class SubmitRequest(Message, frozen=True):
    """Tokenizer -> scheduler: the recipe of one sequence.

    Attributes:
        prompt_token_ids: int32, little endian.
        params: with `max_tokens` and `seed` filled in.
        eos_token_ids: the model's end tokens, empty under `ignore_eos`.
        fork_of: a sibling (`n > 1`) whose prompt blocks this one shares; -1 if none.
        output_token_ids: int32; tokens already emitted, when a request is taken up again.
        is_taken_up_again: an earlier engine accepted it, so no bound on the queue refuses it now.
        num_losses: of executors that may have died of it at another replica, since its latest token; it has moved.
        num_failures: of engines in a row that may have failed at it, since its latest token.
    """

    request_id: RequestId
    prompt_token_ids: bytes
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    arrival_ns: int = 0
    priority: int = 0
    cache_salt: str = ""
    fork_of: RequestId = RequestId(-1)
    deadline_ns: int = 0
    output_token_ids: bytes = b""
    is_taken_up_again: bool = False
    num_losses: int = 0
    num_failures: int = 0


class CancelRequest(Message, frozen=True):
    """Front end -> scheduler: nobody waits for this request any more. Unknown ids are ignored."""

    request_id: RequestId


class StopMatched(Message, frozen=True):
    """Detokenizer -> scheduler: a stop string appeared; what is sampled after it does not count."""

    request_id: RequestId


class RequestEnded(Message, frozen=True):
    """Scheduler (or tokenizer) -> detokenizer: the request's one end.

    Attributes:
        num_output_tokens: tokens that belong to the answer; the text is complete once all have arrived.
        stop_token_id: the token that ended it, -1 if none did.
        num_cached_tokens: prompt tokens taken from the prefix cache when first scheduled.
        error_code, error: for `error` and `refused`, the public error's code and message.
        num_preemptions: how often it was preempted.
        first_scheduled_ns: when its first step was planned; 0 if never.
        error_param: the parameter that was refused, if the error is about one.
    """

    request_id: RequestId
    reason: FinishReason
    num_output_tokens: int = 0
    stop_token_id: int = -1
    num_cached_tokens: int = 0
    error_code: str = ""
    error: str = ""
    num_preemptions: int = 0
    first_scheduled_ns: int = 0
    error_param: str = ""


class TokenLogprobs(Message, frozen=True):
    """Log-probabilities at one position.

    Attributes:
        token_id: the token that was chosen (or stands in the prompt).
        logprob: natural logarithm of its probability before temperature and filters.
        rank: 1 for the likeliest.
        top: `(token_id, logprob)`, likeliest first; as many as asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class TextDelta(Message, frozen=True):
    """Detokenizer -> front end: what a stream gained.

    Attributes:
        text: ready to be sent; never part of a character, never part of a possible stop string.
        token_ids: tokens that this delta accounts for (their text may come with a later delta).
        logprobs: one entry for each of `token_ids`, if asked for.
        finish_reason: set on the last delta of the stream.
        stop_reason: the stop string or stop token id that ended it.
        ended: the scheduler's account, on the last delta.
        prompt_logprobs: with the first delta, if asked for; the first position is None.
    """

    request_id: RequestId
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    ended: RequestEnded | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


class StepTexts(Message, frozen=True):
    """Detokenizer -> front end: what streams gained in one step by a token whose text is simply its own.

    Stands for a `TextDelta(request_id, text, (token_id,))` of each row: one message a step where there would be
    hundreds. A stream has at most one row, and its other deltas keep their place before or behind.

    Attributes:
        texts: one for each of `request_ids`, ready to be sent.
        token_ids: likewise.
    """

    request_ids: tuple[RequestId, ...]
    texts: tuple[str, ...]
    token_ids: tuple[int, ...]
