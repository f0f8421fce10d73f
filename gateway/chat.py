"""`octavo run`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import msgspec

from ..messages.sampling import SamplingParams
from .config import EngineConfig
from .engine import Engine
from .flags import engine_fields
from .logs import configure_logs


def chat(arguments: argparse.Namespace) -> int:
    """Answer `--prompt`, or converse until end of input."""
    configure_logs("human")
    config = msgspec.convert({**engine_fields(arguments), "max_num_seqs": 4}, EngineConfig)
    return asyncio.run(_chat(config, arguments))


async def _chat(config: EngineConfig, arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    async with Engine(config=config) as engine:
        params = SamplingParams(
            temperature=arguments.temperature, top_p=arguments.top_p, max_tokens=arguments.max_tokens
        )
        history: list[dict[str, str]] = []
        if arguments.system:
            history.append({"role": "system", "content": arguments.system})
        if arguments.prompt is not None:
            history.append({"role": "user", "content": arguments.prompt})
            await _answer(engine, history, params)
            return 0
        print(f"{engine.model_name}, ready in {time.monotonic() - started:.1f} s. /clear starts over, Ctrl-D ends.")
        while True:
            try:
                text = (await asyncio.to_thread(input, "\n> ")).strip()
            except EOFError:
                print()
                return 0
            if text == "/clear":
                history = [message for message in history if message["role"] == "system"]
            elif text:
                history.append({"role": "user", "content": text})
                answer = await _answer(engine, history, params)
                history.append({"role": "assistant", "content": answer})


async def _answer(engine: Engine, history: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream one answer to standard output; its rate goes to standard error."""
    started = time.monotonic()
    num_tokens = 0
    texts: list[str] = []
    async for delta in engine.stream(Engine.chat_prompt(history), params, add_special_tokens=False):
        texts.append(delta.text)
        num_tokens += len(delta.token_ids)
        print(delta.text, end="", flush=True)
    print()
    if sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"\033[2m{num_tokens} tokens, {num_tokens / seconds:.1f} a second\033[0m", file=sys.stderr)
    return "".join(texts)
