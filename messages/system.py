"""Supervision: who is alive, and what the executor offers."""

from __future__ import annotations

from .base import Message
from .ids import Epoch


class ExecutorReady(Message, frozen=True):
    """Executor -> supervisor: weights are loaded, the cache is empty, steps of this epoch will be executed."""

    epoch: Epoch


class ExecutorLost(Message, frozen=True):
    """Supervisor -> scheduler: the executor of `epoch` died; its KV and its steps in flight are gone.

    Attributes:
        epoch: the next epoch, which the replacement serves.
        why: for logs.
    """

    epoch: Epoch
    why: str = ""


class Drain(Message, frozen=True):
    """Gateway -> scheduler: refuse new requests, finish those that were accepted."""


class ExecutorFailed(Message, frozen=True):
    """Executor -> supervisor: a step raised; everything in flight is lost.

    Attributes:
        epoch: the incarnation that failed.
        why: type and text of the exception.
    """

    epoch: Epoch
    why: str


class StartExecutor(Message, frozen=True):
    """Supervisor -> executor: begin (again) as `epoch`, with an empty batch and an empty cache."""

    epoch: Epoch
