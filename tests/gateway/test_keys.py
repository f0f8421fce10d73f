from __future__ import annotations

from pathlib import Path

import pytest

from octavo.actors.runtime.curve import read_keys
from octavo.gateway.flag_parser import Parser
from octavo.gateway.keys import add_keys
from octavo.messages.errors import InvalidConfigError


def run(*words: str) -> int:
    parser = Parser()
    add_keys(parser.add_subparsers(parser_class=Parser))
    arguments = parser.parse_args(["keys", *words])
    status: int = arguments.run(arguments)
    return status


def test_the_command_writes_a_private_pair_and_prints_its_public_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "host.key"
    assert run(str(path)) == 0
    keys = read_keys(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out == f"{keys.public}\n"
    assert run(str(path), "--public") == 0
    assert capsys.readouterr().out == f"{keys.public}\n"


def test_a_pair_that_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "host.key"
    run(str(path))
    keys = read_keys(path)
    with pytest.raises(InvalidConfigError, match="--force"):
        run(str(path))
    assert read_keys(path) == keys
    run(str(path), "--force")
    assert read_keys(path) != keys
