"""What `octavo chaos` asks for, how an answer is read, and when two answers are the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Final

import aiohttp
import msgspec

from ...messages.errors import OctavoError

MAX_LOGPROB_DIFFERENCE: Final = 1e-4
"""Of two log-probabilities that count as the same; reordered sums in float32 differ by less."""

_WORDS: Final = (
    "the a one this every old young small river house street garden morning night teacher doctor friend letter story "
    "music water stone tree light window road city winter summer walks reads writes finds opens sings waits remembers "
    "quickly slowly never always under over beside against and or but because while when where Grüße naïve 世界"
)
_END: Final = b"data: [DONE]"


class ServedModel(msgspec.Struct, frozen=True):
    """What a server says of its model."""

    name: str
    max_model_len: int


class Recipe(msgspec.Struct, frozen=True):
    """A request whose answer is always the same.

    Attributes:
        kind: how it samples, for reports.
        body: JSON, for `POST /v1/completions`.
        num_choices: sequences it asks for.
    """

    kind: str
    body: bytes
    num_choices: int


class ChoiceOutput(msgspec.Struct):
    """What one sequence gained.

    Attributes:
        logprobs: of each token the chosen one's, and those of the alternatives in falling order.
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[float] = []
    finish_reason: str = ""


class StreamOutput(msgspec.Struct):
    """What one stream said.

    Attributes:
        error: why it did not finish; empty if it did.
        num_output_tokens: as the server counted them at the end.
        last_event_id: of the last event that had one.
    """

    choices: list[ChoiceOutput]
    error: str = ""
    num_output_tokens: int = 0
    last_event_id: str = ""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []


class _Choice(msgspec.Struct):
    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Event).decode


async def ask_served_model(session: aiohttp.ClientSession) -> ServedModel:
    """The server's first model and its limit.

    Raises:
        OctavoError: no server answers, or it says something else.
    """
    try:
        async with session.get("/v1/models") as response:
            body = await response.read()
            if response.status != 200:
                raise OctavoError(f"the server answered {response.status} to /v1/models: {body[:200]!r}")
    except aiohttp.ClientError as error:
        raise OctavoError(f"no server answers at this --url ({error}): start one with `octavo serve`") from error
    card = msgspec.json.decode(body)["data"][0]
    return ServedModel(card["id"], card["max_model_len"])


