"""`python -m octavo.gateway.bench_journal`: what a journal costs, in bytes and CPU time for each token.

An engine on a model (the one that ships, unless another is named) answers random prompts, one at a time and then
many at a time, with a journal. Its messages are then recorded once more without an engine, and timed: that is what the
journal adds to the event loop. Tokens are those of prompts and answers together.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from ..actors.journal.core import JournalCore
from ..messages.sampling import SamplingParams
from ..sim.journal.player import Player
from ..sim.journal.reader import JournalReader
from .engine import Engine

_REPEATS = 5


async def _serve(engine: Engine, arguments: argparse.Namespace, at_once: int) -> int:
    """Answer prompts, so many at a time; return the number of tokens."""
    chance = random.Random(at_once)  # noqa: S311  # a workload, not a secret
    params = SamplingParams(max_tokens=arguments.output_len, temperature=0.0, ignore_eos=True)
    left = arguments.rounds * at_once
    num_tokens = 0

    async def answer() -> None:
        nonlocal left, num_tokens
        while left > 0:
            left -= 1
            prompt = [chance.randrange(engine.vocab_size) for _ in range(arguments.input_len)]
            output = await engine.generate(prompt, params)
            num_tokens += arguments.input_len + len(output.outputs[0].token_ids)

    await asyncio.gather(*[answer() for _ in range(at_once)])
    return num_tokens


async def _record(
    folder: Path, arguments: argparse.Namespace, at_once: int, *, journal_prompts: bool
) -> tuple[int, Path]:
    """Write a journal; return tokens and its file."""
    async with Engine(arguments.model, journal=str(folder), journal_prompts=journal_prompts) as engine:
        num_tokens = await _serve(engine, arguments, at_once)
    return num_tokens, folder / "engine.journal"


def _time_recording(path: Path) -> tuple[float, int]:
    """CPU seconds of recording what a journal holds once more, with hashed tokens; and the number of messages."""
    heard: list[tuple[str, Any, int, tuple[Any, ...]]] = []
    with JournalReader(path) as reader:
        header = reader.header
        player = Player(header)
        for entry in reader.entries():
            played = player.play(entry)
            heard.append((played.core, played.message, entry.now_ns, played.answers))
    least = float("inf")
    for _ in range(_REPEATS):
        answers: tuple[Any, ...] = ()

        def handle(message: Any, now_ns: int) -> tuple[Any, ...]:
            return answers  # noqa: B023  # of this message

        core = JournalCore(msgspec.structs.replace(header, has_tokens=False), lambda payload: None)
        handles = {"scheduler": core.wrap_scheduler(handle), "kv_allocator": core.wrap_allocator(handle)}
        began = time.process_time()
        for name, message, now_ns, answers in heard:  # noqa: B007  # read by `handle`
            handles[name](message, now_ns)
        core.end()
        least = min(least, time.process_time() - began)
    return least, len(heard)


def main() -> None:
    """Print one line for each number of requests at a time."""
    parser = argparse.ArgumentParser(prog="python -m octavo.gateway.bench_journal", description=__doc__)
    parser.add_argument("model", nargs="?", help="default: the model that ships")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=4, help="requests for each that is open at once")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    arguments = parser.parse_args()
    table = Table("at once", "tokens", "bytes/token", "with prompts", "messages/token", "CPU us/token", title="journal")
    for at_once in arguments.at_once:
        with tempfile.TemporaryDirectory() as folder:
            hashed, plain = Path(folder, "hashed"), Path(folder, "plain")
            num_tokens, hashed_file = asyncio.run(_record(hashed, arguments, at_once, journal_prompts=False))
            num_plain, plain_file = asyncio.run(_record(plain, arguments, at_once, journal_prompts=True))
            num_bytes, num_plain_bytes = hashed_file.stat().st_size, plain_file.stat().st_size
            seconds, num_messages = _time_recording(plain_file)
        table.add_row(
            str(at_once),
            str(num_tokens),
            f"{num_bytes / num_tokens:.1f}",
            f"{num_plain_bytes / num_plain:.1f}",
            f"{num_messages / num_plain:.2f}",
            f"{seconds / num_plain * 1e6:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
