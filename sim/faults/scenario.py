"""What one seed stands for: a small engine, a workload, and what goes wrong."""

from __future__ import annotations

import random
from typing import Literal, TypeVar

import msgspec

from ...actors.scheduler.config import SchedulerConfig
from ...messages.sampling import SamplingParams
from .vocabulary import EOS_TOKEN

Topology = Literal["one", "edge+engine", "edge+scheduler+allocator"]
"""Which actors share a process. The executor is beside them all: a thread under `one`, else a process."""

FaultKind = Literal[
    "crash",
    "hang",
    "fail_row",
    "clock_jump",
    "clog",
    "reset_cache",
    "drain",
    "stall",
    "defect",
    "engine_lost",
    "garble",
    "lose_result",
    "partition",
    "lose_results",
    "slow",
    "pause",
]
"""From `engine_lost` on: scheduler and KV allocator die together (if they have processes of their own); the executor
answers with what cannot be; an answer of it gets lost; its host and everybody else hear nothing of each other for a
while, though it goes on; all its answers get lost for a while; a hundred steps take ten times as long; everybody stands
still for a while, as when a virtual machine is paused.

What follows from it, and when, is the supervisor's to find out, as it is with a `hang`: of that, and of a `stall` of
its engine, it knows nothing but what beats and looks at processes tell."""

LOSING: frozenset[FaultKind] = frozenset(
    {"crash", "hang", "engine_lost", "garble", "lose_result", "partition", "lose_results", "defect"}
)
"""Each costs an executor, or at least its cache."""

T = TypeVar("T")

MS = 1_000_000
HEALED_NS = 200 * MS
"""No fault begins after this."""


