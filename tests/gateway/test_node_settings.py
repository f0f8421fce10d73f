"""What `octavo node` and `octavo serve --listen` take, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.actors.runtime.curve import make_keys
from octavo.gateway.cli import build_parser
from octavo.gateway.config import NodesConfig
from octavo.gateway.node_settings import NodeSettings, node_settings
from octavo.gateway.server_flags import nodes_fields
from octavo.messages.errors import InvalidConfigError


def settings_of(*words: str) -> NodeSettings:
    return node_settings(build_parser().parse_args(["node", *words]))


def nodes_of(*words: str) -> NodesConfig | None:
    fields = nodes_fields(build_parser().parse_args(["serve", *words]))
    return None if fields is None else NodesConfig(**fields)


JOIN = "--join=tcp://10.0.0.1:7000"


def test_a_node_needs_keys_unless_it_asks_for_none(tmp_path: Path) -> None:
    key = make_keys().public
    with pytest.raises(InvalidConfigError, match="need keys"):
        settings_of(JOIN)
    with pytest.raises(InvalidConfigError, match="go together"):
        settings_of(JOIN, "--keys=file")
    with pytest.raises(InvalidConfigError, match="--join"):
        settings_of("--plain-loopback")
    assert settings_of("--join=tcp://127.0.0.1:7000", "--plain-loopback").keys == ""
    assert settings_of(JOIN, "--keys=file", f"--server-key={key}").server_key == key
    (tmp_path / "leader.pub").write_text(f"{key}\n")
    assert settings_of(JOIN, "--keys=file", f"--server-key={tmp_path / 'leader.pub'}").server_key == key


def test_under_torchrun_a_process_is_the_node_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.9",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    settings = settings_of("--keys=file", f"--server-key={make_keys().public}", "--name=host")
    assert settings.join == "tcp://10.0.0.9:7000"
    assert (settings.name, settings.rank, settings.world_size, settings.num_slots) == ("host.3", 3, 4, 1)
    assert settings.first_gpu == 1, "the other one is another process's"


def test_flags_about_nodes_mean_nothing_without_a_place_to_join_and_are_refused() -> None:
    assert nodes_of() is None
    for words in (["--nodes=2"], ["--keys=file"], ["--plain-loopback"], ["--local-executors=1"]):
        with pytest.raises(InvalidConfigError, match="--listen"):
            nodes_of(*words)
    with pytest.raises(InvalidConfigError, match="allow-list"):
        nodes_of("--listen=tcp://10.0.0.1:7000", "--keys=file")
    nodes = nodes_of("--listen=tcp://10.0.0.1:7000", "--keys=file", "--allow-list=list", "--nodes=2")
    assert nodes is not None and (nodes.num_nodes, nodes.local_executors) == (2, None)