def make_recipes(model: ServedModel, count: int, *, seed: int, max_output_len: int) -> list[Recipe]:
    """So many different requests, every way of sampling among them, none longer than the model takes.

    Args:
        max_output_len: tokens of an answer; a fourth of the model's length at most is used.
    """
    chance = random.Random(seed)  # noqa: S311  # a workload, not a secret
    most_output = max(1, min(max_output_len, model.max_model_len // 4))
    # A word is at most six tokens for the worst of tokenizers; what is left is room for both.
    most_words = max(1, min(64, (model.max_model_len - most_output) // 8))
    vocabulary = _WORDS.split()
    recipes = []
    for index in range(count):
        kind, fields = _SAMPLING[index % len(_SAMPLING)]
        words = [chance.choice(vocabulary) for _ in range(chance.randint(1, most_words))]
        body = {
            "model": model.name,
            "prompt": " ".join(words),
            "max_tokens": chance.randint(max(1, most_output // 2), most_output),
            "truncate_prompt_tokens": max(1, model.max_model_len - most_output - 1),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "seed": chance.getrandbits(31),
            **fields,
        }
        recipes.append(Recipe(kind, msgspec.json.encode(body), int(str(fields.get("n", 1)))))
    return recipes


_SAMPLING: Final[tuple[tuple[str, dict[str, object]], ...]] = (
    ("greedy", {"temperature": 0}),
    ("seeded", {"temperature": 0.8, "top_p": 0.95}),
    ("greedy, logprobs", {"temperature": 0, "logprobs": 3}),
    ("seeded, n=2", {"temperature": 1.0, "top_k": 50, "n": 2}),
    ("seeded, penalties", {"temperature": 0.7, "frequency_penalty": 0.6, "presence_penalty": 0.3}),
    ("seeded, logprobs, n=3", {"temperature": 0.9, "min_p": 0.02, "logprobs": 2, "n": 3}),
)


async def read_stream(
    session: aiohttp.ClientSession,
    recipe: Recipe,
    on_news: Callable[[float], None] = lambda at: None,
    *,
    resume: StreamOutput | None = None,
) -> StreamOutput:
    """Ask, and read the answer to its end or its failure.

    Args:
        on_news: called with the time (`time.monotonic`) whenever something arrived.
        resume: what an earlier connection brought of the same stream; the server is asked for what follows.
    """
    output = resume or StreamOutput([ChoiceOutput() for _ in range(recipe.num_choices)])
    output.error = ""
    headers = {"Content-Type": "application/json"}
    if resume is not None:
        headers["Last-Event-ID"] = resume.last_event_id
    is_whole = False
    try:
        async with session.post("/v1/completions", data=recipe.body, headers=headers) as response:
            if response.status != 200:
                output.error = f"status {response.status}: {(await response.text())[:200]}"
                return output
            async for line in response.content:
                if line.startswith(b"data: {"):
                    on_news(time.monotonic())
                    event = _decode(line[6:])
                    if event.error is not None:
                        output.error = f"{event.error.get('code')}: {event.error.get('message')}"
                        return output
                    _add(output, event)
                elif line.startswith(b"id: "):
                    output.last_event_id = line[4:].decode().strip()
                elif line.startswith(_END):
                    is_whole = True
    except (aiohttp.ClientError, ConnectionError, ValueError, msgspec.DecodeError) as error:
        output.error = f"{type(error).__name__}: {error}"
        return output
    if not is_whole:
        output.error = "the stream broke off"
    elif not all(choice.finish_reason for choice in output.choices):
        output.error = "the stream ended before all of its sequences did"
    return output


def _add(output: StreamOutput, event: _Event) -> None:
    if event.usage is not None:
        output.num_output_tokens = event.usage.completion_tokens
    for said in event.choices:
        if not 0 <= said.index < len(output.choices):
            raise ValueError(f"an event for sequence {said.index} of {len(output.choices)}")
        choice = output.choices[said.index]
        choice.text += said.text
        choice.token_ids += said.token_ids
        choice.finish_reason = said.finish_reason or choice.finish_reason
        if said.logprobs is not None:
            choice.logprobs += [value for value in said.logprobs.token_logprobs if value is not None]
            for top in said.logprobs.top_logprobs:
                choice.logprobs += sorted((top or {}).values(), reverse=True)


def difference(expected: StreamOutput, got: StreamOutput) -> str:
    """In a few words where two answers differ; empty if they are the same."""
    for index, (ours, theirs) in enumerate(zip(expected.choices, got.choices, strict=True)):
        where = f"sequence {index}: " if len(expected.choices) > 1 else ""
        for position, (token, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=False)):
            if token != other:
                return f"{where}token {position} is {other}, was {token}"
        if len(ours.token_ids) != len(theirs.token_ids):
            return f"{where}{len(theirs.token_ids)} tokens, were {len(ours.token_ids)}"
        if ours.text != theirs.text:
            return f"{where}text differs: {theirs.text[-40:]!r} was {ours.text[-40:]!r}"
        if ours.finish_reason != theirs.finish_reason:
            return f"{where}ended by {theirs.finish_reason}, was {ours.finish_reason}"
        if len(ours.logprobs) != len(theirs.logprobs):
            return f"{where}{len(theirs.logprobs)} log-probabilities, were {len(ours.logprobs)}"
        for value, other_value in zip(ours.logprobs, theirs.logprobs, strict=True):
            if not abs(value - other_value) <= MAX_LOGPROB_DIFFERENCE:  # NaN is never the same
                return f"{where}a log-probability is {other_value:.6f}, was {value:.6f}"
    if expected.num_output_tokens != got.num_output_tokens:
        return f"usage says {got.num_output_tokens} tokens, said {expected.num_output_tokens}"
    return ""
