"""Which ends a request may have that its oracle does not know."""

from __future__ import annotations

from ...messages.request import RequestEnded
from .clients import Stream
from .ring_watch import RingWatch
from .scenario import LOSING, Scenario
from .vocabulary import EOS_TOKEN


class Excuses:
    """Knows what has gone wrong, and so whom it may have hit.

    Args:
        scenario: of the run.
        ring: what the scheduler has been told.

    Attributes:
        ring: likewise; another one once the engine was replaced.
    """

    def __init__(self, scenario: Scenario, ring: RingWatch) -> None:
        self._scenario = scenario
        self.ring = ring
        self.num_poisons = sum(client.params.n for client in scenario.clients if client.is_poison)
        self.loses_executors = any(fault.kind in LOSING for fault in scenario.faults)

    def allow(self, stream: Stream, ended: RequestEnded, now_ns: int) -> bool:
        """Whether something explains that a stream ended so, now."""
        if ended.reason == "abort":
            return 0 < stream.deadline_ns <= now_ns
        if ended.reason == "refused":
            return self._allow_refusal(stream, ended)
        if ended.error_code == "request_quarantined":
            # Held to be the cause of losses: right for a poison, a wrong guess only where losses have several causes.
            if self.ring.num_losses <= self._scenario.scheduler.max_executor_losses:
                return False
            if stream.client.is_poison_in_company:
                return True
            return stream.client.is_poison or self.num_poisons > 1 or self.loses_executors
        return ended.error_code == "request_failed" and self.ring.num_row_failures > 0

    def _is_like_a_convict(self, stream: Stream) -> bool:
        """Whether an equal prompt was found to kill executors."""
        own = self.ring.ever_submitted[stream.request_id]
        return any(
            (convict.prompt_token_ids, convict.cache_salt) == (own.prompt_token_ids, own.cache_salt)
            for convict in self.ring.convicts
        )

    def _allow_refusal(self, stream: Stream, ended: RequestEnded) -> bool:
        config, client = self._scenario.scheduler, stream.client
        submit = self.ring.submitted.get(stream.request_id)
        if submit is not None and submit.is_taken_up_again and ended.error_code != "context_length_exceeded":
            return False
        if ended.error_code == "engine_closed":
            return self.ring.is_to_drain
        if ended.error_code == "queue_full":
            # An engine that has died since may have said so.
            num_sequences = len(self.ring.ever_submitted)
            num_tokens = num_sequences * config.max_sequence_len
            return num_sequences > config.max_num_queued_requests or num_tokens > config.max_num_queued_tokens
        if ended.error_code == "request_quarantined":
            return self._is_like_a_convict(stream)
        if ended.error_param == "stop_token_ids":
            # Of a vocabulary so small that every token of it may end the answer, and none may be first.
            ends = {*client.params.stop_token_ids, *(() if client.params.ignore_eos else (EOS_TOKEN,))}
            return client.params.min_tokens > 0 and ends.issuperset(range(config.vocab_size))
        max_tokens = client.params.max_tokens or 1
        return ended.error_code == "context_length_exceeded" and (
            stream.num_prompt + max_tokens > config.max_model_len or stream.num_prompt >= config.max_sequence_len
        )
