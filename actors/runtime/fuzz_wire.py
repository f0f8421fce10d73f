"""`python -m octavo.actors.runtime.fuzz_wire --mutations 10000000`: damaged traffic never decodes and never crashes.

Recorded frames are flipped, cut, extended and spliced. Nothing that differs from what was sent may be accepted: neither
as a frame (the CRC) nor, behind a CRC made to fit, as anything but a message in range or `MalformedMessageError`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from ...messages.base import Message
from .envelope import DATA, HEAD_BYTES, NotAnEnvelopeError, seal, unseal
from .schema import all_messages
from .wire import Decoder, Encoder, MalformedMessageError


def record(messages: Sequence[Message]) -> list[bytes]:
    """The frames of these messages, as a link sends them."""
    encoder = Encoder()
    return [seal(DATA, 1, sequence, encoder.encode(message)[0]) for sequence, message in enumerate(messages, 1)]


def mutate(frame: bytes, frames: Sequence[bytes], chance: random.Random) -> bytes:
    """A damaged copy."""
    damaged = bytearray(frame)
    kind = chance.randrange(5)
    if kind <= 1:
        for _ in range(chance.choice((1, 1, 2, 8))):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del damaged[chance.randrange(len(damaged)) :]
    elif kind == 3:
        damaged.insert(chance.randrange(len(damaged)), chance.randrange(256))
    else:
        other = chance.choice(frames)
        damaged[chance.randrange(len(damaged)) :] = other[chance.randrange(len(other)) :]
    return bytes(damaged)


def fuzz(frames: Sequence[bytes], num_mutations: int, seed: int) -> tuple[int, int]:
    """Try mutations; returns how many were refused as frames, and how many re-sealed bodies were refused.

    Raises:
        AssertionError: a damaged frame was accepted. Any other exception than the two refusals escapes: a crash.
    """
    chance = random.Random(seed)  # noqa: S311  # a test, not a secret
    decoder = Decoder(all_messages())
    known = set(frames)
    num_refused = num_refused_bodies = 0
    for _ in range(num_mutations):
        damaged = mutate(chance.choice(frames), frames, chance)
        try:
            unseal(damaged)
        except NotAnEnvelopeError:
            num_refused += 1
        else:
            assert damaged in known, f"a damaged frame was accepted (seed {seed}): {damaged.hex()}"
        resealed = seal(DATA, 1, 1, damaged[HEAD_BYTES:])
        try:
            decoder.decode(memoryview(resealed)[HEAD_BYTES:])
        except MalformedMessageError:
            num_refused_bodies += 1
    return num_refused, num_refused_bodies


def sample_messages() -> list[Message]:
    """A message or more of the kinds that carry most."""
    from ...messages.ids import BlockId, Epoch, RequestId, StepId
    from ...messages.request import (
        CancelRequest,
        ChatPrompt,
        PromptReady,
        RequestEnded,
        SubmitPrompt,
        SubmitRequest,
        TextDelta,
        TokenLogprobs,
    )
    from ...messages.sampling import SamplingParams
    from ...messages.step import ExecuteStep, StartRequest, StepExecuted

    params = SamplingParams(temperature=0.7, logit_bias={5: -1.5}, stop=("end",), seed=7)
    ids = tuple(map(RequestId, range(100, 132)))
    entry = TokenLogprobs(5, -0.25, 1, ((5, -0.25), (9, -3.5)))
    start = StartRequest(RequestId(140), bytes(64), 16, 0, params, (2,))
    return [
        CancelRequest(RequestId(3)),
        SubmitPrompt((RequestId(1),), "Once upon a time", params),
        SubmitPrompt(
            (RequestId(1), RequestId(2)), ChatPrompt(b'[{"role":"user","content":"hi"}]'), params, priority=-3
        ),
        PromptReady((RequestId(1),), tuple(range(40)), params),
        SubmitRequest(RequestId(9), bytes(40), params, (2,)),
        RequestEnded(RequestId(9), "stop", 4, 2),
        TextDelta(RequestId(9), "tale", (5,), (entry,), finish_reason="stop", stop_reason="end"),
        ExecuteStep(
            Epoch(0),
            StepId(7),
            ids,
            (1,) * 32,
            (start,),
            ((BlockId(4),),),
            ((ids[0], (BlockId(8), BlockId(9))),),
            (RequestId(99),),
        ),
        StepExecuted(Epoch(0), StepId(7), ids, tuple(range(32)), (ids[3],), ((ids[1], entry),), execute_ns=6_000_000),
    ]


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="python -m octavo.actors.runtime.fuzz_wire", description=__doc__)
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    frames = record(sample_messages())
    num_refused, num_bodies = fuzz(frames, arguments.mutations, arguments.seed)
    print(
        f"{arguments.mutations} mutations (seed {arguments.seed}): {num_refused} refused as frames, the others were "
        f"what was sent; {num_bodies} bodies refused behind a fitting CRC; no crash"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
