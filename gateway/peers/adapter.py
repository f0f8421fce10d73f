"""What the benchmark asks of an engine. Standard library only: a peer may live in another environment than octavo."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Protocol


@dataclass(frozen=True)
class Request:
    """One prompt, and exactly `num_output_tokens` to come of it whatever the end token says."""

    token_ids: list[int]
    num_output_tokens: int


@dataclass(frozen=True)
class LoadOptions:
    """What every engine is given, so that all do the same work.

    Attributes:
        folder: checkpoint in the Hugging Face layout.
        dtype: `float32`, `bfloat16` or `float16`, of weights and KV; for a GGUF the file decides on the weights.
        num_threads: that compute.
        max_num_seqs: most requests at once.
        max_model_len: longest prompt plus output.
        max_total_tokens: most prompt and output tokens that are alive at once.
        gguf: file for peers that read no other format; empty for none.
        openvino: folder with an OpenVINO IR; empty for none.
        engine_fields: fields of octavo's own `EngineConfig`.
        device: `cpu` or `cuda`.
        temperature: of every request; 0 is greedy.
        load_format: `dummy`: the folder has a config.json and no weights, random ones will do.
    """

    folder: str
    dtype: str
    num_threads: int
    max_num_seqs: int = 32
    max_model_len: int = 4096
    max_total_tokens: int = 32768
    gguf: str = ""
    openvino: str = ""
    engine_fields: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    temperature: float = 0.0
    load_format: str = "auto"


class Peer(Protocol):
    """An engine under test; it lives in one process and is asked one thing at a time."""

    def is_available(self, options: LoadOptions) -> str:
        """Empty, or why this peer cannot run here and what would change that. Imports nothing heavy."""
        ...

    def load(self, options: LoadOptions) -> dict[str, Any]:
        """Load the model; returns facts for the report."""
        ...

    def run(self, requests: Sequence[Request]) -> list[list[int]]:
        """Output token ids of requests that all arrive at once, in their order."""
        ...

    def versions(self) -> dict[str, str]:
        """Of the distributions that do the work."""
        ...


class WrongOutputError(Exception):
    """A peer gave another number of tokens than it was asked for, so its time means nothing."""


def check_outputs(requests: Sequence[Request], outputs: Sequence[Sequence[int]]) -> None:
    """Refuse outputs that are not as long as asked.

    Raises:
        WrongOutputError: naming the first that is not.
    """
    if len(outputs) != len(requests):
        raise WrongOutputError(f"{len(requests)} requests were sent and {len(outputs)} answers came back")
    for index, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        if len(output) != request.num_output_tokens:
            raise WrongOutputError(
                f"request {index} asked for {request.num_output_tokens} tokens and got {len(output)}: "
                "does the peer stop at an end token?"
            )


def missing_modules(*names: str) -> str:
    """Empty if all of these can be imported; otherwise which to install."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def module(name: str) -> Any:
    """A peer's module. None of them is a dependency, so none is known when types are checked."""
    return importlib.import_module(name)


def versions_of(*distributions: str) -> dict[str, str]:
    """Versions of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
