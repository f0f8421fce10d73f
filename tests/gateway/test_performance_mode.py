"""What each mode stands for, and that what is given wins."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.gateway import config as configuration
from octavo.gateway import flags
from octavo.gateway.cli import build_parser
from octavo.gateway.config import EngineConfig, make_config
from octavo.gateway.engine_setup import executor_config
from octavo.gateway.flags import engine_fields
from octavo.gateway.performance_mode import MODE_FIELDS, described, fill_in, graph_sizes, mode_settings
from octavo.messages.errors import InvalidConfigError


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `auto` means here."""
    for module in (configuration, flags):
        monkeypatch.setattr(module, "resolve_device", lambda asked: request.param if asked == "auto" else asked)
    return str(request.param)


EXPECTED: dict[tuple[str, str], tuple[int, int, int, float, int, int]] = {
    # Requests, tokens, depth, utilization, graphs of decodes, tokens of graphs with prompts.
    ("throughput", "cuda"): (512, 16384, 2, 0.92, 51, 6),
    ("balanced", "cuda"): (256, 8192, 2, 0.9, 35, 5),
    ("interactivity", "cuda"): (64, 2048, 2, 0.9, 28, 5),
    ("throughput", "cpu"): (256, 4096, 2, 0.5, 0, 0),
    ("balanced", "cpu"): (256, 2048, 2, 0.5, 0, 0),
    ("interactivity", "cpu"): (64, 512, 1, 0.5, 0, 0),
}


def settings_of(config: EngineConfig) -> tuple[int, int, int, float, int, int]:
    return (
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.pipeline_depth,
        config.memory_utilization,
        len(config.cuda_graph_sizes),
        len(config.cuda_graph_tokens),
    )


@pytest.mark.parametrize("mode", ["throughput", "balanced", "interactivity"])
def test_a_mode_resolves_to_these_settings_by_flag_and_by_keyword_alike(mode: str, device: str) -> None:
    expected = EXPECTED[mode, device]
    by_flag = make_config(engine_fields(build_parser().parse_args(["serve", "--performance-mode", mode])))
    by_keyword = make_config({"performance_mode": mode})
    assert settings_of(by_flag) == settings_of(by_keyword) == expected
    assert by_flag == by_keyword


GIVEN: dict[str, tuple[list[str], Any]] = {
    "max_num_seqs": (["--max-num-seqs", "7"], 7),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "99"], 99),
    "pipeline_depth": (["--pipeline-depth", "3"], 3),
    "memory_utilization": (["--gpu-memory-utilization", "0.25"], 0.25),
    "cuda_graph_sizes": (["--cuda-graph-sizes", "1", "5"], (1, 5)),
    "cuda_graph_tokens": (["--cuda-graph-tokens", "32"], (32,)),
}


@pytest.mark.parametrize("mode", ["throughput", "balanced", "interactivity"])
@pytest.mark.parametrize("field", sorted(GIVEN))
def test_what_is_given_wins_and_leaves_the_other_settings_to_the_mode(field: str, mode: str, device: str) -> None:
    words, value = GIVEN[field]
    by_flag = engine_fields(build_parser().parse_args(["serve", "--performance-mode", mode, *words]))
    for found in (make_config(by_flag), make_config({"performance_mode": mode, field: value})):
        assert getattr(found, field) == value
        plain = make_config({"performance_mode": mode})
        for other in MODE_FIELDS:
            follows = FOLLOWS.get(other)
            if other != field and field != follows:
                assert getattr(found, other) == getattr(plain, other)


FOLLOWS = {"cuda_graph_sizes": "max_num_seqs", "cuda_graph_tokens": "max_num_batched_tokens"}


def test_every_setting_of_a_mode_can_be_given() -> None:
    assert set(GIVEN) == set(MODE_FIELDS)


def test_defaults_without_a_gpu_are_the_struct_s() -> None:
    assert make_config({"device": "cpu"}) == EngineConfig(device="cpu")


def test_a_device_that_is_named_decides_whatever_this_host_has() -> None:
    assert make_config({"device": "cuda"}).max_num_batched_tokens == 8192
    assert make_config({"device": "cpu", "performance_mode": "interactivity"}).pipeline_depth == 1


