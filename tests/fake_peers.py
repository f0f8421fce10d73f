"""Engines that behave in some one way, for tests of the benchmark. Standard library only, as they run anywhere."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any


class Counting:
    """Answers each prompt with its last token and the numbers after it."""

    def is_available(self, options: Any) -> str:
        return ""

    def versions(self) -> dict[str, str]:
        return {"counting": "1.0"}

    def load(self, options: Any) -> dict[str, Any]:
        print("engines print what they like")
        return {"model": f"{options.dtype} by {options.num_threads}", "pid": os.getpid(), "python": sys.executable}

    def run(self, requests: Sequence[Any]) -> list[list[int]]:
        outputs = []
        for request in requests:
            sum(range(50_000 * request.num_output_tokens))  # more tokens have to take longer, or there is no rate
            outputs.append([request.token_ids[-1] + i for i in range(request.num_output_tokens)])
        return outputs


class Absent(Counting):
    def is_available(self, options: Any) -> str:
        return "not installed: anything"


class FailsToLoad(Counting):
    def load(self, options: Any) -> dict[str, Any]:
        raise OSError("no such model")


class Short(Counting):
    """Stops before it has all tokens."""

    def run(self, requests: Sequence[Any]) -> list[list[int]]:
        return [tokens[:-1] for tokens in super().run(requests)]


class Crashing(Counting):
    """Dies in the third run, long after it has been loaded."""

    num_runs = 0

    def run(self, requests: Sequence[Any]) -> list[list[int]]:
        self.num_runs += 1
        if self.num_runs == 3:
            print("about to die", file=sys.stderr, flush=True)
            os.abort()
        return super().run(requests)


class Hanging(Counting):
    def run(self, requests: Sequence[Any]) -> list[list[int]]:
        signal.pause()
        raise AssertionError("somebody sent a signal")
