"""The clients, and the front end that they reach: every stream is compared with its oracle, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from ...messages.base import Message
from ...messages.ids import RequestId
from ...messages.request import CancelRequest, PromptReady, RequestEnded, StepTexts, SubmitPrompt, TextDelta
from ..agenda import Agenda
from .network import VirtualClock
from .oracle import Oracle
from .scenario import Client
from .violation import Violation
from .vocabulary import Vocabulary

MAX_OVERDUE = 3
"""How often a request may be found live behind its deadline: news of its end may be on a clogged link."""


class Stream:
    """One sequence, as its client sees it.

    Attributes:
        num_prompt: tokens of the prompt as it was sent.
        num_tokens: tokens received.
        num_overdue: how often it was found live behind its deadline.
        num_waiting: messages that a slow reader has not read; `read_ns` is when it read last.
        ended: how it ended; None while it runs, or once nobody waits for it.
        ended_ns: when, in virtual time.
        is_given_up: the client has cancelled it.
    """

    __slots__ = (
        "client",
        "deadline_ns",
        "ended",
        "ended_ns",
        "is_given_up",
        "num_overdue",
        "num_prompt",
        "num_tokens",
        "num_waiting",
        "prompt_logprobs",
        "read_ns",
        "request_id",
        "texts",
    )

    def __init__(self, request_id: RequestId, client: Client, num_prompt: int, deadline_ns: int) -> None:
        self.request_id = request_id
        self.client = client
        self.num_prompt = num_prompt
        self.num_overdue = 0
        self.deadline_ns = deadline_ns
        self.num_tokens = 0
        self.texts: list[str] = []
        self.num_waiting = 0
        self.read_ns = 0
        self.prompt_logprobs = 0
        self.ended: RequestEnded | None = None
        self.ended_ns = -1
        self.is_given_up = False

    @property
    def is_live(self) -> bool:
        return self.ended is None and not self.is_given_up


class FrontEndModel:
    """Sends what the clients want, and holds what they get against what they should get.

    Args:
        agenda, clock: virtual time, and what is seen of it.
        oracles: of the requests that were tokenized.
        vocabulary: what tokens spell.
        send: says a message in the front end's name.
        may_end_so: whether an end that the oracle does not know may be: `(stream, account, now_ns)`.
        max_prompt: conversations are cut to their last so many tokens.
    """

    def __init__(
        self,
        agenda: Agenda,
        clock: VirtualClock,
        *,
        oracles: Mapping[RequestId, Oracle],
        vocabulary: Vocabulary,
        send: Callable[[Message], None],
        may_end_so: Callable[[Stream, RequestEnded, int], bool],
        max_prompt: int,
    ) -> None:
        self._agenda = agenda
        self._clock = clock
        self._oracles = oracles
        self._vocabulary = vocabulary
        self._send = send
        self._may_end_so = may_end_so
        self._next_id = 0
        self._max_prompt = max_prompt
        self._first_ids: dict[int, RequestId] = {}  # of each client, by its number
        self.streams: dict[RequestId, Stream] = {}
        self.num_live = 0
        self.num_live_with_deadline = 0

    def submit(self, number: int, client: Client) -> None:
        """Send a client's prompt now."""
        now_ns = self._clock.now_ns()
        self._first_ids[number] = RequestId(self._next_id)
        prompt = client.prompt
        before = self._oracles.get(self._first_ids.get(client.follows, RequestId(-1)))
        if before is not None:
            prompt = (*before.tokens[: before.num_prompt + before.num_outputs], *prompt)[-self._max_prompt :]
        request_ids = tuple(RequestId(self._next_id + index) for index in range(client.params.n))
        self._next_id += client.params.n
        deadline_ns = now_ns + client.timeout_ns if client.timeout_ns else 0
        self._send(
            SubmitPrompt(
                request_ids,
                prompt,
                client.params,
                arrival_ns=now_ns,
                priority=client.priority,
                cache_salt=client.cache_salt,
                deadline_ns=deadline_ns,
            )
        )
        for request_id in request_ids:
            self.streams[request_id] = Stream(request_id, client, len(prompt), deadline_ns)
            self.num_live += 1
            self.num_live_with_deadline += deadline_ns > 0
        if client.cancel_after_ns >= 0:
            # Some give up the first sequence alone, the others all of them, the last first.
            for request_id in request_ids[:1] if client.cancel_after_ns % 2 else reversed(request_ids):
                self._agenda.add(self._agenda.now_ns + client.cancel_after_ns, 0, partial(self.cancel, request_id))

    def cancel(self, request_id: RequestId) -> None:
        """The client gives up; a cancel may also come too late."""
        stream = self.streams[request_id]
        if stream.is_live:
            stream.is_given_up = True
            self._forget(stream)
        self._send(CancelRequest(request_id))

    def end_all(self, why: str) -> None:
        """The engine is broken: end every live stream with an error."""
        for stream in self.streams.values():
            if stream.is_live:
                stream.ended = RequestEnded(stream.request_id, "error", error_code="executor_lost", error=why)
                self._forget(stream)

    def check_deadlines(self) -> None:
        """Nobody lives on behind his deadline."""
        now_ns = self._clock.now_ns()
        for stream in self.streams.values():
            if 0 < stream.deadline_ns <= now_ns and stream.is_live:
                stream.num_overdue += 1
                if stream.num_overdue > MAX_OVERDUE:
                    raise Violation("a deadline has passed and nothing happens", f"request {stream.request_id}")

    def _forget(self, stream: Stream) -> None:
        self.num_live -= 1
        self.num_live_with_deadline -= stream.deadline_ns > 0

    def handle(self, message: Message, now_ns: int) -> Iterable[Message]:
        """Take what a stream gained."""
        if isinstance(message, StepTexts):
            for request_id, text, token_id in zip(message.request_ids, message.texts, message.token_ids, strict=True):
                self._gain(TextDelta(request_id, text, (token_id,)), now_ns)
        elif isinstance(message, TextDelta):
            self._gain(message, now_ns)
        elif isinstance(message, PromptReady) and message.request_ids[0] not in self.streams:
            raise Violation("a prompt was tokenized that nobody sent", str(message.request_ids))
        return ()

    def _gain(self, delta: TextDelta, now_ns: int) -> None:
        stream = self.streams.get(delta.request_id)
        if stream is None:
            raise Violation("text arrives for a request that nobody sent", f"request {delta.request_id}")
        if stream.is_given_up:
            return
        if stream.ended is not None:
            raise Violation("a stream goes on after its end", f"request {delta.request_id}")
        self._take(stream, delta)
        if delta.finish_reason is not None:
            self._end(stream, delta, now_ns)
        elif self._wants_no_more(stream):
            self.cancel(stream.request_id)

    def _take(self, stream: Stream, delta: TextDelta) -> None:
        if delta.token_ids:
            oracle = self._oracles[stream.request_id]
            for token_id in delta.token_ids:
                position = oracle.num_prompt + stream.num_tokens
                stream.num_tokens += 1
                if stream.num_tokens > oracle.num_outputs:
                    raise Violation("a stream has more tokens than its answer", f"request {stream.request_id}")
                if oracle.token_at(position) != token_id:
                    raise Violation(
                        "a stream's token is not the one that belongs there",
                        f"request {stream.request_id}, output {stream.num_tokens - 1}: {token_id}",
                    )
        if delta.text:
            stream.texts.append(delta.text)
        if delta.prompt_logprobs:
            self._check_prompt_logprobs(stream, delta)

    def _check_prompt_logprobs(self, stream: Stream, delta: TextDelta) -> None:
        oracle = self._oracles[stream.request_id]
        stream.prompt_logprobs += 1
        # Who ends early is told what there is; the others everything, once.
        is_early = delta.finish_reason in {"abort", "error", "refused"}
        wrong = stream.prompt_logprobs > 1 or len(delta.prompt_logprobs) != oracle.num_prompt
        for position, entry in enumerate(delta.prompt_logprobs):
            if entry is None:
                wrong |= position > 0 and not is_early
            else:
                wrong |= entry.token_id != oracle.tokens[position]
        if wrong:
            raise Violation("log-probabilities of a prompt are not its own, whole and once", f"{delta.request_id}")

    def _wants_no_more(self, stream: Stream) -> bool:
        client = stream.client
        if 0 <= client.cancel_after_tokens <= stream.num_tokens:
            return True
        if client.read_every_ns:
            now_ns = self._agenda.now_ns
            num_read = (now_ns - stream.read_ns) // client.read_every_ns
            stream.read_ns = (
                now_ns if num_read >= stream.num_waiting else stream.read_ns + num_read * client.read_every_ns
            )
            stream.num_waiting = max(0, stream.num_waiting - num_read) + 1
            return stream.num_waiting > client.read_buffer
        return False

    def _end(self, stream: Stream, delta: TextDelta, now_ns: int) -> None:
        ended = delta.ended
        if ended is None:
            raise Violation("a stream ends without an account", f"request {stream.request_id}")
        stream.ended = ended
        stream.ended_ns = self._agenda.now_ns
        self._forget(stream)
        detail = f"request {stream.request_id} ended with {delta.finish_reason!r} after {stream.num_tokens} tokens"
        if ended.num_output_tokens != stream.num_tokens:
            raise Violation("the account counts other tokens than the client got", f"{detail}: {ended}")
        if delta.finish_reason in {"abort", "error", "refused"}:
            if not self._may_end_so(stream, ended, now_ns):
                raise Violation("a request ends for no reason", f"{detail}: {ended}")
            if delta.finish_reason == "refused" and (stream.num_tokens or stream.texts):
                raise Violation("a refused request has an answer", detail)
            return
        oracle = self._oracles[stream.request_id]
        if oracle.submit.params.prompt_logprobs is not None and stream.prompt_logprobs != 1:
            raise Violation("log-probabilities of a prompt were not sent", detail)
        if oracle.submit.params.max_tokens == 0:
            if delta.finish_reason != "length" or stream.num_tokens or stream.texts:
                raise Violation("a request for no tokens got some, or another end", detail)
            return
        text, stop_string, num_tokens = oracle.text(self._vocabulary)
        reason = "stop" if stop_string else oracle.reason
        if stream.num_tokens != num_tokens or delta.finish_reason != reason:
            raise Violation("a stream ends too early or too late", f"{detail}, not {reason!r} after {num_tokens}")
        if "".join(stream.texts) != text:
            raise Violation("a text is not what its tokens spell", f"{detail}: {stream.texts!r}, not {text!r}")
        if stop_string and delta.stop_reason != stop_string:
            raise Violation("a stream names another stop string", f"{detail}: {delta.stop_reason!r}")
