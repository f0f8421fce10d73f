from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_engine import FakeEngine
from http_client import serving
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from octavo.gateway.chat import chat_params
from octavo.gateway.cli import build_parser
from octavo.gateway.config import EngineConfig, make_config
from octavo.gateway.engine import Engine
from octavo.gateway.flags import engine_fields
from octavo.gateway.generation_config import (
    GenerationConfig,
    RequestDefaults,
    named_generation_config,
    read_generation_config,
    request_defaults,
    say_request_defaults,
)
from octavo.gateway.llm import LLM
from octavo.gateway.params import validate_params
from octavo.messages.errors import InvalidConfigError
from octavo.messages.sampling import SamplingParams

SHIPPED = Path(__file__).parents[2] / "models" / "shipped"
GREEDY = {"temperature": 0.0}
FILE = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "max_new_tokens": 7,
}
ASKED = SamplingParams(
    temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1, max_tokens=7, clip_max_tokens=True
)


def checkpoint(tmp_path: Path, text: str, model: str = "leaf-draft") -> Path:
    """The small shipped model with another generation_config.json."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in (SHIPPED / model).iterdir():
        if file.name != "generation_config.json":
            (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    return folder


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    return tmp_path


def defaults_of(folder: Path, source: str = "auto", **override: Any) -> RequestDefaults:
    return request_defaults(source, named_generation_config(source), GenerationConfig(**override), folder)


# ---- the file ----


def test_a_checkpoint_s_file_gives_the_defaults_and_vllm_gives_none(tmp_path: Path) -> None:
    folder = written(tmp_path, json.dumps({**FILE, "do_sample": True, "eos_token_id": [1, 2], "penalty_alpha": 3}))
    defaults = defaults_of(folder)
    assert defaults.params == ASKED == defaults.for_programs()
    assert defaults.source == "generation_config.json" and defaults.max_tokens_limit is None
    for silent in (defaults_of(folder, "vllm"), defaults_of(folder / "elsewhere")):
        assert silent == RequestDefaults()
        assert silent.for_programs() == SamplingParams()


def test_an_override_wins_over_the_file_and_its_max_new_tokens_bounds_answers(tmp_path: Path) -> None:
    folder = written(tmp_path, json.dumps(FILE))
    defaults = defaults_of(folder, temperature=0.1, max_new_tokens=3)
    assert defaults.params == msgspec.structs.replace(ASKED, temperature=0.1, max_tokens=3)
    assert defaults.max_tokens_limit == 3
    assert defaults.source == "generation_config.json, --override-generation-config"
    alone = defaults_of(folder, "vllm", top_k=5)
    assert alone.params == SamplingParams(top_k=5, max_tokens=None) and alone.max_tokens_limit is None


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_named_file_or_folder_takes_the_place_of_the_checkpoint_s(tmp_path: Path, as_folder: bool) -> None:
    named = written(tmp_path, json.dumps({"temperature": 0.3, "max_new_tokens": 9}))
    source = str(named if as_folder else named / "generation_config.json")
    defaults = defaults_of(tmp_path / "checkpoint", source)
    assert defaults.params == SamplingParams(temperature=0.3, max_tokens=9, clip_max_tokens=True)
    assert defaults.max_tokens_limit == 9 and defaults.source == source


HOSTILE: list[tuple[str, Any]] = [
    ("temperature", "hot"),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", -1.0),
    ("temperature", 2.5),
    ("temperature", [0.5]),
    ("top_k", 20.0),
    ("top_k", -2),
    ("top_k", False),
    ("top_k", 2**31),
    ("top_k", 10**400),
    ("top_p", 0.0),
    ("top_p", {"a": 1}),
    ("min_p", 1.5),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.0),
    ("max_new_tokens", 0),
    ("max_new_tokens", -5),
    ("max_new_tokens", "100"),
]


@pytest.mark.parametrize("name,value", HOSTILE)
def test_a_value_that_cannot_be_used_is_ignored_and_told_of_and_refused_where_it_was_asked_for(
    name: str, value: Any, tmp_path: Path
) -> None:
    good = {"min_p": 0.25} if name != "min_p" else {"top_k": 3}
    folder = written(tmp_path, json.dumps({name: value, **good}))
    defaults = defaults_of(folder)
    assert defaults.told == good
    assert len(defaults.ignored) == 1 and defaults.ignored[0].startswith(name) and len(defaults.ignored[0]) < 200
    with pytest.raises(InvalidConfigError, match=name) as refused:
        named_generation_config(str(folder))
    assert refused.value.field == "generation_config"


@pytest.mark.parametrize(
    "text",
    ["", "[]", '"x"', "{", '{"temperature": NaN}', '{"top_k": Infinity}', "[" * 100_000, '{"a": ' * 5000, "\xff"],
    ids=range(9),
)
def test_a_file_that_is_no_json_object_is_told_of_and_refused_where_it_was_asked_for(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_bytes(text.encode("latin-1"))
    defaults = defaults_of(tmp_path)
    assert defaults.told == {} and defaults.params == SamplingParams(max_tokens=None)
    assert len(defaults.ignored) == 1 and "generation_config.json" in defaults.ignored[0]
    with pytest.raises(InvalidConfigError, match=r"generation_config\.json"):
        named_generation_config(str(tmp_path))


def test_a_named_file_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "nothing", tmp_path / "a" / "b.json"):
        with pytest.raises(InvalidConfigError, match=r"there is no file .* or auto, or vllm"):
            Engine("model/that/is/nowhere", generation_config=str(missing))


json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(GenerationConfig.__struct_fields__), json_values))
def test_whatever_a_file_says_its_defaults_are_parameters_that_a_request_may_have(
    tmp_path_factory: pytest.TempPathFactory, stated: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in stated.items()
    }
    path.write_text(json.dumps(finite), encoding="utf-8")
    found, ignored = read_generation_config(path)
    assert {*found.said(), *(line.split(":")[0].split(" ")[0] for line in ignored)} == {
        name for name, value in finite.items() if value is not None
    }
    defaults = request_defaults(str(path), found, GenerationConfig(), path)
    validate_params(defaults.params, vocab_size=10, max_logprobs=0, max_model_len=4)


# ---- configuration and flags ----


def test_flags_and_fields_say_the_same() -> None:
    flags = ["serve", "--generation-config", "vllm", "--override-generation-config", '{"temperature": 0.5, "top_k": 4}']
    config = make_config(engine_fields(build_parser().parse_args(flags)))
    fields = make_config({"generation_config": "vllm", "override_generation_config": {"temperature": 0.5, "top_k": 4}})
    assert config == fields
    assert config.override_generation_config == GenerationConfig(temperature=0.5, top_k=4)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    "override,told",
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": True}, "bool"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 7}, "top_p is 7"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"eos_token_id": [1]}, "eos_token_id"),
        ([1], "array|list"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused_by_name(override: Any, told: str) -> None:
    with pytest.raises(InvalidConfigError, match=told):
        make_config({"override_generation_config": override})


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000])
def test_a_flag_that_is_no_json_object_is_an_error_of_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["serve", "--override-generation-config", text])
    assert ended.value.code == 2
    assert "--override-generation-config" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags,told,expected",
    [
        ([], {}, SamplingParams(temperature=0.7, top_p=0.95, max_tokens=512, clip_max_tokens=True)),
        ([], FILE, ASKED),
        ([], {"top_k": 5}, SamplingParams(temperature=0.7, top_p=0.95, top_k=5, max_tokens=512, clip_max_tokens=True)),
        (
            ["--temperature", "0", "--max-tokens", "3"],
            FILE,
            msgspec.structs.replace(ASKED, temperature=0.0, max_tokens=3),
        ),
    ],
)
def test_the_terminal_s_chat_takes_flags_then_the_checkpoint_s_then_its_own(
    flags: list[str], told: dict[str, Any], expected: SamplingParams, tmp_path: Path
) -> None:
    defaults = defaults_of(written(tmp_path, json.dumps(told)))
    assert chat_params(build_parser().parse_args(["run", *flags]), defaults) == expected


def test_one_line_says_which_defaults_hold_and_one_what_was_not_taken() -> None:
    with capture_logs() as logs:
        say_request_defaults(RequestDefaults())
        assert logs == []
        say_request_defaults(RequestDefaults(source="a file", told={"top_k": 7}, ignored=("top_p is 3", "min_p is 9")))
    first, second = logs
    assert (first["event"], first["source"], first["top_k"]) == ("request.defaults", "a file", 7)
    assert (second["event"], second["why"]) == ("generation_config.ignored", "top_p is 3; min_p is 9")


# ---- over HTTP ----


def submitted(defaults: RequestDefaults, path: str, **body: Any) -> SamplingParams:
    """What a request became."""

    async def run() -> SamplingParams:
        engine = FakeEngine()
        engine.request_defaults = defaults
        async with serving(engine) as client:
            prompt = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
            answer = await client.post(path, {**prompt, **body})
            assert answer.status == 200, answer.body
        (params,) = engine.submitted
        return params

    return asyncio.run(run())


NAMED = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def test_a_request_that_names_nothing_takes_the_defaults_and_one_that_names_something_keeps_it(tmp_path: Path) -> None:
    defaults = defaults_of(written(tmp_path, json.dumps(FILE)))
    assert submitted(defaults, CHAT) == ASKED
    assert submitted(defaults, CHAT, temperature=None, top_p=None) == ASKED
    # OpenAI's own default for completions stays, as it does in vLLM.
    in_completions = msgspec.structs.replace(ASKED, max_tokens=16, clip_max_tokens=False)
    assert submitted(defaults, COMPLETIONS) == in_completions
    for path in (CHAT, COMPLETIONS):
        assert submitted(defaults, path, **NAMED, max_tokens=40) == SamplingParams(temperature=1.5, max_tokens=40)


def test_a_bound_on_answers_holds_for_those_that_ask_for_more_and_for_no_others() -> None:
    defaults = request_defaults("vllm", None, GenerationConfig(max_new_tokens=5), Path())
    for path in (CHAT, COMPLETIONS):
        assert submitted(defaults, path).max_tokens == 5
        assert submitted(defaults, path, max_tokens=40).max_tokens == 5
        assert submitted(defaults, path, max_tokens=4).max_tokens == 4
    assert submitted(defaults, CHAT, max_completion_tokens=400).max_tokens == 5


def test_a_checkpoint_s_defaults_hold_over_http_to_the_token(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, json.dumps({**GREEDY, "max_new_tokens": 100_000}))

    async def run() -> None:
        async with Engine(str(folder), num_blocks=64, max_model_len=64) as engine, serving(engine) as client:
            asked = {"messages": [{"role": "user", "content": "What is a list?"}], "max_tokens": 12}
            plain = (await client.post(CHAT, asked)).json["choices"]
            assert plain == (await client.post(CHAT, {**asked, **GREEDY})).json["choices"]
            others = [
                (await client.post(CHAT, {**asked, "temperature": 1.9, "seed": seed})).json["choices"]
                for seed in (1, 2)
            ]
            assert plain not in others
            # More than the context has room for is no reason to refuse: nobody asked for it.
            filled = (await client.post(CHAT, {"messages": asked["messages"], "ignore_eos": True})).json
            assert filled["usage"]["total_tokens"] == 64
            cut = await client.post(CHAT, {**asked, "max_tokens": 63})
            assert cut.status == 400 and cut.error["code"] == "context_length_exceeded"
            kept = await client.post(
                COMPLETIONS, {"prompt": [5] * 200, "truncate_prompt_tokens": -1, "max_tokens": 2, "ignore_eos": True}
            )
            assert kept.json["usage"] == {**kept.json["usage"], "prompt_tokens": 62, "completion_tokens": 2}
            assert engine.default_sampling_params().temperature == 0.0

    asyncio.run(run())


def test_a_checkpoint_s_list_of_end_tokens_ends_answers_and_out_of_place_ones_do_no_harm(tmp_path: Path) -> None:
    ends = [10**6, -1, True, "2", 2**40]
    folder = checkpoint(tmp_path, json.dumps({**GREEDY, "eos_token_id": ends}))

    async def tokens(asked: dict[str, Any], **fields: Any) -> Any:
        async with Engine(str(folder), num_blocks=64, max_model_len=256, **fields) as engine, serving(engine) as client:
            answer = await client.post(COMPLETIONS, {"prompt": "The", "return_token_ids": True, **asked})
            assert answer.status == 200, answer.body
            return answer.json["choices"][0]

    whole = asyncio.run(tokens({"max_tokens": 12, "min_tokens": 12}))
    assert len(whole["token_ids"]) == 12
    end = next(token for token in whole["token_ids"][2:] if token not in whole["token_ids"][:2])
    at = whole["token_ids"].index(end)
    (folder / "generation_config.json").write_text(json.dumps({**GREEDY, "eos_token_id": [*ends, end]}))
    named = tmp_path / "named.json"
    named.write_text(json.dumps(GREEDY))
    ended = asyncio.run(tokens({"max_tokens": 12}))
    assert (ended["finish_reason"], len(ended["token_ids"])) == ("stop", at + 1)
    # How to sample is one question, where an answer ends another.
    still = asyncio.run(tokens({"max_tokens": 12, **GREEDY}, generation_config="vllm"))
    assert still["token_ids"] == ended["token_ids"]
    other_file = asyncio.run(tokens({"max_tokens": 12}, generation_config=str(named)))
    assert other_file["token_ids"] == whole["token_ids"]
    other_tokenizer = asyncio.run(tokens({"max_tokens": 12}, tokenizer=str(SHIPPED / "leaf-draft")))
    assert other_tokenizer["token_ids"] == ended["token_ids"]


def test_programs_take_the_defaults_where_they_name_no_parameters(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, json.dumps({**GREEDY, "max_new_tokens": 5}))
    with LLM(str(folder), num_blocks=64, max_model_len=64) as llm:
        defaults = llm.get_default_sampling_params()
        assert defaults == SamplingParams(temperature=0.0, max_tokens=5, clip_max_tokens=True)
        own, same = (llm.generate("The file", params, use_tqdm=False)[0] for params in (None, defaults))
        assert own.outputs == same.outputs and len(own.outputs[0].token_ids) == 5
        longer = llm.generate("The file", SamplingParams(temperature=0.0, max_tokens=9), use_tqdm=False)[0]
        assert longer.outputs[0].token_ids[:5] == own.outputs[0].token_ids and len(longer.outputs[0].token_ids) == 9
    with LLM(str(folder), num_blocks=64, max_model_len=64, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize("model", ["leaf-4m", "leaf-draft"])
def test_the_shipped_models_leave_openai_s_defaults_as_they_are(model: str) -> None:
    assert defaults_of(SHIPPED / model) == RequestDefaults()