def test_graphs_go_no_further_than_a_step_can_have_rows() -> None:
    assert fill_in({"max_num_seqs": 20}, "cuda")["cuda_graph_sizes"] == (1, 2, 4, 8, 16, 20)
    assert fill_in({"max_num_seqs": 1}, "cuda")["cuda_graph_sizes"] == (1,)
    assert fill_in({"cuda_graph_sizes": ()}, "cuda")["cuda_graph_sizes"] == ()
    no_graphs = engine_fields(build_parser().parse_args(["serve", "--device", "cuda", "--cuda-graph-sizes"]))
    assert make_config(no_graphs).cuda_graph_sizes == ()
    assert make_config(no_graphs).cuda_graph_tokens == ()
    no_mixed = engine_fields(build_parser().parse_args(["serve", "--device", "cuda", "--cuda-graph-tokens"]))
    assert make_config(no_mixed).cuda_graph_tokens == ()
    assert make_config(no_mixed).cuda_graph_sizes[-1] == 256


@pytest.mark.parametrize("mode", ["throughput", "balanced", "interactivity"])
@pytest.mark.parametrize("most", [65, 300, 512, 777, 5000])
def test_graphs_go_as_far_as_a_step_can_have_rows(mode: str, most: int) -> None:
    sizes = fill_in({"performance_mode": mode, "max_num_seqs": most}, "cuda")["cuda_graph_sizes"]
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == most
    own = mode_settings(mode, "cuda").cuda_graph_sizes  # type: ignore[arg-type]
    assert sizes[: sum(size <= most for size in own)] == tuple(size for size in own if size <= most)
    for rows in range(1, most + 1):
        assert min(size for size in sizes if size >= rows) <= max(rows + 15, 1.0625 * rows)


def test_prompts_of_graphs_have_no_more_tokens_than_a_step() -> None:
    assert fill_in({}, "cuda")["cuda_graph_tokens"] == (64, 128, 256, 384, 512)
    assert fill_in({"max_num_batched_tokens": 256}, "cuda")["cuda_graph_tokens"] == (64, 128, 256)
    assert fill_in({"max_num_batched_tokens": 20}, "cuda")["cuda_graph_tokens"] == ()
    assert fill_in({"cuda_graph_sizes": (), "cuda_graph_tokens": (8,)}, "cuda")["cuda_graph_tokens"] == (8,)


def test_no_step_is_padded_by_much() -> None:
    assert graph_sizes(32) == (1, 2, 4, 8, 16, 24, 32)
    for mode in ("throughput", "balanced", "interactivity"):
        sizes = mode_settings(mode, "cuda").cuda_graph_sizes
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == mode_settings(mode, "cuda").max_num_seqs
        for rows in range(1, sizes[-1] + 1):
            padded = min(size for size in sizes if size >= rows)
            assert padded <= max(rows + 7, 1.06 * rows)


@pytest.mark.parametrize("sizes", [(0, 1), (2, 1), (1, 1)])
@pytest.mark.parametrize("field", ["cuda_graph_sizes", "cuda_graph_tokens"])
def test_graph_sizes_that_make_no_sense_are_refused(field: str, sizes: tuple[int, ...]) -> None:
    with pytest.raises(InvalidConfigError, match="ascending") as caught:
        make_config({field: sizes})
    assert caught.value.field == field


@pytest.mark.parametrize(("field", "value"), [("performance_mode", "fast"), ("device", "tpu"), ("max_num_seqs", 0)])
def test_what_there_is_not_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        make_config({field: value})
    assert caught.value.field == field


def test_settings_are_told_as_they_are_in_force() -> None:
    told = described(fill_in({"performance_mode": "throughput", "max_num_seqs": 100}, "cuda"), "cuda")
    assert told["mode"] == "throughput"
    assert told["max_num_seqs"] == 100
    assert told["cuda_graph_sizes"] == "16 of 1 to 100 rows"
    assert told["cuda_graph_tokens"] == "6 of 64 to 1024 tokens, with decodes"
    on_cpu = described(fill_in({"performance_mode": "balanced"}, "cpu"), "cpu")
    assert on_cpu["cuda_graph_sizes"] == on_cpu["cuda_graph_tokens"] == "none"


def test_the_executor_is_told_what_was_resolved(tmp_path: Any) -> None:
    told = executor_config(make_config({"device": "cuda", "load_format": "dummy"}), tmp_path)
    assert (told.device, told.load_format, told.max_num_batched_tokens) == ("cuda", "dummy", 8192)
    assert told.cuda_graph_sizes[-1] == 256
    assert told.cuda_graph_tokens[-1] == 512


def test_the_help_of_serve_shows_device_and_mode(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "--device {auto,cpu,cuda}" in shown
    assert "--performance-mode {throughput,balanced,interactivity}" in shown
