"""What detokenizing costs, and recovering from a crash: `python -m octavo.actors.detokenizer.bench`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import structlog.testing

from ...messages.ids import Epoch, RequestId, StepId
from ...messages.request import PromptReady, StepTexts, TokenLogprobs
from ...messages.sampling import SamplingParams
from ...messages.step import StepExecuted
from .actor import DetokenizerActor
from .core import DetokenizerCore

NUM_ROWS = 256
NUM_STEPS = 400
_WORDS = b" the quick brown fox jumps over a lazy dog while nobody looks".split(b" ")


class _WordCodec:
    """1,000 words as a vocabulary, and the bytes of one emoji."""

    is_bytewise = True
    leading_space: Literal["keep", "drop_one", "drop_all"] = "keep"
    special_token_ids: frozenset[int] = frozenset()
    added_token_ids: frozenset[int] = frozenset()
    eos_token_ids: tuple[int, ...] = ()

    def token_bytes(self, token_id: int) -> bytes:
        if token_id >= 1000:
            return "🎼".encode()[token_id - 1000 : token_id - 999]
        return b" " + _WORDS[token_id % len(_WORDS)] + str(token_id).encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


def microseconds_per_step(params: SamplingParams, *, emoji: bool = False, num_steps: int = NUM_STEPS) -> float:
    """Median CPU time of one step of `NUM_ROWS` rows, us."""
    core = DetokenizerCore(_WordCodec())
    # Ids and counts past the small-int cache, as a server has them after a while.
    ids = tuple(RequestId(10_000 + i) for i in range(NUM_ROWS))
    for request_id in ids:
        core.handle(PromptReady((request_id,), (1, 2, 3), params), 0)
    logprobs = () if params.logprobs is None else tuple((request_id, TokenLogprobs(1, -0.5, 1)) for request_id in ids)
    times = []
    for i in range(num_steps):
        token = 1000 + i % 4 if emoji else 0
        tokens = tuple(token or (i * 31 + row * 7) % 1000 for row in range(NUM_ROWS))
        step = StepExecuted(Epoch(0), StepId(i), ids, tokens, logprobs=logprobs)
        start = time.thread_time_ns()
        deltas = core.handle(step, 0)
        times.append(time.thread_time_ns() - start)
        assert sum(len(delta.texts) if isinstance(delta, StepTexts) else 1 for delta in deltas) == NUM_ROWS
    return sorted(times)[num_steps // 2] / 1000


def microseconds_per_noted_step(num_steps: int = NUM_STEPS) -> float:
    """Median CPU time of one step through the actor, which takes note of every token, us."""
    actor, ids = _open_actor()
    times = []
    for i in range(num_steps):
        step = _plain_step(i, ids)
        start = time.thread_time_ns()
        actor.handle(step, 0)
        times.append(time.thread_time_ns() - start)
    return sorted(times)[num_steps // 2] / 1000


def milliseconds_to_recover(num_steps: int = NUM_STEPS) -> float:
    """CPU time in which a new core is brought to where `NUM_ROWS` streams of so many tokens are, ms."""
    actor, ids = _open_actor()
    for i in range(num_steps):
        actor.handle(_plain_step(i, ids), 0)
    actor.crash()
    with structlog.testing.capture_logs():
        start = time.thread_time_ns()
        actor.handle(_plain_step(num_steps, ids), 0)
        return (time.thread_time_ns() - start) / 1e6


def _open_actor() -> tuple[DetokenizerActor, tuple[RequestId, ...]]:
    actor = DetokenizerActor(lambda: DetokenizerCore(_WordCodec()))
    ids = tuple(RequestId(10_000 + i) for i in range(NUM_ROWS))
    for request_id in ids:
        actor.handle(PromptReady((request_id,), (1, 2, 3), SamplingParams(max_tokens=100_000)), 0)
    return actor, ids


def _plain_step(i: int, ids: tuple[RequestId, ...]) -> StepExecuted:
    return StepExecuted(Epoch(0), StepId(i), ids, tuple((i * 31 + row * 7) % 1000 for row in range(NUM_ROWS)))


def main() -> None:
    """Print a line for each path."""
    endless = SamplingParams(max_tokens=100_000)
    cases = (
        ("plain", endless, False),
        ("bytes of characters", endless, True),
        ("two stop strings", SamplingParams(max_tokens=100_000, stop=("\n\n", "User:")), False),
        ("logprobs", SamplingParams(max_tokens=100_000, logprobs=0), False),
    )
    for name, params, emoji in cases:
        cost = microseconds_per_step(params, emoji=emoji)
        print(f"{name:22} {cost:7.1f} us a step of {NUM_ROWS} rows, {cost / NUM_ROWS:5.2f} us a token")
    cost = microseconds_per_noted_step()
    print(f"{'plain, noted':22} {cost:7.1f} us a step of {NUM_ROWS} rows, {cost / NUM_ROWS:5.2f} us a token")
    print(f"{'recovering':22} {milliseconds_to_recover():7.1f} ms for {NUM_ROWS} streams of {NUM_STEPS} tokens")


if __name__ == "__main__":
    main()
