"""The real engine for the simulator: calibrate on it, and hold simulated figures against measured ones."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from ...actors.runtime.percentile import percentile
from ...messages.base import Message
from ...messages.errors import InvalidConfigError
from ...messages.request import PromptReady, TextDelta
from ...messages.sampling import SamplingParams
from ...sim.config import SimConfig
from ...sim.results import RequestRecord
from ...sim.simulation import simulate
from ...sim.step_time.fitted import FittedModel, Profile, fit
from ...sim.workload.request import TraceRequest, Workload, WorkloadCounts
from ..config import EngineConfig
from ..engine import Engine
from .step_tap import StepTap

Progress = Callable[[float, str], None]
"""Called with a share of the work done, 0 to 1, and what is being done."""


class LiveRequest(msgspec.Struct, gc=False):
    """What a client of the real engine saw; seconds on one clock."""

    due_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0


class Figures(msgspec.Struct, frozen=True):
    """One run's figures, in seconds and tokens per second."""

    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p90: float
    tpot_p99: float
    e2e_p50: float
    e2e_p90: float
    e2e_p99: float
    output_token_rate: float


class LiveComparison(msgspec.Struct, frozen=True):
    """Simulated beside measured.

    Attributes:
        real: one entry for each run of the real engine.
        simulated: the simulator's.
        errors: of the simulated figure against the median of the real ones, as a share of that.
        spread: of the real runs: (largest - smallest) / median.
        busy_share: of the simulated device: the load it was tried at.
    """

    real: list[Figures]
    simulated: Figures
    errors: dict[str, float]
    spread: dict[str, float]
    busy_share: float
    speed: float


async def calibrate(config: EngineConfig, seconds: float, progress: Progress | None = None) -> Profile:
    """Run the real engine on batches of many shapes and fit a step-time model to its steps.

    Args:
        config: of the engine, as it will serve.
        seconds: how long to measure; 60 to 120 is usual.

    Raises:
        OctavoError: the engine cannot start.
    """
    tap = StepTap()
    async with Engine(config=config, tap=tap) as engine:
        await _warm_up(engine)
        tap.samples.clear()
        tap.ingress_ns.clear()
        begin = time.monotonic()
        number = 0
        while (elapsed := time.monotonic() - begin) < seconds:
            if progress is not None:
                progress(elapsed / seconds, f"{len(tap.samples)} steps")
            await _run_phase(engine, number, min(seconds - elapsed, max(2.0, seconds / 12)))
            number += 1
        meta: dict[str, str | int | float] = {
            "model": engine.model_name,
            "dtype": engine.dtype,
            "num_blocks": engine.num_blocks,
            "block_size": config.block_size,
            "max_model_len": engine.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "pipeline_depth": config.pipeline_depth,
            "ingress_ns": int(statistics.median(tap.ingress_ns)) if tap.ingress_ns else 0,
        }
    return fit(tap.samples, meta)


async def _warm_up(engine: Engine) -> None:
    chance = random.Random("warm-up")  # noqa: S311 (a workload, not a secret)
    prompts = [_random_prompt(engine, chance, 16) for _ in range(4)]
    await asyncio.gather(*(engine.generate(prompt, _params(8)) for prompt in prompts))


async def _run_phase(engine: Engine, number: int, seconds: float) -> None:
    """Keep some requests running for a while; phases differ in how many, and in how long they are."""
    chance = random.Random(f"phase:{number}")  # noqa: S311
    concurrency = min((1, 4, 16, 2, 8, 32)[number % 6], engine.config.max_num_seqs)
    longest = engine.max_model_len - 2
    end = time.monotonic() + seconds

    async def keep_asking() -> None:
        while time.monotonic() < end:
            num_prompt = min(longest, max(1, round(chance.lognormvariate(4.5, 1.2))))
            num_output = min(longest + 1 - num_prompt, max(1, round(chance.lognormvariate(3.5, 1.0))))
            await engine.generate(_random_prompt(engine, chance, num_prompt), _params(num_output))
            if chance.random() < 0.3:
                await asyncio.sleep(chance.random() * 0.02)  # so that batches of every size occur

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))


async def compare_live(
    config: EngineConfig,
    profile: Profile,
    workload: Workload,
    *,
    load: float = 0.7,
    repeats: int = 5,
    progress: Progress | None = None,
) -> LiveComparison:
    """Offer a workload to the real engine, several times, and to the simulated one, once.

    The workload is sped up or slowed down until the simulated device is busy for `load` of the time.

    Args:
        profile: of `calibrate`, from another workload.
        load: 0 to 1.
        repeats: runs of the real engine; each figure is the median of them.

    Raises:
        InvalidConfigError: a request of the workload does not fit the engine.
    """
    real: list[Figures] = []
    async with Engine(config=config) as engine:
        requests = _fit_to(engine, list(workload.arrivals()))
        sim_config = _sim_config(engine, profile)
        speed = _find_speed(sim_config, profile, requests, load)
        timed = _at_speed(requests, speed)
        simulation = simulate(sim_config, _Fixed(timed), FittedModel(profile))
        await _warm_up(engine)
        for repeat in range(repeats):
            if progress is not None:
                progress(repeat / repeats, f"real run {repeat + 1} of {repeats}")
            engine.reset_prefix_cache()
            real.append(_figures_of_live(await _offer(engine, timed)))
    simulated = _figures_of_records(simulation.records)
    errors, spread = {}, {}
    for name in Figures.__struct_fields__:
        values = [getattr(figures, name) for figures in real]
        median = statistics.median(values)
        errors[name] = getattr(simulated, name) / median - 1
        spread[name] = (max(values) - min(values)) / median
    return LiveComparison(real, simulated, errors, spread, simulation.result.busy_share, speed)


