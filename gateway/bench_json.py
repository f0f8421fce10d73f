"""`python -m octavo.gateway.bench_json`: how long the longest bodies that are let in hold up the event loop.

A body is decoded at once, at once in another thread, and in turns, and each time the longest wait of a loop that does
nothing else is taken, in CPU time of the decoding thread where it is known (others may use the machine).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import random
import statistics
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from .api.http_errors import ApiError
from .api.json_body import BodyDecoder
from .api.protocol import ChatRequest, CompletionRequest


def _bodies(num_bytes: int) -> dict[str, tuple[BodyDecoder[CompletionRequest] | BodyDecoder[ChatRequest], bytes]]:
    chance = random.Random(0)  # noqa: S311  # a workload, not a secret
    text, chat = BodyDecoder(CompletionRequest), BodyDecoder(ChatRequest)
    ids = [str(chance.randrange(10_000, 100_000)) for _ in range(num_bytes // 6)]
    rows = ["[" + ",".join(ids[start : start + 8000]) + "]" for start in range(0, len(ids), 8000)]
    words = 'He said: "a, {b} [c]".\n' * (num_bytes // 27)
    return {
        "token ids": (text, f'{{"prompt":[{",".join(ids)}]}}'.encode()),
        "lists of token ids": (text, f'{{"prompt":[{",".join(rows)}]}}'.encode()),
        "empty lists": (text, f'{{"prompt":[{",".join(["[]"] * (num_bytes // 3))}]}}'.encode()),
        "empty texts": (text, ('{"prompt":[' + ",".join(['""'] * (num_bytes // 3)) + "]}").encode()),
        "one text": (text, json.dumps({"prompt": words}).encode()),
        "a conversation": (chat, json.dumps({"messages": [{"role": "user", "content": words}]}).encode()),
    }


def _at_once(decode: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    begin = time.thread_time()
    with contextlib.suppress(ApiError):
        decode()
    return (time.thread_time() - begin) * 1e3


def _in_thread(decode: Callable[[], object]) -> float:
    """Longest wait of this thread, in milliseconds, while another one decodes."""
    thread = threading.Thread(target=_at_once, args=(decode,))
    longest, last = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest * 1e3


async def _in_turns(decoder: BodyDecoder[CompletionRequest] | BodyDecoder[ChatRequest], body: bytes) -> float:
    """CPU milliseconds of the longest turn of the loop."""
    longest = 0.0
    task = asyncio.ensure_future(decoder.decode_in_turns(body))
    while not task.done():
        begin = time.thread_time()
        await asyncio.sleep(0)
        longest = max(longest, time.thread_time() - begin)
    task.exception()
    return longest * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of each body")
    parser.add_argument("--repeats", type=int, default=7, help="medians are printed")
    arguments = parser.parse_args()
    table = Table("body", "at once", "in a thread", "in turns")
    for name, (decoder, body) in _bodies(int(arguments.megabytes * 2**20)).items():
        decode = functools.partial(decoder.decode, body)
        rounds = [
            (_at_once(decode), _in_thread(decode), asyncio.run(_in_turns(decoder, body)))
            for _ in range(arguments.repeats)
        ]
        medians = [f"{statistics.median(column):.1f} ms" for column in zip(*rounds, strict=True)]
        table.add_row(f"{name}, {len(body) / 1e6:.1f} MB", *medians)
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
