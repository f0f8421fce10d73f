"""The engine over several real processes: whoever dies, every stream goes on with the tokens it would have had."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from engines import FIRST_SEED, Logprobs, engine_on, save_servable
from process_family import descendants, living, title, until

from octavo import Engine
from octavo.gateway.processes.process_graph import ProcessGraph
from octavo.messages.errors import ExecutorLostError, InvalidConfigError, UnsupportedModelError
from octavo.messages.sampling import SamplingParams
from octavo.messages.system import Beat
from octavo.sim.journal.replay import replay

PATIENCE_S = 400.0  # of a whole test, on a busy machine; alone none takes 20
NUM_STREAMS = 8


def run(coroutine: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE_S)

    return asyncio.run(bounded())


def params_of(index: int) -> SamplingParams:
    """Greedy and seeded, with and without log-probabilities, one or two sequences."""
    return SamplingParams(
        temperature=0.0 if index % 2 else 0.9,
        seed=FIRST_SEED + index,
        max_tokens=90,
        ignore_eos=True,
        n=2 if index % 4 == 2 else 1,
        logprobs=2 if index % 3 == 0 else None,
    )


async def answers(engine: Engine, on_token: Callable[[int], None] = lambda count: None) -> list[list[Any]]:
    """What each stream got: tokens, text and log-probabilities of each sequence."""
    count = 0

    async def one(index: int) -> list[Any]:
        nonlocal count
        params = params_of(index)
        tokens: list[list[int]] = [[] for _ in range(params.n)]
        texts = ["" for _ in range(params.n)]
        logprobs = [Logprobs() for _ in range(params.n)]
        async for delta in engine.stream(list(range(10 + index, 30 + index)), params):
            tokens[delta.index] += delta.token_ids
            texts[delta.index] += delta.text
            logprobs[delta.index] += [entry.logprob for entry in delta.logprobs]
            count += len(delta.token_ids)
            on_token(count)
        return [tokens, texts, logprobs]

    return list(await asyncio.gather(*(one(index) for index in range(NUM_STREAMS))))


def check_accounts(engine: Engine) -> None:
    """Whom engines accepted has come to an end, was lost with an engine, or runs or waits (I9)."""
    stats = engine.stats()
    num_over = stats.num_completed + stats.num_failed + stats.num_cancelled + stats.num_lost
    assert stats.num_accepted == num_over + stats.num_running + stats.num_waiting


async def disturbed(engine: Engine, after: int, disturb: Callable[[], None]) -> list[list[Any]]:
    """`answers`, with a disturbance once `after` tokens have come."""
    is_done = False

    def on_token(count: int) -> None:
        nonlocal is_done
        check_accounts(engine)
        if count >= after and not is_done:
            is_done = True
            disturb()

    return await answers(engine, on_token)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder)
    return folder


def test_whoever_is_killed_or_hangs_every_stream_goes_on_with_its_own_tokens(model: Path) -> None:
    others = descendants()

    async def scenario() -> None:
        async with engine_on(model, in_process=False) as engine:
            expected = await answers(engine)
            assert [len(tokens) for tokens, _, _ in expected] == [params_of(i).n for i in range(NUM_STREAMS)]
            chance = random.Random(0)
            for name, signum in (
                ("executor 0", signal.SIGKILL),
                ("engine", signal.SIGKILL),
                ("executor 0", signal.SIGSTOP),
                ("engine", signal.SIGSTOP),
                ("nursery", signal.SIGKILL),
                ("executor 0", signal.SIGTERM),
            ):
                victim = await living(name)
                got = await disturbed(engine, chance.randrange(1, 300), partial(victim.send_signal, signum))
                assert got == expected, (name, signum)
                await living(name, other_than=victim.pid)
                await until(lambda: engine.is_ready)
            stats = engine.stats()
            assert stats.actor_restarts["executor"] >= 3 and stats.actor_restarts["engine"] >= 2
            assert stats.num_requeued > 0
            await until(lambda: engine.stats().kv_cache_usage == 0.0 and engine.is_ready)
            check_accounts(engine)
            assert engine.stats().num_lost > 0
        assert descendants(but=others) == []

    run(scenario())


def test_deterministic_streams_go_on_with_the_same_bits_in_bfloat16(model: Path) -> None:
    def bits(streams: list[list[Any]]) -> list[list[Any]]:
        return [[tokens, texts, [list(sequence) for sequence in logprobs]] for tokens, texts, logprobs in streams]

    async def scenario() -> None:
        async with engine_on(model, in_process=False, dtype="bfloat16", deterministic=True) as engine:
            assert engine.is_deterministic
            expected = bits(await answers(engine))
            for name, after in (("executor 0", 40), ("engine", 150), ("executor 0", 250)):
                victim = await living(name)
                assert bits(await disturbed(engine, after, victim.kill)) == expected, name
                await living(name, other_than=victim.pid)
                await until(lambda: engine.is_ready)

    run(scenario())


def test_what_an_executor_throws_away_is_counted_and_so_is_what_comes_too_late(model: Path) -> None:
    async def scenario() -> None:
        async with engine_on(model, in_process=False) as engine:
            supervision = engine._graph._supervision
            assert engine.stats().messages_dropped.get("malformed", 0) == 0
            supervision.port.send("executor 0", Beat("edge 0", 1))  # which edges do not say to executors
            await until(lambda: engine.stats().messages_dropped["malformed"] == 1)
            (await living("executor 0")).kill()
            await until(lambda: engine.stats().actor_restarts["executor"] >= 1 and engine.is_ready)
            before = engine.stats()
            assert before.messages_dropped["malformed"] == 1
            supervision.replicas[0].take(Beat("executor 0", 1))  # of the one that is dead
            assert engine.stats().num_dropped_messages == before.num_dropped_messages + 1

    run(scenario())


def test_an_incident_is_replayed_decision_by_decision(model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with engine_on(model, in_process=False, journal=str(tmp_path)) as engine:
            expected = await answers(engine)
            assert await disturbed(engine, 60, (await living("executor 0")).kill) == expected
            # The journal is written now and then, and what was not is lost with the engine.
            await until(lambda: replay(tmp_path / "engine.journal").num_executor_losses == 1)
            assert await disturbed(engine, 60, (await living("engine")).kill) == expected
            await until(lambda: engine.is_ready and engine.stats().actor_restarts["engine"] == 1)

    run(scenario())
    first, second = (replay(tmp_path / name) for name in ("engine.journal.1", "engine.journal"))
    assert first.is_identical and second.is_identical
    assert first.num_executor_losses == 1
    assert first.end is not None and not first.end.is_complete, "it was killed"
    assert second.end is not None and second.end.is_complete
    assert 0 <= second.num_requests <= sum(params_of(index).n for index in range(NUM_STREAMS))


def test_f_45_engines_are_replaced_though_the_journal_s_folder_is_gone_or_in_the_way(
    model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "journal"

    async def scenario() -> None:
        async with engine_on(model, in_process=False, journal=str(folder)) as engine:
            expected = await answers(engine)
            shutil.rmtree(folder)
            assert await disturbed(engine, 60, (await living("engine")).kill) == expected
            await until(lambda: engine.is_ready and engine.stats().actor_restarts["engine"] == 1)
            assert (folder / "engine.journal").exists(), "it is made again"
            shutil.rmtree(folder)
            folder.write_text("in the way")
            assert await disturbed(engine, 60, (await living("engine")).kill) == expected
            await until(lambda: engine.is_ready and engine.stats().actor_restarts["engine"] == 2)
            assert await answers(engine) == expected

    run(scenario())


def test_the_same_tokens_come_out_of_one_process_and_of_several(model: Path) -> None:
    async def outputs(**fields: Any) -> list[list[Any]]:
        async with engine_on(model, **fields) as engine:
            return await answers(engine)

    async def scenario() -> None:
        expected = await outputs(in_process=True)
        for fields in (
            {"in_process": False, "data_parallel_size": 2, "routing": "round_robin"},
            {"in_process": False, "tensor_parallel_size": 2},
        ):
            assert await outputs(**fields) == expected, fields

    run(scenario())


def test_f_06_one_rank_that_dies_takes_its_group_along_and_no_stream(model: Path) -> None:
    async def scenario() -> None:
        async with engine_on(model, in_process=False, tensor_parallel_size=2) as engine:
            expected = await answers(engine)
            for name in ("executor 1", "engine"):
                before = [(await living(f"executor {rank}")).pid for rank in range(2)]
                victim = await living(name)
                assert await disturbed(engine, 60, victim.kill) == expected, name
                for rank in range(2):  # one that waits for the dead in a collective is of no use
                    await living(f"executor {rank}", other_than=before[rank])
                await until(lambda: engine.is_ready)

    run(scenario())


@pytest.mark.parametrize("rank", [0, 1])
def test_f_06_f_07_one_rank_that_is_stopped_has_its_group_replaced_and_costs_no_stream(model: Path, rank: int) -> None:
    async def scenario() -> None:
        async with engine_on(model, in_process=False, tensor_parallel_size=2) as engine:
            expected = await answers(engine)
            before = [await living(f"executor {number}") for number in range(2)]
            assert await disturbed(engine, 60, before[rank].suspend) == expected
            for number in range(2):  # the other one waits in a collective, and does not stop by itself
                await living(f"executor {number}", other_than=before[number].pid)

    run(scenario())


def test_of_two_replicas_one_may_die_for_good(model: Path) -> None:
    async def scenario() -> None:
        fields = {"data_parallel_size": 2, "routing": "round_robin", "max_restarts": 0}
        async with engine_on(model, in_process=False, **fields) as engine:
            expected = await answers(engine)
            assert await disturbed(engine, 60, (await living("executor 0")).kill) == expected
            assert engine.is_ready
            assert await answers(engine) == expected

    run(scenario())


def test_f_05_an_executor_that_fails_too_often_ends_the_streams_with_a_reason(model: Path) -> None:
    async def scenario() -> None:
        async with engine_on(model, in_process=False, max_restarts=0) as engine:
            with pytest.raises(ExecutorLostError, match="executor 0 was killed by SIGKILL"):
                await disturbed(engine, 20, (await living("executor 0")).kill)
            assert "SIGKILL" in engine.why_not_ready

    run(scenario())


def test_a_model_that_cannot_be_loaded_is_told_by_the_start(tmp_path: Path) -> None:
    save_servable("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")

    others = descendants()

    async def scenario() -> None:
        with pytest.raises(UnsupportedModelError):
            async with engine_on(tmp_path, in_process=False):
                pass
        assert descendants(but=others) == []

    run(scenario())


def test_several_executors_need_several_processes(model: Path) -> None:
    with pytest.raises(InvalidConfigError, match="in_process"):
        engine_on(model, in_process=True, tensor_parallel_size=2)


def test_an_engine_leaves_no_process_socket_descriptor_or_title(model: Path) -> None:
    async def start_and_stop() -> None:
        async with engine_on(model, in_process=False) as engine:
            graph = engine._graph
            assert isinstance(graph, ProcessGraph)
            folders.append(graph._run_dir.path)
            await answers(engine)

    folders: list[Path] = []
    others = descendants()
    title_before = title(psutil.Process())
    run(start_and_stop())
    assert title(psutil.Process()) == title_before
    before = num_descriptors()
    run(start_and_stop())
    assert num_descriptors() == before
    assert not any(folder.exists() for folder in folders)
    assert descendants(but=others) == []


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