class _Fixed:
    """A list of requests as a workload."""

    def __init__(self, requests: Sequence[TraceRequest]) -> None:
        self._requests = requests
        self.name = "live"
        self.counts = WorkloadCounts(len(requests), len(requests))
        self.has_shared_prefixes = True

    def arrivals(self) -> Iterator[TraceRequest]:
        return iter(self._requests)

    def followers(self, request: TraceRequest, ended_ns: int) -> Sequence[TraceRequest]:
        return ()


def _fit_to(engine: Engine, requests: list[TraceRequest]) -> list[TraceRequest]:
    longest = engine.max_model_len
    for i, request in enumerate(requests):
        if request.num_prompt_tokens + request.num_output_tokens > longest:
            raise InvalidConfigError(
                f"request {i + 1} of the workload has {request.num_prompt_tokens} + {request.num_output_tokens} tokens,"
                f" but the engine's context is {longest}: clamp the workload, or choose a model with a longer context"
            )
    return requests


def _sim_config(engine: Engine, profile: Profile) -> SimConfig:
    # The simulated executor's tokens are numbers without a meaning, so there is no vocabulary to hold them against.
    scheduler = msgspec.structs.replace(engine.scheduler_config, vocab_size=0)
    return SimConfig(scheduler=scheduler, ingress_ns=int(profile.meta.get("ingress_ns", 0)))


def _at_speed(requests: Sequence[TraceRequest], speed: float) -> list[TraceRequest]:
    first_ns = requests[0].arrival_ns
    return [
        msgspec.structs.replace(request, arrival_ns=round((request.arrival_ns - first_ns) / speed))
        for request in requests
    ]


def _find_speed(config: SimConfig, profile: Profile, requests: Sequence[TraceRequest], load: float) -> float:
    """How many times faster the requests must come to keep the simulated device busy for `load` of the time."""
    low, high = 1e-4, 1e4
    for _ in range(30):
        middle = (low * high) ** 0.5
        result = simulate(config, _Fixed(_at_speed(requests, middle)), FittedModel(profile)).result
        if result.busy_share < load:
            low = middle
        else:
            high = middle
        if high / low < 1.02:
            break
    return low


async def _offer(engine: Engine, requests: Sequence[TraceRequest]) -> list[LiveRequest]:
    """Send each request when it is due; return what its client saw."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    num_left = len(requests)
    vocab = engine.vocab_size
    prompts = [[16 + token % (vocab - 16) for token in request.prompt_tokens()] for request in requests]
    begin = loop.time() + 0.05
    seen = [LiveRequest(begin + request.arrival_ns / 1e9) for request in requests]

    def make_sink(live: LiveRequest) -> Callable[[PromptReady | TextDelta], None]:
        def sink(message: Message) -> None:
            nonlocal num_left
            if not isinstance(message, TextDelta):
                return
            if message.token_ids:
                live.last_s = loop.time()
                live.first_s = live.first_s or live.last_s
                live.num_tokens += len(message.token_ids)
            if message.finish_reason is not None:
                num_left -= 1
                if not num_left:
                    done.set()

        return sink

    for request, prompt, live in zip(requests, prompts, seen, strict=True):
        await asyncio.sleep(max(0.0, live.due_s - loop.time()))
        engine.submit(prompt, _params(request.num_output_tokens), make_sink(live))
    await done.wait()
    return seen


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def _random_prompt(engine: Engine, chance: random.Random, length: int) -> list[int]:
    return [chance.randrange(16, engine.vocab_size) for _ in range(length)]


def _figures_of_live(requests: Sequence[LiveRequest]) -> Figures:
    return _figures(
        [request.first_s - request.due_s for request in requests],
        [
            (request.last_s - request.first_s) / (request.num_tokens - 1)
            for request in requests
            if request.num_tokens > 1
        ],
        [request.last_s - request.due_s for request in requests],
        sum(request.num_tokens for request in requests)
        / (max(request.last_s for request in requests) - min(request.due_s for request in requests)),
    )


def _figures_of_records(records: Sequence[RequestRecord]) -> Figures:
    begin_ns = min(record.arrival_ns for record in records)
    return _figures(
        [record.ttft_s for record in records],
        [record.tpot_s for record in records if record.num_output_tokens > 1],
        [record.e2e_s for record in records],
        sum(record.num_output_tokens for record in records)
        / ((max(record.last_token_ns for record in records) - begin_ns) / 1e9),
    )


def _figures(ttft: list[float], tpot: list[float], e2e: list[float], rate: float) -> Figures:
    ttft.sort()
    tpot.sort()
    e2e.sort()
    fields = {"output_token_rate": rate}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e)):
        fields |= {f"{name}_p{percent}": percentile(values, percent / 100) for percent in (50, 90, 99)}
    return Figures(**fields)
