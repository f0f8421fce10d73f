"""What a device's time is, on one that only keeps books: its clock, and the host's, which a launch takes as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from octavo.kernels.gpu import device_time as device_time_module
from octavo.kernels.gpu.device_time import CALLS, device_time

WORK_US, LAUNCH_US = 50.0, 20.0


class Device:
    """Runs what is enqueued in order, each as soon as the host has asked for it and what is before it is done.

    Attributes:
        host_us: of a call: what it takes to ask for it.
        waits: a call waits for the device.
    """

    def __init__(self, host_us: float, *, captures: bool = True, waits: bool = False) -> None:
        self.host_us, self.captures, self.waits = host_us, captures, waits
        self.now_us = self.done_us = 0.0
        self.capturing: Graph | None = None

    def enqueue(self, work_us: float) -> None:
        self.done_us = max(self.done_us, self.now_us) + work_us

    def call(self) -> None:
        if self.capturing is not None:
            if not self.captures:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            self.capturing.num_calls += 1
            return
        self.now_us += self.host_us
        self.enqueue(WORK_US)
        if self.waits:
            self.now_us = max(self.now_us, self.done_us)


class Graph:
    def __init__(self, device: Device) -> None:
        self.device, self.num_calls = device, 0

    def replay(self) -> None:
        self.device.now_us += LAUNCH_US
        self.device.enqueue(WORK_US * self.num_calls)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at_us = device, 0.0

    def record(self) -> None:
        self.device.enqueue(0.0)
        self.at_us = self.device.done_us

    def query(self) -> bool:
        return self.at_us <= self.device.now_us

    def synchronize(self) -> None:
        self.device.now_us = max(self.device.now_us, self.at_us)

    def elapsed_time(self, end: Event) -> float:
        return (end.at_us - self.at_us) / 1e3


class Stream:
    def wait_stream(self, _other: Any) -> None:
        pass


def be(device: Device, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        device.capturing = graph
        try:
            yield
        finally:
            device.capturing = None

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda _stream: contextlib.nullcontext(),
        "CUDAGraph": lambda: Graph(device),
        "graph": capture,
        "Event": lambda enable_timing: Event(device),
        "synchronize": lambda: Event(device).synchronize(),
        "_sleep": lambda cycles: device.enqueue(cycles / 2000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return device.call


def test_a_call_that_a_graph_holds_is_timed_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = device_time(be(Device(host_us=100.0), monkeypatch))
    assert timed.us == pytest.approx(WORK_US)
    assert timed.how == ""
    assert CALLS > 1


def test_calls_that_take_turns_do_so_as_often_in_every_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    call, turns = be(Device(host_us=100.0), monkeypatch), list[int]()

    def make(number: int) -> Callable[[], None]:
        def run() -> None:
            turns.append(number)
            call()

        return run

    timed = device_time(*(make(number) for number in range(3)))
    assert timed.us == pytest.approx(WORK_US)
    assert turns == [0, 1, 2, 0, 1, 2] * 2  # once to warm up, once into the graph


def test_a_tenth_of_the_repeats_was_faster_and_a_tenth_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([50.0, *map(float, range(1, 12))])
    monkeypatch.setattr(device_time_module, "_once", lambda launch, cycles: (next(times), True))
    timed = device_time_module._timed(lambda: None, 1, 11, "")
    assert (timed.us, timed.low_us, timed.high_us) == pytest.approx((6_000, 2_000, 10_000))
    assert timed.figures == {"us": timed.us, "low_us": timed.low_us, "high_us": timed.high_us}


@pytest.mark.parametrize("host_us", [100.0, 9_000.0])
def test_one_that_none_holds_is_timed_without_the_host_too_and_says_so(
    host_us: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = device_time(be(Device(host_us, captures=False), monkeypatch))
    assert timed.us == pytest.approx(WORK_US)
    assert timed.how == "eager: no graph (operation not permitted when stream is capturing)"


def test_one_that_waits_for_the_device_is_timed_and_says_whose_time_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = device_time(be(Device(100.0, captures=False, waits=True), monkeypatch))
    assert timed.how.endswith("the host's time is in it")
    assert timed.us >= WORK_US