class Client(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt, and how whoever sent it behaves.

    Attributes:
        at_ns: when it is sent.
        prompt: token ids.
        params: as the client writes them.
        timeout_ns: deadline after `at_ns`; 0 means none.
        cancel_after_ns: gives up so long after sending; -1 means never.
        cancel_after_tokens: gives up once it has so many tokens of its first sequence; -1 means never.
        read_every_ns: a slow reader takes one message in this time, and is cut off when `read_buffer` are waiting.
        is_poison: no executor survives a step with it.
        is_poison_in_company: no executor survives a step with two such.
        follows: goes on where this earlier client's first answer ended; -1 means nobody's.
    """

    at_ns: int
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    timeout_ns: int = 0
    cancel_after_ns: int = -1
    cancel_after_tokens: int = -1
    read_every_ns: int = 0
    read_buffer: int = 4
    is_poison: bool = False
    is_poison_in_company: bool = False
    follows: int = -1


class Fault(msgspec.Struct, frozen=True):
    """Something that goes wrong.

    Attributes:
        at_ns: when.
        duration_ns: how long a hang, a clog or a stall lasts, and how far the clock jumps.
        choice: in [0, 1): which link, process, actor, way to hang, or kind of nonsense.
    """

    kind: FaultKind
    at_ns: int
    duration_ns: int = 0
    choice: float = 0.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one run is given; chance within the run comes from streams named after `seed`.

    Attributes:
        vocab: token ids are below it.
        hop_ns: longest time until a process turns to the next actor.
        link_ns: longest delay of a message between processes.
        step_ns: longest step of the executor; `step_token_ns` more for each token.
        load_ns: longest start of an executor.
        notice_ns: longest time until the system tells of a process that has ended.
        duplicate_rate: chance that a message which must bear it arrives twice.
        encodes: messages between processes are encoded and decoded.
        checks_each_message: the cores check themselves after each message, not only after each step.
    """

    seed: int
    scheduler: SchedulerConfig
    topology: Topology = "one"
    vocab: int = 8
    hop_ns: int = 0
    link_ns: int = 0
    step_ns: int = MS
    step_token_ns: int = 0
    load_ns: int = MS
    notice_ns: int = MS
    duplicate_rate: float = 0.0
    encodes: bool = False
    checks_each_message: bool = False
    max_restarts: int = 30
    clients: tuple[Client, ...] = ()
    faults: tuple[Fault, ...] = ()


def stream(seed: int, name: str) -> random.Random:
    """One concern's chance: a change in one stream shifts no other."""
    return random.Random(f"{seed}:{name}")  # noqa: S311  # chance of a simulation, not a secret


class _Dice:
    """Short words for drawing."""

    def __init__(self, rng: random.Random) -> None:
        self.random = rng.random

    def below(self, limit: int) -> int:
        return int(self.random() * limit)

    def between(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, *choices: T) -> T:
        return choices[int(self.random() * len(choices))]


def draw_scenario(seed: int) -> Scenario:
    """The scenario of a seed: which faults exist at all, how often, on how small an engine (swarm testing).

    Source: Groce et al., "Swarm Testing", ISSTA 2012.
    """
    dice = _Dice(stream(seed, "engine"))
    scheduler = _draw_engine(dice)
    vocab = dice.pick(2, 4, 8, 8, 10, 30)
    topology: Topology = dice.pick("one", "one", "edge+engine", "edge+scheduler+allocator")
    scenario = Scenario(
        seed=seed,
        scheduler=msgspec.structs.replace(scheduler, vocab_size=vocab),
        topology=topology,
        vocab=vocab,
        hop_ns=dice.pick(0, 0, 1_000, 50_000),
        link_ns=dice.pick(0, 10_000, 300_000, 3 * MS) if topology != "one" else 0,
        step_ns=dice.pick(0, 100_000, MS, MS, 4 * MS),
        step_token_ns=dice.pick(0, 0, 20_000),
        load_ns=dice.pick(0, MS, 10 * MS),
        notice_ns=dice.pick(0, MS, 10 * MS, 2_000 * MS),
        duplicate_rate=dice.pick(0.0, 0.0, 0.05, 0.3),
        encodes=topology != "one" and dice.chance(0.1),
        checks_each_message=dice.chance(0.1),
        max_restarts=dice.pick(1, 2) if dice.chance(0.05) else 30,
    )
    clients = _draw_clients(_Dice(stream(seed, "clients")), scenario)
    faults = _draw_faults(_Dice(stream(seed, "faults")))
    if any(client.is_poison for client in clients):
        # As the engine allows itself: room to find the request that kills its executor.
        max_restarts = 8 + 2 * scheduler.max_num_seqs.bit_length()
        num_others = sum(fault.kind in LOSING for fault in faults)
        num_searches = 1 + sum(fault.kind == "engine_lost" for fault in faults)  # a new engine knows no suspects
        num_poisons = sum(client.params.n for client in clients if client.is_poison)
        scenario = msgspec.structs.replace(
            scenario, max_restarts=max_restarts * num_poisons * num_searches + 4 * num_others
        )
    return msgspec.structs.replace(scenario, clients=clients, faults=faults)


def _draw_engine(dice: _Dice) -> SchedulerConfig:
    block_size = dice.pick(1, 2, 3, 4, 4, 8, 16)
    max_model_len = dice.pick(10, 24, 40, 64)
    needed = -(-max_model_len // block_size)
    num_blocks = dice.pick(max(2, needed // 2), needed, needed + 1, needed + needed // 2, 2 * needed, 4 * needed)
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=dice.pick(1, 2, 3, 4, 6, 8),
        max_num_batched_tokens=dice.pick(1, 3, 8, 16, 32, 64, 200),
        pipeline_depth=dice.pick(1, 2, 2, 3),
        max_num_queued_requests=dice.pick(2, 5, 4096, 4096, 4096),
        max_num_queued_tokens=dice.pick(40, 8_000_000, 8_000_000, 8_000_000),
        priority_aging_ns=dice.pick(0, MS, 20 * MS, 10_000 * MS),
        long_prefill_threshold=dice.pick(0, 0, 0, 3),
        enable_prefix_caching=dice.chance(0.8),
    )


def _can_go_on(params: SamplingParams, vocab: int) -> bool:
    """Whether some token may come before `min_tokens`; the tokenizer refuses what leaves none."""
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS_TOKEN,))}
    return not params.min_tokens or len(ends) < vocab


