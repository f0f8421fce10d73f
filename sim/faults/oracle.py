"""What each request should produce, computed without any engine."""

from __future__ import annotations

from array import array
from codecs import getincrementaldecoder

from ...messages.request import FinishReason, SubmitRequest
from .vocabulary import Vocabulary

_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15


class Oracle:
    """The one true stream of a request: a pure function of its prompt, salt and seed.

    A token's KV depends on all tokens before it, and on nothing else: a 64-bit hash of that history stands for it. The
    next token is drawn from the history and the request's seed.

    Attributes:
        tokens: prompt and outputs; goes on past the end, for rows that were planned before the end was known.
        histories: `histories[i]` stands for the KV of `tokens[i]`.
        num_prompt: tokens of the prompt.
        num_outputs: tokens of the answer, if nobody interferes.
        reason: why it ends then.
        is_poison: computing it kills the executor.
        is_poison_in_company: computing two such in one step does.
    """

    __slots__ = (
        "_chunks",
        "_multiplier",
        "_seed",
        "_vocab",
        "histories",
        "is_poison",
        "is_poison_in_company",
        "num_outputs",
        "num_prompt",
        "reason",
        "stop_ids",
        "submit",
        "tokens",
    )

    def __init__(
        self,
        submit: SubmitRequest,
        max_len: int,
        vocab: int,
        *,
        is_poison: bool = False,
        is_poison_in_company: bool = False,
    ) -> None:
        self.submit = submit
        self.is_poison = is_poison
        self.is_poison_in_company = is_poison_in_company
        self.tokens = array("i", submit.prompt_token_ids).tolist()
        self.num_prompt = len(self.tokens)
        self._vocab = vocab
        self._seed = ((submit.params.seed or 0) * 2 + 1) * 0xD1342543DE82EF95 & _MASK
        history = 7
        for byte in submit.cache_salt.encode():
            history = (history ^ (byte + 1)) * _MULTIPLIER & _MASK
        self.histories: list[int] = []
        for token in self.tokens:
            history = (history ^ (token + 1)) * _MULTIPLIER & _MASK
            self.histories.append(history)
        self._chunks: list[list[int]] = []
        params = submit.params
        self.stop_ids = (*submit.eos_token_ids, *params.stop_token_ids)
        room = max(0, max_len - self.num_prompt)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        self.reason: FinishReason = "length"
        self.num_outputs = 0
        while self.num_outputs < limit:
            self.num_outputs += 1
            token = self.token_at(self.num_prompt + self.num_outputs - 1)
            if token in self.stop_ids and self.num_outputs >= params.min_tokens:
                self.reason = "stop"
                break

    def token_at(self, position: int) -> int:
        """Token at a position of prompt and outputs."""
        tokens, histories = self.tokens, self.histories
        while len(tokens) <= position:
            history = histories[-1]
            # The low bits of a product know only the low bits of its factors: draw from the high ones.
            token = ((history ^ self._seed) * _MULTIPLIER & _MASK) >> 34
            token %= self._vocab
            tokens.append(token)
            histories.append((history ^ (token + 1)) * _MULTIPLIER & _MASK)
        return tokens[position]

    def full_block(self, index: int, size: int) -> list[int]:
        """Histories that a full block of this request holds; the block size is always the same."""
        chunks = self._chunks
        while len(chunks) <= index:
            begin = len(chunks) * size
            self.token_at(begin + size - 1)
            chunks.append(self.histories[begin : begin + size])
        return chunks[index]

    def outputs(self) -> list[int]:
        """Tokens of the answer."""
        return self.tokens[self.num_prompt : self.num_prompt + self.num_outputs]

    def text(self, vocabulary: Vocabulary) -> tuple[str, str, int]:
        """The answer as text: `(text, stop string that cut it or "", tokens until then)`.

        Written for being plainly right: after each character, does the text end with a stop string?
        """
        params = self.submit.params
        decoder = getincrementaldecoder("utf-8")("replace")
        text = ""
        outputs = self.outputs()
        for number, token in enumerate(outputs, 1):
            is_last = number == len(outputs)
            is_stop_token = is_last and self.reason == "stop"
            skipped = is_stop_token and not params.include_stop_str_in_output
            data = b"" if skipped or token in vocabulary.special_token_ids else vocabulary.token_bytes(token)
            for char in decoder.decode(data, is_last):
                text += char
                if number > params.min_tokens:
                    matches = [string for string in params.stop if text.endswith(string)]
                    if matches:
                        longest = max(matches, key=len)
                        if not params.include_stop_str_in_output:
                            text = text[: -len(longest)]
                        return text, longest, number
        return text, "", len(outputs)
