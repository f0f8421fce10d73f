from __future__ import annotations

import asyncio

import pytest

from octavo.actors.runtime.in_process import InProcessRuntime, Mailbox, MailboxFullError
from octavo.actors.runtime.routes import Routes
from octavo.messages.base import Message


class Ping(Message, frozen=True):
    number: int


class Batch(Message, frozen=True):
    pass


class StoppedClock:
    def now_ns(self) -> int:
        return 7


ROUTES: Routes = {("frontend", Ping): ("tokenizer",), ("tokenizer", Ping): ("scheduler",)}


def build(handlers: dict[str, object], capacity: int = 1000) -> tuple[InProcessRuntime, list[tuple[str, Exception]]]:
    failures: list[tuple[str, Exception]] = []
    runtime = InProcessRuntime(ROUTES, StoppedClock(), lambda address, error: failures.append((address, error)))
    for address, handler in handlers.items():
        after = Batch() if address == "scheduler" else None
        runtime.add(address, Mailbox(address, handler, runtime, capacity=capacity, after_batch=after))  # type: ignore[arg-type]
    runtime.connect()
    return runtime, failures


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_messages_arrive_in_order_and_the_batch_ends_with_its_marker() -> None:
    async def main() -> None:
        heard: list[object] = []
        runtime, failures = build(
            {
                "tokenizer": lambda message, _: [message],
                "scheduler": lambda message, now: heard.append((message, now)) or (),
            }
        )
        for number in range(600):
            runtime.send("frontend", Ping(number))
        await settle()
        assert [m.number for m, _ in heard if isinstance(m, Ping)] == list(range(600))  # type: ignore[misc]
        assert heard[-1] == (Batch(), 7)
        assert not failures

    asyncio.run(main())


def test_an_actor_whose_messages_take_long_lets_the_loop_have_its_turn_between_them() -> None:
    class SlowClock:
        now = 0

        def now_ns(self) -> int:
            return self.now

    async def main() -> None:
        clock, heard = SlowClock(), []

        def work(message: Message, _: int) -> tuple[()]:
            clock.now += 3
            heard.append(message)
            return ()

        runtime = InProcessRuntime({("frontend", Ping): ("tokenizer",)}, clock, lambda *_: None)
        runtime.add_actor("tokenizer", work, 100, max_hold_ns=5)
        runtime.connect()
        for number in range(6):
            runtime.send("frontend", Ping(number))
        seen = []
        while len(heard) < 6:
            await asyncio.sleep(0)
            seen.append(len(heard))
        assert seen == [2, 4, 6], "after 6 of at most 5 ns, each time"
        assert heard == [Ping(number) for number in range(6)]

    asyncio.run(main())


def test_a_full_mailbox_refuses() -> None:
    async def main() -> None:
        runtime, _ = build({"tokenizer": lambda m, _: (), "scheduler": lambda m, _: ()}, capacity=3)
        for number in range(3):
            runtime.send("frontend", Ping(number))
        with pytest.raises(MailboxFullError, match="tokenizer holds 3"):
            runtime.send("frontend", Ping(3))
        await settle()

    asyncio.run(main())


def test_an_actor_that_raises_is_reported_once() -> None:
    async def main() -> None:
        def fail(message: Message, now_ns: int) -> list[Message]:
            raise ValueError(message)

        runtime, failures = build({"tokenizer": fail, "scheduler": lambda m, _: ()})
        runtime.send("frontend", Ping(1))
        runtime.send("frontend", Ping(2))
        await settle()
        assert [(address, type(error)) for address, error in failures] == [("tokenizer", ValueError)]

    asyncio.run(main())
