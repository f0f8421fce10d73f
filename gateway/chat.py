"""`octavo run`: a conversation in the terminal, streamed."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time

import msgspec

from ..actors.runtime.logs import configure_logs
from ..messages.errors import ContextLengthExceededError, InvalidRequestError
from ..messages.sampling import SamplingParams
from .config import EngineConfig, make_config
from .engine import Engine
from .flags import engine_fields
from .generation_config import RequestDefaults, say_request_defaults


def chat(arguments: argparse.Namespace) -> int:
    """Answer `--prompt`, or converse until end of input."""
    configure_logs("human")
    config = make_config(engine_fields(arguments))
    # One answer at a time: no KV cache for hundreds.
    config = msgspec.structs.replace(config, max_num_seqs=min(config.max_num_seqs, 4))
    return asyncio.run(_chat(config, arguments))


async def _chat(config: EngineConfig, arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    async with Engine(config=config) as engine:
        say_request_defaults(engine.request_defaults)
        params = chat_params(arguments, engine.request_defaults)
        history: list[dict[str, str]] = []
        if arguments.system:
            history.append({"role": "system", "content": arguments.system})
        if arguments.prompt is not None:
            history.append({"role": "user", "content": arguments.prompt})
            await _answer(engine, history, params)
            return 0
        print(f"{engine.model_name}, ready in {time.monotonic() - started:.1f} s. /clear starts over, Ctrl-D ends.")
        lines = LineReader(sys.stdin.fileno())
        while True:
            print("\n> ", end="", flush=True)
            line = await lines.read()
            if line is None:
                print()
                return 0
            text = line.strip()
            if text == "/clear":
                history = [message for message in history if message["role"] == "system"]
            elif text:
                history.append({"role": "user", "content": text})
                try:
                    answer = await _answer(engine, history, params)
                except InvalidRequestError as error:
                    history.pop()
                    hint = " /clear starts over." if isinstance(error, ContextLengthExceededError) else ""
                    print(f"octavo: {error}.{hint}", file=sys.stderr)
                else:
                    history.append({"role": "assistant", "content": answer})


def chat_params(arguments: argparse.Namespace, defaults: RequestDefaults) -> SamplingParams:
    """How to answer: as the flags say, where they say nothing as the checkpoint does, else as suits small models."""
    flags = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens")}
    asked = {name: value for name, value in flags.items() if value is not None}
    suited = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 512}
    missing = {name: value for name, value in suited.items() if name not in defaults.told}
    fields = {**missing, **asked}
    return msgspec.structs.replace(defaults.params, clip_max_tokens=True, **fields)


class LineReader:
    """Lines of a file descriptor, waited for on the event loop: a thread in `input` would outlive Ctrl-C.

    Args:
        fd: a terminal, a pipe or a file.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._is_at_end = False

    async def read(self) -> str | None:
        """The next line without its end, or None at the end of input."""
        while b"\n" not in self._rest and not self._is_at_end:
            await self._wait_readable()
            piece = os.read(self._fd, 65536)
            self._is_at_end = not piece
            self._rest += piece
        if not self._rest:
            self._is_at_end = False  # a terminal may go on after Ctrl-D
            return None
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        try:
            loop.add_reader(self._fd, readable.set)
        except PermissionError:  # a regular file, which never makes anyone wait
            return
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._fd)


async def _answer(engine: Engine, history: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream one answer to standard output; its rate goes to standard error."""
    started = time.monotonic()
    num_tokens = 0
    texts: list[str] = []
    prompt = Engine.chat_prompt(history)
    async for delta in engine.stream(prompt, params, add_special_tokens=False):
        texts.append(delta.text)
        num_tokens += len(delta.token_ids)
        print(delta.text, end="", flush=True)
    print()
    if sys.stderr.isatty():
        seconds = time.monotonic() - started
        print(f"\033[2m{num_tokens} tokens, {num_tokens / seconds:.1f} a second\033[0m", file=sys.stderr)
    return "".join(texts)
