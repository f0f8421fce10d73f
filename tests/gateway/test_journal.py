from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from engines import engine_on, save_servable

from octavo import Engine
from octavo.gateway.cli import main as cli
from octavo.gateway.config import make_config
from octavo.gateway.flag_parser import Parser
from octavo.gateway.flags import add_engine_flags, engine_fields
from octavo.messages.errors import InvalidConfigError
from octavo.messages.sampling import SamplingParams
from octavo.sim.journal.reader import JournalReader
from octavo.sim.journal.replay import replay
from octavo.sim.workload.from_journal import read_journal

NAME = "engine.journal"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_servable("llama", folder)
    return folder


async def use(engine: Engine) -> list[tuple[int, ...]]:
    """Prompts that share a beginning, a request that is left, one that is too late, and siblings."""
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    texts = [f"a beginning that all of them have in common, and then {i}" for i in range(8)]
    outputs = await asyncio.gather(*[engine.generate(text, greedy) for text in texts])
    async for _ in engine.stream("left after its first token", SamplingParams(max_tokens=60, ignore_eos=True)):
        break
    await engine.generate("twins", SamplingParams(n=2, max_tokens=4, seed=1))
    await engine.generate("too late", SamplingParams(max_tokens=5), timeout_s=1e-9)
    await engine.drain()
    return [output.outputs[0].token_ids for output in outputs]


def test_a_real_engine_is_replayed_from_its_journal(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "incident" / NAME

    async def main() -> tuple[list[tuple[int, ...]], int]:
        async with engine_on(folder, num_blocks=40, journal=str(path.parent)) as engine:
            tokens = await use(engine)
            return tokens, engine.stats().num_steps

    tokens, num_steps = asyncio.run(main())
    report = replay(path)
    assert report.is_identical, report.divergence
    assert report.end is not None
    assert report.end.is_complete
    assert report.num_requests == 12
    assert report.num_ends == 12
    assert report.num_plans >= num_steps
    assert report.num_prefix_hits > 0
    assert report.num_cancels == 1
    assert report.num_timeouts == 1
    assert report.model == folder.name
    assert report.started_at
    assert len(read_journal(path)) == 12
    with JournalReader(path) as reader:
        assert not reader.header.has_tokens
    assert all(len(answer) == 12 for answer in tokens)


def test_prompts_stand_in_the_journal_only_if_asked_for(folder: Path, tmp_path: Path) -> None:
    async def main(name: str, journal_prompts: bool) -> bytes:
        path = tmp_path / name / NAME
        async with engine_on(folder, journal=str(path.parent), journal_prompts=journal_prompts) as engine:
            await engine.generate([97, 98, 99, 100, 101, 102, 103, 104], SamplingParams(max_tokens=2))
        assert replay(path).is_identical
        return path.read_bytes()

    prompt = b"".join(bytes([token, 0, 0, 0]) for token in range(97, 105))
    assert prompt not in asyncio.run(main("hashed", journal_prompts=False))
    assert prompt in asyncio.run(main("plain", journal_prompts=True))


def test_a_journal_changes_no_token_and_an_engine_that_is_killed_leaves_a_readable_one(
    folder: Path, tmp_path: Path
) -> None:
    async def main(**fields: str) -> list[tuple[int, ...]]:
        async with engine_on(folder, **fields) as engine:
            return await use(engine)

    path = tmp_path / NAME
    assert asyncio.run(main()) == asyncio.run(main(journal=str(tmp_path)))
    path.write_bytes(path.read_bytes()[:-30])
    report = replay(path)
    assert report.is_identical
    assert report.end is not None
    assert not report.end.is_complete
    assert "not written to its end" in report.end.why


def test_an_engine_starts_anew_beside_its_last_journal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        engine = engine_on(folder, journal=str(tmp_path / "j"))
        for _ in range(2):
            await engine.start()
            await engine.generate("again", SamplingParams(max_tokens=2))
            await engine.close()

    asyncio.run(main())
    for name in (NAME, f"{NAME}.1"):
        assert replay(tmp_path / "j" / name).num_requests == 1
    assert cli(["sim", "replay", str(tmp_path / "j")]) == 0
    assert cli(["sim", "replay", str(tmp_path / "j"), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("identical: every decision is the recorded one") == 2
    assert [report["num_requests"] for report in json.loads(printed[printed.index("[\n") :])] == [1, 1]
    assert cli(["sim", "replay", str(tmp_path / "j"), "--why", "0"]) == 2
    assert "there are several" in capsys.readouterr().err
    assert cli(["sim", "replay", str(folder)]) == 2
    assert "no journal of an engine" in capsys.readouterr().err


def test_a_journal_that_cannot_be_made_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    async def main() -> None:
        async with Engine("no such model, which nobody looks for", journal=str(tmp_path / "file"), offline=True):
            pass

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InvalidConfigError, match="is a file, but must be a folder"):
        asyncio.run(main())
    (tmp_path / "file").unlink()
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / NAME).write_text("of somebody else")
    with pytest.raises(InvalidConfigError, match="is not a journal"):
        asyncio.run(main())


def test_flags_name_the_journal() -> None:
    parser = Parser()
    add_engine_flags(parser)
    fields = engine_fields(parser.parse_args(["--journal", "incident.journal", "--journal-prompts"]))
    assert fields["journal"] == "incident.journal"
    assert fields["journal_prompts"] is True
    with pytest.raises(InvalidConfigError, match="there is no journal"):
        make_config({"journal_prompts": True})
    fields = engine_fields(parser.parse_args([]))
    assert fields["journal"] is None
    assert fields["journal_prompts"] is False
