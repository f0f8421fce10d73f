"""The ring of cores under random delivery, with a journal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from core_ring import CoreRing, submit
from sim_journal import SimJournal

from octavo.actors.journal.checksum import decisions_of
from octavo.actors.journal.config import JournalHeader
from octavo.actors.kv_allocator.config import AllocatorConfig
from octavo.actors.scheduler.config import SchedulerConfig
from octavo.messages.base import Message
from octavo.sim.journal.reader import JournalReader

CONFIG = SchedulerConfig(
    num_blocks=12, block_size=2, max_model_len=24, max_num_seqs=4, max_num_batched_tokens=10, priority_aging_ns=5000
)


def header_of(config: SchedulerConfig, **fields: Any) -> JournalHeader:
    allocator = AllocatorConfig(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
    )
    return JournalHeader(scheduler=config, allocator=allocator, **fields)


def record_ring(
    path: Path,
    *,
    seed: int = 0,
    num_requests: int = 30,
    config: SchedulerConfig = CONFIG,
    has_tokens: bool = False,
    loses_messages: bool = False,
    break_ring: Any = None,
    num_steps: int = 3000,
) -> tuple[CoreRing, list[tuple[str, Message]]]:
    """Run the ring and write its journal; returns it, and what the cores said in order.

    Args:
        loses_messages: messages of former epochs are lost, or come twice or in another order.
    """
    rng = random.Random(f"{seed}:script")
    ring = CoreRing(config, seed=seed, vocab=3, checks=False)
    said: list[tuple[str, Message]] = []
    with path.open("wb") as file:
        journal = SimJournal(file, header_of(config, has_tokens=has_tokens))

        def tap(name: str, core: Any, wrap: Any) -> None:
            handle = core.handle

            def tapped(message: Message, now_ns: int) -> Any:
                answers = handle(message, now_ns)
                said.extend((name, answer) for answer in decisions_of(message, answers))
                return answers

            core.handle = wrap(tapped)

        tap("scheduler", ring.scheduler, journal.wrap_scheduler)
        tap("kv_allocator", ring.allocator, journal.wrap_allocator)
        if break_ring is not None:
            break_ring(ring)
        prompts: list[tuple[int, list[int], str]] = []
        stash: list[tuple[str, Any]] = []
        for _ in range(num_steps):
            chance = rng.random()
            if chance < 0.06 and len(prompts) < num_requests:
                request_id = len(prompts)
                fork_of, salt = -1, rng.choice(("", "", "s"))
                prompt = [rng.randrange(3) for _ in range(rng.randrange(1, 14))]
                if prompts and rng.random() < 0.4:
                    fork_of, prompt, salt = rng.choice(prompts)
                prompts.append((request_id, prompt, salt))
                ring.submit(
                    submit(
                        request_id,
                        prompt,
                        max_tokens=rng.randrange(1, 10),
                        seed=rng.randrange(3),
                        eos=rng.random() < 0.5,
                        fork_of=fork_of,
                        cache_salt=salt,
                        priority=rng.randrange(2),
                        arrival_ns=ring.now_ns,
                        deadline_ns=ring.now_ns + rng.randrange(20_000, 400_000) if rng.random() < 0.2 else 0,
                        prompt_logprobs=rng.choice((None, None, None, 1)),
                    )
                )
            elif chance < 0.065 and prompts:
                ring.cancel(rng.choice(prompts)[0])
            elif chance < 0.07 and prompts:
                ring.stop(rng.choice(prompts)[0])
            elif chance < 0.073:
                ring.lose_executor()
                for name in ("to_allocator", "from_allocator"):
                    stash += [(name, message) for message in ring.edges[name] if hasattr(message, "epoch")]
            elif chance < 0.08:
                ring.reset_prefix_cache()
            if loses_messages:
                disturb(ring, stash, rng)
            ring.step_randomly()
        if break_ring is None:
            ring.run()
        journal.end()
    return ring, said


def disturb(ring: CoreRing, stash: list[tuple[str, Any]], rng: random.Random) -> None:
    """Deliver some of what former epochs left behind once more, and mix up what is under way of them."""
    epochs = {"from_allocator": ring.scheduler._state.epoch, "to_allocator": ring.allocator._epoch}
    for name, message in stash[-4:]:
        if message.epoch < epochs[name] and rng.random() < 0.05:
            ring.edges[name].append(message)
    edge = ring.edges["from_allocator"]
    if len(edge) > 1 and all(message.epoch < epochs["from_allocator"] for message in edge):
        left = [message for message in edge if rng.random() < 0.7]
        rng.shuffle(left)
        edge.clear()
        edge.extend(left)


def entries_of(path: Path) -> list[Any]:
    with JournalReader(path) as reader:
        return list(reader.entries())