def _draw_clients(dice: _Dice, scenario: Scenario) -> tuple[Client, ...]:
    config = scenario.scheduler
    vocab = scenario.vocab
    max_len = config.max_sequence_len
    prefixes = [tuple(dice.below(vocab) for _ in range(dice.pick(1, 4, 9, 20))) for _ in range(dice.between(1, 3))]
    spread_ns = dice.pick(0, MS, 20 * MS, 100 * MS)
    num_clients = dice.pick(3, 5, 7, 9, 12)
    salts = dice.pick(("",), ("",), ("", "a"), ("a", "b"))
    priorities = dice.pick((0,), (0,), (0, 0, 1), (-1, 0, 2))
    # Which kinds of client there are at all.
    fork_rate, cancel_rate, slow_rate, timeout_rate, logprob_rate, stop_rate, eos_rate = (
        dice.pick(0.0, 0.0, rate) for rate in (0.3, 0.4, 0.2, 0.4, 0.3, 0.5, 0.8)
    )
    num_poisons = dice.pick(0, 0, 0, 0, 0, 0, 1, 2)
    follow_rate = dice.pick(0.0, 0.4)
    clients: list[Client] = []
    for number in range(num_clients):
        tail = tuple(dice.below(vocab) for _ in range(dice.pick(0, 0, 1, 3, 12)))
        prompt = (dice.pick(*prefixes) + tail)[: dice.between(1, max_len + 1) if dice.chance(0.3) else max_len - 1]
        max_tokens = dice.pick(1, 2, 4, 8, 16, None if dice.chance(0.3) else 6)
        if max_tokens is not None and not dice.chance(0.05):  # what does not fit is refused at once
            max_tokens = min(max_tokens, max(1, config.max_model_len - len(prompt)))
        with_logprobs = dice.chance(logprob_rate)
        stop: tuple[str, ...] = dice.pick(("ab",), ("ba", "a c"), ("bad", "ab")) if dice.chance(stop_rate) else ()
        params = SamplingParams(
            n=dice.pick(2, 3) if dice.chance(fork_rate) else 1,
            max_tokens=0 if with_logprobs and dice.chance(0.2) else max_tokens,
            seed=dice.below(3),
            temperature=0.0,
            ignore_eos=not dice.chance(eos_rate),
            min_tokens=dice.pick(0, 0, 2) if max_tokens != 1 else 0,
            stop_token_ids=(dice.below(vocab),) if dice.chance(0.05) else (),
            stop=stop,
            include_stop_str_in_output=bool(stop) and dice.chance(0.3),
            skip_special_tokens=dice.chance(0.8),
            prompt_logprobs=0 if with_logprobs else None,
        )
        if not _can_go_on(params, vocab):
            params = msgspec.structs.replace(params, min_tokens=0)
        at_ns = dice.below(spread_ns + 1)
        follows = dice.below(number) if number and dice.chance(follow_rate) else -1
        if follows >= 0:  # once the answer is read, as a rule
            at_ns = clients[follows].at_ns + dice.below(dice.pick(MS, 60 * MS))
        gives_up = dice.chance(cancel_rate)
        by_tokens = dice.chance(0.5)
        clients.append(
            Client(
                at_ns=at_ns,
                prompt=prompt,
                params=params,
                priority=dice.pick(*priorities),
                cache_salt=dice.pick(*salts),
                timeout_ns=dice.between(1, 60 * MS) if dice.chance(timeout_rate) else 0,
                cancel_after_ns=dice.below(dice.pick(2, MS, 40 * MS)) if gives_up and not by_tokens else -1,
                cancel_after_tokens=dice.between(1, 6) if gives_up and by_tokens else -1,
                read_every_ns=dice.pick(MS, 10 * MS) if dice.chance(slow_rate) else 0,
                read_buffer=dice.pick(1, 3, 8),
                is_poison=number < num_poisons,
                follows=follows,
            )
        )
    return tuple(clients)


_FAULT_CHANCES: dict[FaultKind, float] = {
    "defect": 0.02,
    "drain": 0.1,
    "garble": 0.1,
    "lose_result": 0.1,
    "partition": 0.1,
    "lose_results": 0.1,
    "engine_lost": 0.2,
    "slow": 0.1,
    "pause": 0.1,
}
"""That a run has faults of this kind at all."""


def _draw_faults(dice: _Dice) -> tuple[Fault, ...]:
    kinds: tuple[FaultKind, ...] = (
        "crash", "hang", "fail_row", "clock_jump", "clog", "reset_cache", "stall", "drain", "defect",
        "engine_lost", "garble", "lose_result", "partition", "lose_results", "slow", "pause",
    )  # fmt: skip
    horizon_ns = dice.pick(5 * MS, 40 * MS, HEALED_NS)
    faults: list[Fault] = []
    for kind in kinds:
        most = 1 if kind in {"drain", "defect", "slow"} else 3
        if not dice.chance(_FAULT_CHANCES.get(kind, 0.3)):
            continue
        for _ in range(dice.between(1, most)):
            duration_ns = dice.pick(MS, 10 * MS, 50 * MS)
            if kind == "clock_jump":
                duration_ns = dice.pick(MS, 30_000 * MS)
            elif kind in {"hang", "partition", "stall", "pause"} and dice.chance(0.5):  # for long enough to be given up
                duration_ns = dice.pick(2_000 * MS, 6_000 * MS)
            faults.append(Fault(kind, dice.below(horizon_ns), duration_ns, dice.random()))
    return tuple(sorted(faults, key=lambda fault: fault.at_ns))


__all__ = [
    "EOS_TOKEN",
    "HEALED_NS",
    "LOSING",
    "MS",
    "Client",
    "Fault",
    "FaultKind",
    "Scenario",
    "Topology",
    "draw_scenario",
    "stream",
]
