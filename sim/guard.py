"""Makes reading the real world an error while a simulation runs."""

from __future__ import annotations

import datetime
import os
import random
import secrets
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn


class RealWorldError(RuntimeError):
    """Something on the simulated path read a clock, chance, a thread or a socket of the real world."""


_RANDOM_FUNCTIONS = (
    "random", "uniform", "triangular", "randint", "randrange", "choice", "choices", "sample", "shuffle", "betavariate",
    "expovariate", "gammavariate", "gauss", "lognormvariate", "normalvariate", "paretovariate", "vonmisesvariate",
    "weibullvariate", "getrandbits", "randbytes", "seed",
)  # fmt: skip

FORBIDDEN: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (
        time,
        (
            "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time",
            "process_time_ns", "thread_time", "thread_time_ns", "sleep", "localtime", "gmtime",
        ),
    ),
    (random, _RANDOM_FUNCTIONS),
    (os, ("urandom", "getrandom")),
    (secrets, ("token_bytes", "token_hex", "token_urlsafe", "randbelow", "randbits", "choice")),
    (uuid, ("uuid1", "uuid4")),
    (threading.Thread, ("start",)),
    (socket, ("socket", "create_connection", "getaddrinfo")),
)  # fmt: skip


class _NoDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> NoReturn:
        _refuse("datetime.now")

    @classmethod
    def utcnow(cls) -> NoReturn:
        _refuse("datetime.utcnow")

    @classmethod
    def today(cls) -> NoReturn:
        _refuse("datetime.today")


def _refuse(what: str) -> NoReturn:
    raise RealWorldError(
        f"{what} was called inside a simulation: time, chance and I/O come from the virtual-time runtime alone"
    )


def _make_refusal(owner: object, name: str) -> Callable[..., NoReturn]:
    where = getattr(owner, "__name__", "")

    def refuse(*_: object, **__: object) -> NoReturn:
        _refuse(f"{where}.{name}")

    return refuse


class Guard:
    """Replaces the doors to the real world by ones that raise `RealWorldError`, and puts them back.

    What a module took by name before (`from time import monotonic`) is out of its reach; a test walks the imports of
    everything the simulator runs for those.
    """

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, object]] = []

    @property
    def is_closed(self) -> bool:
        """Whether the doors are shut now."""
        return bool(self._saved)

    def close(self) -> None:
        """Shut the doors."""
        for owner, names in FORBIDDEN:
            for name in names:
                if hasattr(owner, name):
                    self._replace(owner, name, _make_refusal(owner, name))
        self._replace(datetime, "datetime", _NoDatetime)

    def open(self) -> None:
        """Put everything back."""
        while self._saved:
            owner, name, original = self._saved.pop()
            setattr(owner, name, original)

    def _replace(self, owner: ModuleType | type, name: str, value: object) -> None:
        self._saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


@contextmanager
def no_real_world() -> Iterator[Guard]:
    """Within this, reading a clock, global chance, starting a thread or opening a socket raises `RealWorldError`."""
    guard = Guard()
    guard.close()
    try:
        yield guard
    finally:
        guard.open()


@contextmanager
def real_world(guard: Guard) -> Iterator[None]:
    """Within this, the doors stand open again: for telling a person how far a simulation is."""
    was_closed = guard.is_closed
    guard.open()
    try:
        yield
    finally:
        if was_closed:
            guard.close()
