"""The cores at a client's side, under virtual time: tokenizer, detokenizer, and the ledger that all passes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...actors.detokenizer.core import DetokenizerCore
from ...actors.ledger.core import LedgerCore
from ...actors.tokenizer.core import TokenizerConfig, TokenizerCore
from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.request import CancelRequest, StopMatched, SubmitPrompt, SubmitRequest
from .network import VirtualClock
from .oracle import Oracle
from .scenario import Client, Scenario
from .vocabulary import Vocabulary


class EdgeSide:
    """What an edge does with messages on their way to the engine and back.

    Args:
        scenario: of the run.
        clock: virtual time, as it is seen.
        client_of: who sent a request.
        has_ledger: whether the engine is another process, which may be lost without this one.

    Attributes:
        vocabulary: what tokens spell.
        oracles: of the requests that were tokenized.
        ledger: of those that live, if there is one.
        detokenizer: which has their streams.
    """

    def __init__(
        self,
        scenario: Scenario,
        clock: VirtualClock,
        *,
        client_of: Callable[[RequestId], Client],
        has_ledger: bool,
    ) -> None:
        self._scenario = scenario
        self._clock = clock
        self._client_of = client_of
        self._has_ledger = has_ledger
        self.vocabulary = Vocabulary(scenario.vocab)
        self.oracles: dict[RequestId, Oracle] = {}
        self.ledger = LedgerCore()
        self.detokenizer = DetokenizerCore(self.vocabulary)
        config = TokenizerConfig(vocab_size=scenario.vocab, max_model_len=scenario.scheduler.max_model_len)
        self._tokenizer = TokenizerCore(config, self.vocabulary)

    def handle_tokenizer(self, message: Message, now_ns: int) -> Iterable[Message]:
        """What the tokenizer answers, as far as the ledger lets it pass."""
        if isinstance(message, CancelRequest):
            return self._note_in_ledger(message)
        assert isinstance(message, SubmitPrompt), message
        answers: list[Message] = []
        for answer in self._tokenizer.handle(message, now_ns):
            if isinstance(answer, SubmitRequest):
                answers.extend(self._note_in_ledger(answer))
                self._consult_oracle(answer)
            else:
                answers.append(answer)
        return answers

    def handle_detokenizer(self, message: Message, now_ns: int) -> Iterable[Message]:
        """What the detokenizer answers, in the same way."""
        answers: list[Message] = []
        for answer in self.detokenizer.handle(message, now_ns):  # type: ignore[arg-type]  # hears what its routes say
            if isinstance(answer, StopMatched):
                answers.extend(self._note_in_ledger(answer))
            else:
                answers.append(answer)
        return answers

    def hear_engine(self, post: Callable[[Message], None], message: Message) -> None:
        """What the scheduler says passes the ledger before the detokenizer hears it."""
        for heard in self._note_in_ledger(message):
            post(heard)

    def _note_in_ledger(self, message: Message) -> Iterable[Message]:
        if not self._has_ledger:
            return (message,)
        return self.ledger.handle(message, self._clock.now_ns())  # type: ignore[arg-type]  # what its routes say

    def _consult_oracle(self, submit: SubmitRequest) -> None:
        scenario, client = self._scenario, self._client_of(submit.request_id)
        self.oracles[submit.request_id] = Oracle(
            submit,
            scenario.scheduler.max_sequence_len,
            scenario.vocab,
            is_poison=client.is_poison,
            is_poison_in_company=client.is_poison_in_company,
        )
