"""The executor process's loop, with a port and a device that the test plays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from octavo.actors.executor import process
from octavo.actors.executor.config import ExecutorConfig, ExecutorProcessSpec
from octavo.actors.executor.process import _ExecutorProcess, _free_endpoint
from octavo.actors.runtime.addresses import split_endpoint
from octavo.messages.base import Message
from octavo.messages.ids import Epoch, RequestId, StepId
from octavo.messages.step import ExecuteStep, StepExecuted


class PlayedPort:
    """Has a step when the device has none, and nothing else comes."""

    def __init__(self, device: PlayedDevice) -> None:
        self.device = device
        self.num_looks = self.num_receipts = 0
        self.sent: list[tuple[str, Message]] = []
        self.events: list[Any] = []
        self.counters: dict[str, int] = {}

    def bind(self, endpoint: str) -> str:
        return endpoint

    def connect(self, *_: object, **__: object) -> None:
        """Everybody is there."""

    def is_up(self, _: str) -> bool:
        return True

    def wait(self, timeout_ms: int) -> bool:
        self.num_looks += 1
        return timeout_ms != 0

    def receive(self) -> list[tuple[str, Message]]:
        self.num_receipts += 1
        number = len(self.device.answered)
        return [("engine", ExecuteStep(Epoch(0), StepId(number), (RequestId(1),), (1,)))]

    def send(self, peer: str, message: Message) -> bool:
        self.sent.append((peer, message))
        return True


class PlayedDevice:
    """Is done with a step when it has been asked ten times; takes two at a time."""

    num_late = 0

    def __init__(self, *_: object) -> None:
        self.launched: Any = self
        self.steps: list[ExecuteStep] = []
        self.answered: list[StepExecuted] = []
        self.num_asked = 0

    def __len__(self) -> int:
        return len(self.steps)

    is_full = False

    def load(self) -> Any:
        return SimpleNamespace(speaks=False)

    def begin_epoch(self, epoch: Epoch) -> None:
        """There is one."""

    def launch(self, step: ExecuteStep) -> bool:
        self.steps.append(step)
        return True

    def is_due(self, *, has_step: bool) -> bool:
        if not self.steps or has_step:
            return False
        self.num_asked += 1
        return self.num_asked % 10 == 0

    def collect(self) -> StepExecuted:
        step = self.steps.pop(0)
        self.answered.append(StepExecuted(step.epoch, step.step_id, step.request_ids, (5,)))
        if len(self.answered) == 3:
            raise KeyboardInterrupt
        return self.answered[-1]


def test_an_executor_with_a_step_on_its_device_receives_only_what_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    device = PlayedDevice()
    port = PlayedPort(device)
    monkeypatch.setattr(process, "_make_port", lambda *_, **__: port)
    monkeypatch.setattr(process, "RankExecutor", lambda *_: device)
    monkeypatch.setattr(_ExecutorProcess, "_beat", lambda _: None)
    spec = ExecutorProcessSpec(
        child="executor 0",
        incarnation=1,
        epoch=Epoch(0),
        rank=0,
        run_dir="/nowhere",
        engine=1,
        engine_name="engine",
        edge_incarnation=1,
        config=ExecutorConfig(model_path="m", max_num_seqs=1, max_num_batched_tokens=1),
    )
    with pytest.raises(KeyboardInterrupt):
        _ExecutorProcess(spec).run()
    assert [message.step_id for _, message in port.sent if isinstance(message, StepExecuted)] == [0, 1]
    assert port.num_looks > 25, "it looks at every turn"
    assert port.num_receipts <= 4, "and takes what came: a step for each that it executed, and what it began with"


@pytest.mark.parametrize("address", ["*", "0.0.0.0", "127.0.0.1", "localhost"])  # every interface
def test_ranks_meet_at_a_free_port_of_the_address_that_is_listened_to(address: str) -> None:
    host, port = split_endpoint(_free_endpoint(address))
    assert host == ("0.0.0.0" if address in ("*", "0.0.0.0") else "127.0.0.1") and port > 0  # the same
